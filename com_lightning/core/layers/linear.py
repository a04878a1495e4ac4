"""Layers whose input, or the product of whose inputs, is the row."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.layers import base
from com_lightning.core.layers.base import (
    Arguments,
    LayerCall,
    LayerType,
    first,
    own_names,
    own_parameter,
    rows_with_data,
    with_bias,
)
from com_lightning.core.layers.registry import register_layer_type
from com_lightning.core.solve.statistics import InputSums

# The statistics of a bilinear layer with this many products take 256 MiB per task and matrix.
MAX_PRODUCTS = 2**13


@register_layer_type
class Linear(LayerType):
    """``nn.Linear``: the input is the row."""

    name = "linear"
    corrects = True

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward and own_names(module) == {"weight", "bias"}

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        yield first(args, kwargs).unsqueeze(-2), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(own_parameter(layer, "weight")[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        if not self.has_bias(module):
            return {"weight": weight[0]}
        return {"weight": weight[0, :, :-1], "bias": weight[0, :, -1]}

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, gap: Tensor
    ) -> Tensor | None:
        shape = (first(args, kwargs).shape[:-1].numel(), 1, weight.shape[1])
        return gap.reshape(shape) if gap.numel() == math.prod(shape) else None


class TransposedLinear(Linear):
    """``torch.addmm``: a linear layer that stores its weight as (in, out), such as GPT-2's."""

    name = "linear (in, out)"

    def matches(self, module: nn.Module) -> bool:
        return False  # found by the function that it calls

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(own_parameter(layer, "weight").T[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        solved = super().from_matrix(module, weight)
        return {**solved, "weight": solved["weight"].T}


@register_layer_type
class Bilinear(Linear):
    """``nn.Bilinear``: the row is the outer product of the two inputs, up to :data:`MAX_PRODUCTS` entries."""

    name = "bilinear"
    corrects = False

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Bilinear.forward and own_names(module) == {"weight", "bias"}

    def key(self, module: nn.Module) -> Hashable:
        return id(module)  # the rows depend on more than the first input

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        assert isinstance(module, nn.Bilinear)
        products = module.in1_features * module.in2_features
        if products <= MAX_PRODUCTS:
            return None
        return (
            f"its rows would have {products:,} entries, all products of its inputs; at most {MAX_PRODUCTS:,} are solved"
        )

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        left, right = _inputs(*args, **kwargs)
        dtype = torch.promote_types(left.dtype, torch.float32)
        left, right = left.to(dtype)[..., :, None], right.to(dtype)[..., None, :]
        yield (left * right).flatten(-2).unsqueeze(-2), True

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        expert = call.expert if call.is_paired else None
        expert_parts = itertools.repeat(None) if expert is None else _parts(expert, call.mask)
        for part, expert_part in zip(_parts(call.merged, call.mask), expert_parts):
            super().gather(module, sums, LayerCall(part, expert_part, call.weight))
        return expert is not None

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(own_parameter(layer, "weight").flatten(1)[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        assert isinstance(module, nn.Bilinear)
        solved = super().from_matrix(module, weight)
        return {**solved, "weight": solved["weight"].reshape(module.weight.shape)}


def _inputs(input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor]:
    return input1, input2


def _parts(call: Arguments, mask: Tensor | None) -> Iterator[Arguments]:
    """Calls of a bilinear layer with a part of the inputs each, so that not all products exist at once."""
    left, right = (value.flatten(0, -2) for value in _inputs(*call.args, **call.kwargs))
    index = rows_with_data(mask, call.input.shape[:-1])
    if index is not None:
        left, right = left[index], right[index]
    size = max(base.MAX_ROW_ELEMENTS // (left.shape[1] * right.shape[1]), 1)
    for part in zip(torch.split(left, size), torch.split(right, size)):
        yield Arguments(part)
