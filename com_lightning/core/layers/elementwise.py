"""A parameter that is added to its input, or multiplied with it, element by element."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.layers.base import LayerCall, LayerType, parameter_value, rows_with_data
from com_lightning.core.solve.statistics import InputSums

# Masks set attention scores to minus infinity, the lowest number, -1e9, -1e4, ... Such scores are not counted.
_LOWEST, _HIGHEST = -9e3, 1e18


class Scale(LayerType):
    """``x * p``, for instance a layer scale. Each element of the parameter is a group with one input.

    Any selection of the parameter may be broadcast to the input in any way. The second argument of a call is a
    :class:`~com_lightning.core.tensors.tracked.Part` of the parameter, which gives the positions. Rows are not
    normalised.
    """

    name = "product"
    reaches_all_groups = False  # a masked score reaches none

    def matches(self, module: nn.Module) -> bool:
        return False  # always a function call, never a module

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        raise NotImplementedError("its statistics are gathered without rows")

    def key(self, module: nn.Module) -> Hashable:
        return id(module)

    def multiplies_drift(self, weight: Tensor) -> bool:
        return True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return parameter_value(layer, "weight").reshape(-1, 1, 1)

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.reshape(parameter_value(module, "weight").shape)}

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        data, positions = self._aligned(module, *call.merged.args)
        expert = call.expert.input.to(data.dtype) if call.expert is not None and call.is_paired else None
        is_counted = (data > _LOWEST) & (data < _HIGHEST)  # False for NaN
        if expert is not None:
            is_counted &= (expert > _LOWEST) & (expert < _HIGHEST)
        data = torch.where(is_counted, data, 0.0)
        counts = is_counted.to(data.dtype)
        index = rows_with_data(call.mask, data.shape[:-1])
        if index is not None:  # whether each position counts, or how often
            times = index if index.dtype == torch.bool else index.bincount(minlength=data.shape[:-1].numel())
            counts = counts * times.view(data.shape[:-1])[..., None]

        def summed(values: Tensor) -> Tensor:
            """Sums of values for each element of the parameter, ``(g, 1, 1)``."""
            flat = values.sum_to_size(positions.shape).flatten()
            return flat.new_zeros(len(call.weight)).index_add_(0, positions.flatten(), flat)[:, None, None]

        drift_sum = None
        if expert is not None:
            drift = torch.where(counts > 0, expert - data, 0.0)
            rows = (data, data + drift, drift)
            sums.drift_norms.update(*(torch.linalg.vector_norm(values, dim=-1).flatten() for values in rows))
            drift_sum = summed(self._drift(drift, data) * counts) * self._multiplier(call.weight).to(drift.dtype)
        sums.add(summed(self._gram(data) * counts), drift_sum, int(counts.sum()) // data.shape[-1])
        return drift_sum is not None

    def _gram(self, data: Tensor) -> Tensor:
        return data.square()

    def _drift(self, drift: Tensor, data: Tensor) -> Tensor:
        return drift * data

    def _multiplier(self, weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def _aligned(module: nn.Module, data: Tensor, part: Any) -> tuple[Tensor, Tensor]:
        """The input in the shape of the output, and the parameter's positions, which broadcast to that shape."""
        positions = part.positions(parameter_value(module, "weight"))
        shape = torch.broadcast_shapes(data.shape, positions.shape)  # type: ignore[no-untyped-call]
        data = data.to(torch.promote_types(data.dtype, torch.float32)).expand(shape)
        return data, positions[(None,) * (data.dim() - positions.dim())]


class Offset(Scale):
    """``x + p``: learned positions, or a bias in a separate sum. Each element is a group whose input is 1.

    The solution makes up for the mean drift of the input.
    """

    name = "sum"

    def _gram(self, data: Tensor) -> Tensor:
        return torch.ones_like(data)

    def _drift(self, drift: Tensor, data: Tensor) -> Tensor:
        return drift

    def _multiplier(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)
