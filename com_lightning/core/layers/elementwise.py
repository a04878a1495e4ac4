"""A parameter that is added to its input, or multiplied with it, element by element."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.layers.base import LayerCall, LayerType, own_parameter, rows_with_data
from com_lightning.core.solve.statistics import InputSums

# Attention scores that a mask has ruled out stand at minus infinity, the lowest number, -1e9, -1e4, ...
_LOWEST, _HIGHEST = -9e3, 1e18


class Scale(LayerType):
    """``x * p``: a layer scale, say. Every element of the parameter is a group with one input.

    Any selection of the parameter may be spread over the input in any way: the second argument of a call is the
    :class:`~com_lightning.core.tensors.tracked.Part` of it, which knows the positions. Rows are not normalised.
    """

    name = "product"

    def matches(self, module: nn.Module) -> bool:
        return False  # no module is one

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        raise NotImplementedError("its statistics are gathered without rows")

    def key(self, module: nn.Module) -> Hashable:
        return id(module)

    def multiply(self, weight: Tensor) -> bool:
        return True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return own_parameter(layer, "weight").reshape(-1, 1, 1)

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.reshape(own_parameter(module, "weight").shape)}

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        data, positions = self._aligned(module, *call.merged.args)
        other = call.expert.input.to(data.dtype) if call.expert is not None and call.is_paired else None
        counted = (data > _LOWEST) & (data < _HIGHEST)  # not NaN either
        if other is not None:
            counted &= (other > _LOWEST) & (other < _HIGHEST)
        data = torch.where(counted, data, 0.0)
        share = counted.to(data.dtype)
        index = rows_with_data(call.mask, data.shape[:-1])
        if index is not None:  # which positions count, or how often each of them counts
            times = index if index.dtype == torch.bool else index.bincount(minlength=data.shape[:-1].numel())
            share = share * times.view(data.shape[:-1])[..., None]

        def summed(values: Tensor) -> Tensor:
            """Values by element of the parameter, ``(g, 1, 1)``."""
            flat = values.sum_to_size(positions.shape).flatten()
            return flat.new_zeros(len(call.weight)).index_add_(0, positions.flatten(), flat)[:, None, None]

        drift_sum = None
        if other is not None:
            drift = torch.where(share > 0, other - data, 0.0)
            rows = (data, data + drift, drift)
            sums.drift_norms.update(*(torch.linalg.vector_norm(values, dim=-1).flatten() for values in rows))
            drift_sum = summed(self._drift(drift, data) * share) * self._multiplier(call.weight).to(drift.dtype)
        sums.add(summed(self._gram(data) * share), drift_sum, int(share.sum()) // data.shape[-1])
        return drift_sum is not None

    def _gram(self, data: Tensor) -> Tensor:
        return data.square()

    def _drift(self, drift: Tensor, data: Tensor) -> Tensor:
        return drift * data

    def _multiplier(self, weight: Tensor) -> Tensor:
        return weight

    @staticmethod
    def _aligned(module: nn.Module, data: Tensor, part: Any) -> tuple[Tensor, Tensor]:
        """The input, as large as the output, and for each of its dimensions (or one) the parameter's positions."""
        positions = part.positions(own_parameter(module, "weight"))
        shape = torch.broadcast_shapes(data.shape, positions.shape)  # type: ignore[no-untyped-call]
        data = data.to(torch.promote_types(data.dtype, torch.float32)).expand(shape)
        return data, positions[(None,) * (data.dim() - positions.dim())]


class Offset(Scale):
    """``x + p``: learned positions, a bias that is added apart. Every element is a group, with the bias as its input.

    It takes up the mean of what the merged model's input lacks of the expert's.
    """

    name = "sum"

    def _gram(self, data: Tensor) -> Tensor:
        return torch.ones_like(data)

    def _drift(self, drift: Tensor, data: Tensor) -> Tensor:
        return drift

    def _multiplier(self, weight: Tensor) -> Tensor:
        return torch.ones_like(weight)
