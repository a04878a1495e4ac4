"""Every layer as a linear regression.

A layer type says how its input becomes rows ``(n, g, f)`` (``g`` independent groups of ``f`` inputs) and how its
parameters become a weight ``(g, o, k)``, ``k = f + 1`` with a bias. Statistics and solver know nothing else about it.
A new layer type is one class here and one entry in :data:`LAYER_TYPES`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.statistics import InputStatistics

# Rows are made in pieces of at most this many numbers (256 MiB in float32).
MAX_ROW_ELEMENTS = 2**26


class LayerType(ABC):
    """One type of layer as a regression of its output on its input."""

    name: str
    """How the report calls it."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this type, judged before any data is seen."""

    @abstractmethod
    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        """The arguments of one call as regression rows.

        Yields:
            ``(rows, tokens)``: rows of shape ``(*lead, g, f)`` and whether their leading dimensions are positions that
            a padding mask applies to.
        """

    @abstractmethod
    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        """Parameters of an expert's ``layer`` -> weight ``(g, o, k)``, the bias last, for the rows of ``like``.

        ``like`` is the merged model's layer, whose rows may depend on buffers of its own.
        """

    @abstractmethod
    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`to_matrix`."""

    def has_bias(self, module: nn.Module) -> bool:
        """Whether rows get a trailing 1."""
        return getattr(module, "bias", None) is not None

    def key(self, module: nn.Module) -> Hashable:
        """Two layers with one key make the same rows of the same input (q, k and v share their statistics)."""
        return (type(self), self.has_bias(module))

    def multiply(self, weight: Tensor) -> bool:
        """Whether to multiply the drift by the weight ``(g, o, k)`` while gathering, see :class:`InputStatistics`."""
        return 2 * weight.shape[1] < weight.shape[2]

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call is no such regression after all; ``None`` if it is."""
        return None

    def gather(
        self,
        module: nn.Module,
        statistics: InputStatistics,
        merged: tuple[tuple[Any, ...], dict[str, Any]],
        expert: tuple[tuple[Any, ...], dict[str, Any]] | None,
        weight: Tensor,
        keep: Tensor | None,
    ) -> bool:
        """Add one call to the statistics of a task.

        Args:
            module: the merged model's layer (its parameters are not read).
            statistics: those of the task at this layer.
            merged, expert: arguments of the call in the merged model and in the expert, if that one is to be used.
            weight: the expert's, ``(g, o, k)``.
            keep: boolean mask over positions, ``True`` where data is; ``None``: everywhere.

        Returns:
            Whether the expert's rows were used; they are not where their shape differs (inputs routed otherwise).
        """
        others = iter(()) if expert is None else self.rows(module, *expert)
        paired = expert is not None
        for rows, tokens in self.rows(module, *merged):
            other = next(others, (None, tokens))[0]
            if other is not None and other.shape != rows.shape:
                other = None
            paired = paired and other is not None
            index = kept(keep, rows.shape[:-2]) if tokens else None
            statistics.update(_flat(rows, index), None if other is None else _flat(other, index), weight)
        return paired


class Linear(LayerType):
    """``nn.Linear``: the input is the row."""

    name = "linear"

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward and set(module._parameters) == {"weight", "bias"}

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        yield first(args, kwargs).unsqueeze(-2), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return with_bias(_own(layer, "weight")[None], layer._parameters["bias"])

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
        return with_bias(_own(layer, "weight").T[None], layer._parameters.get("bias"))

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        solved = super().from_matrix(module, weight)
        return {**solved, "weight": solved["weight"].T}


