"""A scale and an offset per channel: normalisations and their relatives."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

from com_lightning.core.layers.base import Call, LayerType, first, own_parameter
from com_lightning.core.statistics import InputStatistics


class PerChannel(LayerType):
    """A scale, and perhaps an offset, per channel: LayerNorm, RMSNorm and their many relatives.

    Recognised by what it computes, not by its class: a module without children whose one or two parameters are vectors
    of one length, and whose output is ``scale_c * z_c + offset_c`` where ``z`` does not depend on them. ``z`` is found
    by running the layer with other parameters; a layer that stores ``scale - 1`` (Gemma's RMSNorm) comes out right.
    Each channel is a group with one input.
    """

    name = "per channel"

    def matches(self, module: nn.Module) -> bool:
        shapes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
        leaf = not list(module.children()) and len(shapes) == 1
        return leaf and self._names(module) is not None

    def has_bias(self, module: nn.Module) -> bool:
        return len(self._present(module)) == 2

    def key(self, module: nn.Module) -> Hashable:
        return id(module)  # the rows depend on more than the input (eps, running statistics, ...): never shared

    def multiply(self, weight: Tensor) -> bool:
        return True  # by the scale itself, which may differ from what the layer stores

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        yield self._response(module, args, kwargs)[0].unsqueeze(-1), True

    def gather(
        self,
        module: nn.Module,
        statistics: InputStatistics,
        merged: Call,
        expert: Call | None,
        weight: Tensor,
        keep: Tensor | None,
    ) -> bool:
        if self._response(module, *merged)[1]:  # the solver's differences between weights are the same either way
            weight = torch.cat([weight[..., :1] + 1, weight[..., 1:]], dim=-1)
        return super().gather(module, statistics, merged, expert, weight, keep)

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        dtype = torch.promote_types(first(args, kwargs).dtype, torch.float32)
        args, kwargs = _cast(dtype, args, kwargs)
        parameters = {name: p.detach().to(dtype) for name, p in self._present(module).items()}
        output = self._run(module, parameters, args, kwargs)
        if not isinstance(output, Tensor):
            return f"its output is a {type(output).__name__}"
        z, one_too_small = self._response(module, args, kwargs)
        channels = self._shape(module).numel()
        if z.shape[-1] != channels:
            return f"its output has {z.shape[-1]} channels, its parameters have {channels}"
        scale, *offset = (p.flatten() for p in parameters.values())
        expected = z * (scale + float(one_too_small)) + (offset[0] if offset else 0.0)
        actual = self._channels_last(module, output, args, kwargs)
        if bool((actual - expected).abs().amax() <= 1e-4 * expected.abs().amax() + 1e-30):
            return None
        return "its output is not a scale and an offset per channel"

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        columns = [own_parameter(layer, name).flatten() for name in self._names(layer) or ()]
        return torch.stack(columns, dim=-1)[:, None, :]

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        names = self._names(module) or ()
        shape = self._shape(module)
        return {name: weight[:, 0, column].reshape(shape) for column, name in enumerate(names)}

    def _names(self, module: nn.Module) -> tuple[str, ...] | None:
        """Names of the scale and the offset, in this order."""
        names = tuple(self._present(module))
        if len(names) == 1 and names[0] != "bias":
            return names
        if len(names) == 2 and "bias" in names:
            return (names[0] if names[1] == "bias" else names[1], "bias")
        return None

    def _present(self, module: nn.Module) -> dict[str, Tensor]:
        present = {name: p for name, p in module._parameters.items() if p is not None}
        return dict(sorted(present.items(), key=lambda item: item[0] == "bias"))

    def _shape(self, module: nn.Module) -> Size:
        return next(iter(self._present(module).values())).shape

    def _run(
        self, module: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The layer's output with other parameters, in their precision."""
        dtype = next(iter(parameters.values())).dtype
        probe = copy.copy(module)
        probe._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
        probe._buffers = _cast(dtype, (), module._buffers)[1]
        return probe.forward(*args, **kwargs)

    def _channels_last(
        self, module: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The layer's output as ``(*lead, channels)``."""
        shape = self._shape(module)
        last = output.shape[-len(shape) :] == shape
        second = len(shape) == 1 and output.dim() > 2 and output.shape[1:2] == shape
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)):
            last, second = False, True
        if last and second:  # an image as wide as it has channels: see where the first channel's scale is felt
            zero = {name: torch.zeros_like(p, dtype=output.dtype) for name, p in self._present(module).items()}
            scale = next(iter(zero))
            one = {
                **zero,
                scale: torch.zeros_like(zero[scale]).index_fill(0, torch.tensor([0], device=output.device), 1),
            }
            felt = self._run(module, one, args, kwargs) - self._run(module, zero, args, kwargs)
            second = not bool(felt[:, 1:].any())
            last = not second
        return output.movedim(1, -1) if second and not last else output.flatten(-len(shape))

    def _response(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
        """``z`` as ``(*lead, channels)`` in float32 or better, and whether the stored scale is one too small."""
        dtype = torch.promote_types(first(args, kwargs).dtype, torch.float32)
        args, kwargs = _cast(dtype, args, kwargs)
        zero = {name: torch.zeros_like(p, dtype=dtype) for name, p in self._present(module).items()}
        scale = next(iter(zero))
        at_zero = self._run(module, zero, args, kwargs)
        at_one = self._run(module, {**zero, scale: torch.ones_like(zero[scale])}, args, kwargs)
        z = self._channels_last(module, at_one - at_zero, args, kwargs)
        return z, bool(at_zero.count_nonzero())


class BatchNorm(PerChannel):
    """``nn.BatchNorm1d/2d/3d`` in eval mode.

    The merged layer normalises by the average of the experts' running statistics; every expert's scale and offset are
    first put in those terms, so that the solved ones make up for whatever these statistics are.
    """

    name = "batch normalisation"

    def matches(self, module: nn.Module) -> bool:
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        return batch_norm and super().matches(module)

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert isinstance(like, nn.modules.batchnorm._BatchNorm)
        own_mean, own_scale = self._statistics(layer)
        mean, scale = self._statistics(like)
        ratio = own_parameter(layer, "weight").double() / own_scale
        return torch.stack([ratio * scale, layer.bias.double() + ratio * (mean - own_mean)], -1)[:, None, :]

    @staticmethod
    def _statistics(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return layer.running_mean.double(), (layer.running_var.double() + layer.eps).sqrt()


def _cast(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with floating-point tensors in ``dtype``."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}
