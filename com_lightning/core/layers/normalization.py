"""Layers with a scale and an offset per channel: normalisations and the like."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Size, Tensor, nn

from com_lightning.core.layers.base import (
    Arguments,
    LayerCall,
    LayerType,
    RowMask,
    first,
    parameter_value,
    rows_with_data,
)
from com_lightning.core.layers.registry import register_layer_type
from com_lightning.core.solve.statistics import InputMeans, InputSums


@register_layer_type(generic=True)
class PerChannel(LayerType):
    """A scale, and often an offset, per channel: LayerNorm, RMSNorm and the like.

    A layer is recognised by its function, not by its class. It is a module without children. It has one or two
    parameters of the same shape, and its output is ``scale_c * z_c + offset_c``, where ``z`` does not depend on them.
    ``z`` is computed by running the layer with other parameters. Layers that store ``scale - 1`` (Gemma's RMSNorm) are
    noticed and merged correctly. Each channel is a group with one input.
    """

    name = "per channel"
    can_repair_stream = True

    def __init__(self) -> None:
        self._minus_one: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
        """Layer -> whether it stores ``scale - 1``, for layers where the inputs have shown it."""

    def matches(self, module: nn.Module) -> bool:
        shapes = {tuple(p.shape) for p in module._parameters.values() if p is not None}
        leaf = not list(module.children()) and len(shapes) == 1
        return leaf and self._names(module) is not None

    def has_bias(self, module: nn.Module) -> bool:
        return len(self._present(module)) == 2

    def key(self, module: nn.Module) -> Hashable:
        return id(module)  # never shared, because the rows also depend on eps, running statistics, ...

    def multiplies_drift(self, weight: Tensor) -> bool:
        return True  # by the scale, which differs from the stored tensor if that is `scale - 1`

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        yield self._response(module, args, kwargs).unsqueeze(-1), True

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, drift: Tensor
    ) -> Tensor | None:
        shape = first(args, kwargs).shape
        if drift.numel() != shape.numel():
            return None
        args, kwargs = _cast(drift.dtype, args, kwargs)
        channels = self._channels_last(module, drift.reshape(shape), args, kwargs)
        return channels.reshape(-1, len(weight), 1)

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        if self._stores_scale_minus_one(module, call.merged.args, call.merged.kwargs):
            # The solver uses differences between weights, which are the same for `scale - 1` and `scale`.
            weight = torch.cat([call.weight[..., :1] + 1, call.weight[..., 1:]], dim=-1)
            call = replace(call, weight=weight)
        return super().gather(module, sums, call)

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        dtype = Arguments(args, kwargs).dtype
        args, kwargs = _cast(dtype, args, kwargs)
        parameters = {name: p.detach().to(dtype) for name, p in self._present(module).items()}
        output = self._run(module, parameters, args, kwargs)
        if not isinstance(output, Tensor):
            return f"its output is a {type(output).__name__}"
        if output.dim() < len(self._shape(module)):
            return f"its output has fewer dimensions than its parameters, {tuple(self._shape(module))}"
        z = self._response(module, args, kwargs)
        channels = self._shape(module).numel()
        if z.shape[-1] != channels:
            return f"its output has {z.shape[-1]} channels, its parameters have {channels}"
        scale, *offset = (p.flatten() for p in parameters.values())
        expected = z * (scale + float(self._stores_scale_minus_one(module, args, kwargs))) + (
            offset[0] if offset else 0.0
        )
        actual = self._channels_last(module, output, args, kwargs)
        is_finite = actual.isfinite() & expected.isfinite()  # NaN in a batch says nothing about the layer
        actual, expected = torch.where(is_finite, actual, 0.0), torch.where(is_finite, expected, 0.0)
        if bool((actual - expected).abs().amax() <= 1e-4 * expected.abs().amax() + 1e-30):
            return None
        return "its output is not a scale and an offset per channel"

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        columns = [parameter_value(layer, name).flatten() for name in self._names(layer) or ()]
        return torch.stack(columns, dim=-1)[:, None, :]

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        names = self._names(module) or ()
        shape = self._shape(module)
        return {name: weight[:, 0, column].reshape(shape) for column, name in enumerate(names)}

    def _names(self, module: nn.Module) -> tuple[str, ...] | None:
        """Names of the scale and, if there is one, the offset; ``None`` if the parameters are something else."""
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
        """The layer's output with other parameters, computed in their precision."""
        dtype = next(iter(parameters.values())).dtype
        probe = copy.copy(module)
        probe._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
        probe._buffers = _cast(dtype, (), module._buffers)[1]
        return probe.forward(*args, **kwargs)

    def _channels_last(
        self, module: nn.Module, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Reshape an output of the layer to ``(*lead, channels)``."""
        shape = self._shape(module)
        last = output.shape[-len(shape) :] == shape
        second = len(shape) == 1 and output.dim() > 2 and output.shape[1:2] == shape
        if isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase)):
            last, second = False, True
        if last and second:  # as many columns as channels: find the dimension that the first channel's scale acts on
            zero = {name: torch.zeros_like(p, dtype=output.dtype) for name, p in self._present(module).items()}
            scale = next(iter(zero))
            one = {
                **zero,
                scale: torch.zeros_like(zero[scale]).index_fill(0, torch.tensor([0], device=output.device), 1),
            }
            effect = self._run(module, one, args, kwargs) - self._run(module, zero, args, kwargs)
            second = not bool(effect[:, 1:].any())
            last = not second
        return output.movedim(1, -1) if second and not last else output.flatten(-len(shape))

    def _response(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """``z`` as ``(*lead, channels)`` in float32 or better: the layer's output for a scale of one."""
        args, kwargs = _cast(Arguments(args, kwargs).dtype, args, kwargs)
        stored = 0.0 if self._stores_scale_minus_one(module, args, kwargs) else 1.0
        return self._channels_last(module, self._run_with_scale(stored, module, args, kwargs), args, kwargs)

    def _stores_scale_minus_one(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether the layer stores ``scale - 1``. If it does, a stored scale of zero gives a nonzero output."""
        result = self._minus_one.get(module)
        if result is None:
            args, kwargs = _cast(Arguments(args, kwargs).dtype, args, kwargs)
            result = _is_nonzero(self._run_with_scale(0.0, module, args, kwargs))
            # An input that gives zero with either scale shows nothing. The next call decides.
            if result or _is_nonzero(self._run_with_scale(1.0, module, args, kwargs)):
                self._minus_one[module] = result
        return result

    def _run_with_scale(self, scale: float, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The layer's output if it stores this scale and an offset of zero."""
        dtype = first(args, kwargs).dtype
        values = {name: torch.zeros_like(p, dtype=dtype) for name, p in self._present(module).items()}
        next(iter(values.values())).fill_(scale)
        return self._run(module, values, args, kwargs)


def _is_nonzero(output: Any) -> bool:
    """Whether a finite number other than zero is in an output."""
    return isinstance(output, Tensor) and bool((output.isfinite() & (output != 0)).any())


@register_layer_type
class BatchNorm(PerChannel):
    """``nn.BatchNorm1d/2d/3d`` and ``nn.SyncBatchNorm`` in eval mode, with or without a scale and an offset.

    For the solution, each expert's scale and offset are rewritten for the average of the running statistics, so that
    all experts share these. Then the running statistics are re-estimated for the inputs of the merged model,

        m_i' = m_i + (mean x̂ - mean x)      v_i' = v_i var x̂ / var x
        m = sum_i a_i m_i'                  v = sum_i a_i (v_i' + (m_i' - m)²)

    over tasks i with running mean ``m_i``, variance ``v_i`` and importance ``a_i`` (law of total variance). The
    statistics of an expert's training move as far as its inputs have moved on the calibration data. A one-sided merge
    has no inputs of the experts; then they are the mean and variance of ``x̂``. Last, the solved scale and offset are
    rewritten for the new running statistics, which does not change the layer's function. A layer without scale and
    offset gets the running statistics alone.
    """

    name = "batch normalisation"

    def matches(self, module: nn.Module) -> bool:
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
        return batch_norm and not list(module.children()) and set(self._present(module)) == {"weight", "bias"}

    def buffers(self, layer: nn.Module) -> tuple[str, ...]:
        return ("running_mean", "running_var")

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        paired = super().gather(module, sums, call)
        if paired or call.expert is None:
            sums.moments.update(self._values(call.merged, call.mask))
        if paired and call.expert is not None:
            sums.expert_moments.update(self._values(call.expert, call.mask))
        return paired

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        expert_mean, expert_deviation = self._statistics(layer)
        mean, deviation = self._statistics(like)
        parameters = {name: p.detach().double() for name, p in self._present(layer).items()}
        slope = parameters["weight"] / expert_deviation
        return torch.stack([slope * deviation, parameters["bias"] + slope * (mean - expert_mean)], -1)[:, None, :]

    def finish(
        self,
        module: nn.Module,
        weight: Tensor,
        experts: Sequence[nn.Module],
        means: Sequence[InputMeans] | None,
        importance: Sequence[float],
    ) -> dict[str, Tensor] | str:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert module.running_mean is not None
        entries: Sequence[InputMeans | None] = means or [None] * len(experts)
        estimates = [self._estimate(layer, entry) for layer, entry in zip(experts, entries)]
        # Rounded as they are stored, so that scale and offset fit the stored values.
        dtype = module.running_mean.dtype
        mean = _weighted(importance, [m for m, _ in estimates]).to(dtype).double()
        variances = [v + (m - mean).square() for m, v in estimates]
        variance = _weighted(importance, variances).to(dtype).double()
        old_mean, old_deviation = self._statistics(module)
        slope = weight[:, 0, 0] / old_deviation
        scale, offset = slope * (variance + module.eps).sqrt(), weight[:, 0, 1] + slope * (mean - old_mean)
        affine = {} if module.weight is None else {"weight": scale, "bias": offset}
        return {**affine, "running_mean": mean, "running_var": variance}

    def _present(self, module: nn.Module) -> dict[str, Tensor]:
        present = super()._present(module)
        if present:
            return present
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        assert module.running_mean is not None
        return {"weight": torch.ones_like(module.running_mean), "bias": torch.zeros_like(module.running_mean)}

    @staticmethod
    def _values(call: Arguments, mask: RowMask | None) -> Tensor:
        """The layer's input as ``(n, channels)``, without padding."""
        values = call.input.movedim(1, -1)
        index = rows_with_data(mask, values.shape[:-1])
        values = values.flatten(0, -2)
        return values if index is None else values[index]

    @staticmethod
    def _estimate(layer: nn.Module, means: InputMeans | None) -> tuple[Tensor, Tensor]:
        """Running mean and variance of one task's inputs in the merged model, in float64."""
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        mean, variance = layer.running_mean.double(), layer.running_var.double()
        if means is None or means.moments.count < 2:
            return mean, variance
        ours, theirs = means.moments, means.expert_moments
        if not theirs.count:
            return ours.mean, ours.variance
        # If a channel hardly varies on the calibration data, the ratio of variances is noise. The difference is not.
        varies = theirs.variance > 1e-3 * variance
        scaled = variance * ours.variance / torch.where(varies, theirs.variance, 1.0)
        variance = torch.where(varies, scaled, (variance + ours.variance - theirs.variance).clamp_min(0.0))
        return mean + ours.mean - theirs.mean, variance

    @staticmethod
    def _statistics(layer: nn.Module) -> tuple[Tensor, Tensor]:
        """Running mean and standard deviation, in float64."""
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return layer.running_mean.double(), (layer.running_var.double() + layer.eps).sqrt()


def _weighted(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors)]).sum(0)


def _cast(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    cast = Arguments(args, kwargs).to(dtype)
    return cast.args, cast.kwargs