class Convolution(LayerType):
    """``nn.Conv1d/2d/3d``, with groups, stride, padding of any mode and dilation: rows are the unfolded patches."""

    name = "convolution"
    types: tuple[type[nn.modules.conv._ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def matches(self, module: nn.Module) -> bool:
        known = isinstance(module, self.types) and type(module).forward in [kind.forward for kind in self.types]
        return known and set(module._parameters) == {"weight", "bias"}

    def key(self, module: nn.Module) -> Hashable:
        assert isinstance(module, nn.modules.conv._ConvNd)
        shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        return (*super().key(module), *shape, module.output_padding, module.padding_mode)  # type: ignore[misc]

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        assert isinstance(module, nn.modules.conv._ConvNd)
        image, dims = first(args, kwargs), len(module.kernel_size)
        if image.dim() == dims + 1:  # without a batch dimension
            image = image[None]
        patches, strides = self._padded(module, image)
        for dim, (size, stride, dilation) in enumerate(zip(module.kernel_size, strides, module.dilation), start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # (batch, channels, *positions, *kernel) -> (batch, *positions, groups, channels / groups * kernel)
        patches = patches.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))
        per_image = max(patches[0].numel(), 1)
        for part in torch.split(patches, max(MAX_ROW_ELEMENTS // per_image, 1)):
            yield part.reshape(*part.shape[: 1 + dims], module.groups, -1), False

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        weight = _own(layer, "weight").reshape(layer.groups, layer.out_channels // layer.groups, -1)
        return with_bias(weight, layer.bias)

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        assert isinstance(module, nn.modules.conv._ConvNd)
        solved = {}
        if self.has_bias(module):
            weight, bias = weight[..., :-1], weight[..., -1]
            solved["bias"] = bias.reshape(-1)
        return {"weight": weight.reshape(module.weight.shape), **solved}

    def _padded(self, module: nn.modules.conv._ConvNd, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The image that the kernel slides over, and its stride."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(image, module._reversed_padding_repeated_twice, mode=mode), module.stride


class TransposedConvolution(Convolution):
    """``nn.ConvTranspose1d/2d/3d``: a convolution with stride one over the image with zeros between its pixels."""

    name = "transposed convolution"
    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return "it was called with an output_size" if len(args) + len(kwargs) > 1 else None

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        kernel = tuple(range(3, 3 + len(layer.kernel_size)))
        weight = _own(layer, "weight").reshape(layer.groups, -1, layer.out_channels // layer.groups, *layer.kernel_size)
        weight = weight.flip(kernel).transpose(1, 2)
        return with_bias(weight.flatten(2), layer.bias)

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        assert isinstance(module, nn.modules.conv._ConvNd)
        features = weight[..., :-1] if self.has_bias(module) else weight
        inputs = module.in_channels // module.groups
        kernel = features.reshape(*features.shape[:2], inputs, *module.kernel_size).transpose(1, 2)
        kernel = kernel.flip(tuple(range(3, kernel.dim()))).flatten(0, 1)
        return {"weight": kernel, **({"bias": weight[..., -1].reshape(-1)} if self.has_bias(module) else {})}

    def _padded(self, module: nn.modules.conv._ConvNd, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        spread = [(size - 1) * stride + 1 for size, stride in zip(image.shape[2:], module.stride)]
        stuffed = image.new_zeros(*image.shape[:2], *spread)
        between = [slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride)]
        stuffed[tuple(between)] = image
        margins: list[int] = []
        shape = zip(module.kernel_size, module.dilation, module.padding, module.output_padding)
        for size, dilation, padding, extra in shape:
            assert isinstance(padding, int)
            margin = dilation * (size - 1) - padding
            margins = [margin, margin + extra, *margins]
        return F.pad(stuffed, margins), (1,) * len(module.stride)


class Embedding(LayerType):
    """``nn.Embedding``: one-hot rows, so that the Gram matrix is the diagonal of token counts.

    Each row of the table is a group with one input. Rows that no task uses keep the average.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Embedding.forward and set(module._parameters) == {"weight"}

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        assert isinstance(module, nn.Embedding)
        one_hot = F.one_hot(first(args, kwargs).long(), module.num_embeddings)
        yield one_hot.unsqueeze(-1).to(torch.float32), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return _own(layer, "weight")[:, :, None]

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight[:, :, 0]}

    def gather(
        self,
        module: nn.Module,
        statistics: InputStatistics,
        merged: tuple[tuple[Any, ...], dict[str, Any]],
        expert: tuple[tuple[Any, ...], dict[str, Any]] | None,
        weight: Tensor,
        keep: Tensor | None,
    ) -> bool:
        # Counted rather than through `rows`: a one-hot row has as many entries as the vocabulary.
        assert isinstance(module, nn.Embedding)
        ids = first(*merged)
        index = kept(keep, ids.shape)
        ids = ids.flatten() if index is None else ids.flatten()[index]
        counts = torch.bincount(ids.long(), minlength=module.num_embeddings).to(torch.float32)[:, None, None]
        statistics.gram = counts if statistics.gram is None else statistics.gram.add_(counts)
        statistics.rows += len(ids)
        return expert is not None


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
        merged: tuple[tuple[Any, ...], dict[str, Any]],
        expert: tuple[tuple[Any, ...], dict[str, Any]] | None,
        weight: Tensor,
        keep: Tensor | None,
    ) -> bool:
        if self._response(module, *merged)[1]:  # the solver's differences between weights are the same either way
            weight = torch.cat([weight[..., :1] + 1, weight[..., 1:]], dim=-1)
        return super().gather(module, statistics, merged, expert, weight, keep)

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        z, one_too_small = self._response(module, args, kwargs)
        channels = self._shape(module).numel()
        if z.shape[-1] != channels:
            return f"its output has {z.shape[-1]} channels, its parameters have {channels}"
        parameters = {name: p.detach().to(z.dtype) for name, p in self._present(module).items()}
        scale, *offset = (p.flatten() for p in parameters.values())
        expected = z * (scale + float(one_too_small)) + (offset[0] if offset else 0.0)
        actual = self._channels_last(module, self._run(module, parameters, *_cast(z.dtype, args, kwargs)))
        if bool((actual - expected).abs().amax() <= 1e-4 * expected.abs().amax() + 1e-30):
            return None
        return "its output is not a scale and an offset per channel"

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        columns = [_own(layer, name).flatten() for name in self._names(layer) or ()]
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

    def _shape(self, module: nn.Module) -> torch.Size:
        return next(iter(self._present(module).values())).shape

    def _run(
        self, module: nn.Module, parameters: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        probe = copy.copy(module)
        probe._parameters = {**module._parameters, **parameters}  # type: ignore[dict-item]
        output = probe.forward(*args, **kwargs)
        assert isinstance(output, Tensor)
        return output

    def _channels_last(self, module: nn.Module, output: Tensor) -> Tensor:
        """The layer's output as ``(*lead, channels)``."""
        second = isinstance(module, (nn.GroupNorm, nn.modules.batchnorm._NormBase))
        shape = self._shape(module)
        if second or (output.shape[-len(shape) :] != shape and output.dim() > 2 and output.shape[1:2] == shape):
            return output.movedim(1, -1)
        return output.flatten(-len(shape))

    def _response(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, bool]:
        """``z`` as ``(*lead, channels)`` in float32 or better, and whether the stored scale is one too small."""
        dtype = torch.promote_types(first(args, kwargs).dtype, torch.float32)
        args, kwargs = _cast(dtype, args, kwargs)
        zero = {name: torch.zeros_like(p, dtype=dtype) for name, p in self._present(module).items()}
        scale = next(iter(zero))
        at_zero = self._run(module, zero, args, kwargs)
        at_one = self._run(module, {**zero, scale: torch.ones_like(zero[scale])}, args, kwargs)
        return self._channels_last(module, at_one - at_zero), bool(at_zero.count_nonzero())


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
        ratio = _own(layer, "weight").double() / own_scale
        return torch.stack([ratio * scale, layer.bias.double() + ratio * (mean - own_mean)], -1)[:, None, :]

    @staticmethod
    def _statistics(layer: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
        assert layer.running_mean is not None
        assert layer.running_var is not None
        return layer.running_mean.double(), (layer.running_var.double() + layer.eps).sqrt()


LAYER_TYPES: tuple[LayerType, ...] = (
    Linear(),
    TransposedLinear(),
    Convolution(),
    TransposedConvolution(),
    Embedding(),
    BatchNorm(),
    PerChannel(),
)


def layer_type(module: nn.Module) -> LayerType | None:
    """The type of a layer, or ``None`` where no closed form is known.

    Example::

        >>> layer_type(nn.Linear(2, 2)).name, layer_type(nn.LSTM(2, 2))
        ('linear', None)
    """
    return next((kind for kind in LAYER_TYPES if kind.matches(module)), None)


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer that was called with these arguments."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def _own(layer: nn.Module, name: str) -> Tensor:
    parameter = layer._parameters[name]
    assert parameter is not None
    return parameter.detach()


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(g, o, f)`` and ``(g * o,)`` -> ``(g, o, f + 1)``."""
    if bias is None:
        return weight
    return torch.cat([weight, bias.detach().reshape(*weight.shape[:2], 1)], dim=2)


def kept(keep: Tensor | None, lead: torch.Size) -> Tensor | None:
    """Flat mask of the rows to use, where a padding mask applies to the leading dimensions ``lead`` of a layer's input.

    It applies where it has the same shape, flattened or not; a single row of positions (position ids) is used where any
    sample has data. Anything else (one row per sample, say) is no sequence of tokens, and all of it is used.

    Example::

        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> kept(mask, torch.Size([1, 3])), kept(mask, torch.Size([2]))
        (tensor([ True,  True, False]), None)
    """
    if keep is None:
        return None
    if lead == keep.shape or lead == (keep.numel(),):
        return keep.flatten()
    if keep.dim() == 2 and lead in {(1, keep.shape[1]), (keep.shape[1],)}:
        return keep.any(0)
    return None


def _cast(dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with floating-point tensors in ``dtype``."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, args)), {name: cast(value) for name, value in kwargs.items()}


def _flat(rows: Tensor, index: Tensor | None) -> Tensor:
    rows = rows.reshape(-1, *rows.shape[-2:])
    return rows if index is None else rows[index]
