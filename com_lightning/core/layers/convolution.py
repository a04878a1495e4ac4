"""Convolutions: each row is an unfolded patch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.layers.base import LayerType, first, parameter_names, parameter_value, pieces, with_bias
from com_lightning.core.layers.registry import register_layer_type


@register_layer_type
class Convolution(LayerType):
    """``nn.Conv1d/2d/3d``, with groups, stride, padding of any mode and dilation: each row is an unfolded patch.

    All patches of an image take as many times its memory as a kernel has positions. So they are unfolded piece by
    piece, see :data:`~com_lightning.core.layers.base.MAX_ROW_ELEMENTS`.
    """

    name = "convolution"
    can_have_correction = True
    can_repair_stream = True
    types: tuple[type[nn.modules.conv._ConvNd], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def matches(self, module: nn.Module) -> bool:
        is_convolution = isinstance(module, self.types)
        has_same_forward = type(module).forward in [cls.forward for cls in self.types]
        return is_convolution and has_same_forward and parameter_names(module) == {"weight", "bias"}

    def key(self, module: nn.Module) -> Hashable:
        assert isinstance(module, nn.modules.conv._ConvNd)
        shape = (module.kernel_size, module.stride, module.padding, module.dilation, module.groups)
        return (*super().key(module), *shape, module.output_padding, module.padding_mode)  # type: ignore[misc]

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        assert isinstance(module, nn.modules.conv._ConvNd)
        patches, dims = self._patches(module, first(args, kwargs)), len(module.kernel_size)
        for piece in pieces(patches, lead=1 + dims):
            yield piece.reshape(*piece.shape[: 1 + dims], module.groups, -1), False

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, drift: Tensor
    ) -> Tensor | None:
        assert isinstance(module, nn.modules.conv._ConvNd)
        image = torch.empty_like(first(args, kwargs), device="meta")  # only the shape is needed
        samples, *positions = self._patches(module, image).shape[: 1 + len(module.kernel_size)]
        groups, outputs, _ = weight.shape
        if drift.numel() != samples * math.prod(positions) * groups * outputs:
            return None
        return drift.reshape(samples, groups, outputs, -1).movedim(-1, 1).reshape(-1, groups, outputs)

    def _patches(self, module: nn.modules.conv._ConvNd, image: Tensor) -> Tensor:
        """All patches that the kernel is multiplied with, ``(batch, *positions, channels, *kernel)``, as a view."""
        dims = len(module.kernel_size)
        if image.dim() == dims + 1:  # without a batch dimension
            image = image[None]
        patches, strides = self._padded(module, image)
        for dim, (size, stride, dilation) in enumerate(zip(module.kernel_size, strides, module.dilation), start=2):
            patches = patches.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        # from (batch, channels, *positions, *kernel)
        return patches.permute(0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims))

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        weight = parameter_value(layer, "weight").reshape(layer.groups, layer.out_channels // layer.groups, -1)
        return with_bias(weight, layer.bias)

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        assert isinstance(module, nn.modules.conv._ConvNd)
        if not self.has_bias(module):
            return {"weight": weight.reshape(module.weight.shape)}
        return {"weight": weight[..., :-1].reshape(module.weight.shape), "bias": weight[..., -1].reshape(-1)}

    def _padded(self, module: nn.modules.conv._ConvNd, image: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The image that the kernel slides over, and its stride."""
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return F.pad(image, module._reversed_padding_repeated_twice, mode=mode), module.stride


@register_layer_type
class TransposedConvolution(Convolution):
    """``nn.ConvTranspose1d/2d/3d``: a convolution with stride one, over the image with zeros between its pixels."""

    name = "transposed convolution"
    types = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        return "it was called with an output_size" if len(args) + len(kwargs) > 1 else None

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        assert isinstance(layer, nn.modules.conv._ConvNd)
        kernel = tuple(range(3, 3 + len(layer.kernel_size)))
        weight = parameter_value(layer, "weight").reshape(
            layer.groups, -1, layer.out_channels // layer.groups, *layer.kernel_size
        )
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
        sizes = [(size - 1) * stride + 1 for size, stride in zip(image.shape[2:], module.stride)]
        dilated = image.new_zeros(*image.shape[:2], *sizes)
        pixels = [slice(None), slice(None), *(slice(None, None, stride) for stride in module.stride)]
        dilated[tuple(pixels)] = image
        margins: list[int] = []
        shape = zip(module.kernel_size, module.dilation, module.padding, module.output_padding)
        for size, dilation, padding, extra in shape:
            assert isinstance(padding, int)
            margin = dilation * (size - 1) - padding
            margins = [margin, margin + extra, *margins]
        return F.pad(dilated, margins), (1,) * len(module.stride)
