"""Layers whose input is the row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from com_lightning.core.layers.base import LayerType, first, own_names, own_parameter, with_bias


class Linear(LayerType):
    """``nn.Linear``: the input is the row."""

    name = "linear"

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


class TransposedLinear(Linear):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores its weight as (in, out)."""

    name = "linear (in, out)"

    def matches(self, module: nn.Module) -> bool:
        # By name, because the core does not import transformers.
        kinds = {f"{c.__module__}.{c.__qualname__}" for c in type(module).__mro__}
        return "transformers.pytorch_utils.Conv1D" in kinds

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(own_parameter(layer, "weight").T[None], getattr(layer, "bias", None))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        solved = super().from_matrix(module, weight)
        return {**solved, "weight": solved["weight"].T}
