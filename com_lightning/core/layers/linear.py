"""Linear layers, whose input is the row, and bilinear ones, where the row is the product of two inputs."""

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
    RowMask,
    first,
    parameter_names,
    parameter_value,
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
    can_have_correction = True
    can_repair_stream = True

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward and parameter_names(module) == {"weight", "bias"}

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        yield first(args, kwargs).unsqueeze(-2), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(parameter_value(layer, "weight")[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        if not self.has_bias(module):
            return {"weight": weight[0]}
        return {"weight": weight[0, :, :-1], "bias": weight[0, :, -1]}

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, drift: Tensor
    ) -> Tensor | None:
        shape = (first(args, kwargs).shape[:-1].numel(), 1, weight.shape[1])
        return drift.reshape(shape) if drift.numel() == math.prod(shape) else None


class TransposedLinear(Linear):
    """``torch.addmm``: a linear layer that stores its weight as (in, out), for instance in GPT-2."""

    name = "linear (in, out)"

    def matches(self, module: nn.Module) -> bool:
        return False  # always a function call, never a module

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(parameter_value(layer, "weight").T[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        solved = super().from_matrix(module, weight)
        return {**solved, "weight": solved["weight"].T}


@register_layer_type
class Bilinear(Linear):
    """``nn.Bilinear``: the row is the outer product of the two inputs, with up to :data:`MAX_PRODUCTS` entries."""

    name = "bilinear"
    can_repair_stream = False

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Bilinear.forward and parameter_names(module) == {"weight", "bias"}

    def key(self, module: nn.Module) -> Hashable:
        return id(module)  # never shared, because the rows depend on the second input too

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
        expert_pieces = itertools.repeat(None) if expert is None else _split(expert, call.mask)
        for piece, expert_piece in zip(_split(call.merged, call.mask), expert_pieces):
            super().gather(module, sums, LayerCall(piece, expert_piece, call.weight))
        return expert is not None

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(parameter_value(layer, "weight").flatten(1)[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        assert isinstance(module, nn.Bilinear)
        solved = super().from_matrix(module, weight)
        return {**solved, "weight": solved["weight"].reshape(module.weight.shape)}


def _inputs(input1: Tensor, input2: Tensor) -> tuple[Tensor, Tensor]:
    return input1, input2


def _split(call: Arguments, mask: RowMask | None) -> Iterator[Arguments]:
    """Split a call of a bilinear layer into calls with a few inputs each, so that not all products exist at once."""
    left, right = (value.flatten(0, -2) for value in _inputs(*call.args, **call.kwargs))
    index = rows_with_data(mask, call.input.shape[:-1])
    if index is not None:
        left, right = left[index], right[index]
    size = max(base.MAX_ROW_ELEMENTS // (left.shape[1] * right.shape[1]), 1)
    for piece in zip(torch.split(left, size), torch.split(right, size)):
        yield Arguments(piece)
