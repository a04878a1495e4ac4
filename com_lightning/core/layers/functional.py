"""Function calls that are layers, and how each of them is a regression.

A call is described by a stand-in, a module that holds the parameters as the function takes them, and by a layer type
for that module. The solution is written back to the tensors that the arguments were taken from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.layers.base import LayerType
from com_lightning.core.layers.convolution import Convolution, TransposedConvolution
from com_lightning.core.layers.einsum import Contraction, GroupedLinear
from com_lightning.core.layers.elementwise import Offset, Scale
from com_lightning.core.layers.embedding import Embedding
from com_lightning.core.layers.linear import Linear, TransposedLinear
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.tensors.tracked import Part, Tracked, materialized, name_of


@dataclass(frozen=True)
class FunctionCall:
    """A function call that is a layer.

    Attributes:
        layer_type: its type.
        parts: name of each parameter of the stand-in -> the part of a parameter of the model that it is.
        stand_in: makes the module for the layer type, without parameters.
        args: the arguments of that module.
    """

    layer_type: LayerType
    parts: Mapping[str, Part]
    stand_in: Callable[[], nn.Module]
    args: tuple[Any, ...]

    def module(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Return the stand-in with these parameters."""
        module = self.stand_in()
        module._parameters = {**dict.fromkeys(module._parameters), **tensors}  # type: ignore[dict-item]
        return module


IsFree = Callable[[Part], bool]
"""Whether a part of a parameter may still be solved."""

_RECOGNISERS: dict[str, Callable[..., FunctionCall | None]] = {}
"""Name of a function -> its recogniser, see :func:`recognises`."""

Recogniser = TypeVar("Recogniser", bound=Callable[..., FunctionCall | None])


def recognises(*names: str) -> Callable[[Recogniser], Recogniser]:
    """Return a decorator of ``recogniser(name, is_free, *args, **kwargs)`` for functions of these names.

    The recogniser receives the function's name, an :data:`IsFree`, and the arguments of the call. It returns the layer
    that the call computes, or ``None``.
    """

    def register(recogniser: Recogniser) -> Recogniser:
        _RECOGNISERS.update(dict.fromkeys(names, recogniser))
        return recogniser

    return register


def recognise(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], is_free: IsFree
) -> FunctionCall | None:
    """Return the layer that a function call computes, or ``None`` if the call is not a layer.

    Args:
        function: the function that is called.
        args: its arguments. At least one argument, here or by keyword, is tracked.
        kwargs: its keyword arguments.
        is_free: tells whether a part of a parameter may still be solved.
    """
    name = name_of(function)
    if name not in _RECOGNISERS:
        return None
    try:
        call: FunctionCall | None = _RECOGNISERS[name](name, is_free, *args, **kwargs)
    except TypeError:  # the recogniser does not take these arguments
        return None
    if call is None or not all(is_free(part) for part in call.parts.values()):
        return None
    data = call.args[0]
    return call if isinstance(data, Tensor) and not isinstance(data, Tracked) else None


@recognises("linear")
def _linear(
    name: str, is_free: IsFree, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> FunctionCall | None:
    if not isinstance(weight, Tracked) or not is_free(weight.part):
        is_bias_free = isinstance(bias, Tracked) and is_free(bias.part)
        return _add("add", is_free, F.linear(input, materialized(weight)), bias) if is_bias_free else None
    if weight.dim() != 2:
        return None
    return _layer(Linear(), lambda: nn.Linear(1, 1, bias is not None, "meta"), (input,), weight, bias)


@recognises("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _convolution(
    name: str, is_free: IsFree, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> FunctionCall | None:
    transposed = "transpose" in name
    names = ("stride", "padding", "output_padding", "groups", "dilation")
    settings = dict(zip(names if transposed else ("stride", "padding", "dilation", "groups"), args)) | kwargs
    if not isinstance(weight, Tracked) or not is_free(weight.part):
        if not isinstance(bias, Tracked) or not is_free(bias.part):
            return None
        bias = bias.view(-1, *[1] * (weight.dim() - 2))
        return _add("add", is_free, getattr(F, name)(input, materialized(weight), None, **settings), bias)
    if not isinstance(settings.get("padding", 0), (int, str, tuple, list)):
        return None
    first, second = weight.shape[:2]
    groups = settings.get("groups", 1)
    channels = (first, second * groups) if transposed else (second * groups, first)
    cls = getattr(nn, name.replace("conv_t", "ConvT").replace("conv", "Conv"))
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}

    def stand_in() -> nn.Module:
        module: nn.Module = cls(*channels, tuple(weight.shape[2:]), bias=bias is not None, device="meta", **settings)
        return module

    return _layer(TransposedConvolution() if transposed else Convolution(), stand_in, (input,), weight, bias)


@recognises("embedding")
def _embedding(
    name: str, is_free: IsFree, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any
) -> FunctionCall | None:
    rows, width = weight.shape
    return _layer(Embedding(), lambda: nn.Embedding(rows, width, device="meta"), (input,), weight)


@recognises("matmul", "__matmul__", "__rmatmul__", "mm", "bmm")
def _matmul(name: str, is_free: IsFree, left: Tensor, right: Tensor) -> FunctionCall | None:
    if name == "__rmatmul__":
        left, right = right, left
    weight_first = isinstance(left, Tracked)
    if (left.dim() < 2 and not weight_first) or right.dim() < 2:
        return None
    batch = "abcdefghijklm"[: max(left.dim(), right.dim()) - 2]
    one, two = (batch[len(batch) - tensor.dim() + 2 :] for tensor in (left, right))
    equation = f"{one}xy,{two}yz->{batch}xz"
    return _einsum(name, is_free, equation, left, right)


@recognises("addmm")
def _addmm(name: str, is_free: IsFree, input: Tensor, mat1: Tensor, mat2: Tensor) -> FunctionCall | None:
    if input.dim() != 1:
        return None
    return _layer(TransposedLinear(), nn.Module, (mat1,), mat2, input)


@recognises("einsum")
def _einsum(name: str, is_free: IsFree, equation: str, *operands: Any) -> FunctionCall | None:
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if len(operands) != 2:
        return None
    left, right = operands
    weight, data = (left, right) if isinstance(left, Tracked) else (right, left)
    contraction = Contraction.parse(equation, left, right, weight is left)
    if contraction is None or not isinstance(weight, Tracked):
        return None
    return _layer(contraction, nn.Module, (data,), weight)


@recognises("grouped_mm", "_grouped_mm", "grouped_mm_fallback")
def _grouped(
    name: str, is_free: IsFree, input: Tensor, weight: Tensor, offs: Tensor | None = None, **_: Any
) -> FunctionCall | None:
    if offs is None or input.dim() != 2 or weight.dim() != 3:
        return None
    return _layer(GroupedLinear(), nn.Module, (input, offs), weight)


@recognises("add", "add_", "__add__", "__radd__", "__iadd__")
def _add(name: str, is_free: IsFree, one: Any, two: Any) -> FunctionCall | None:
    return _elementwise(Offset(), one, two)


@recognises("scaled_dot_product_attention")
def _attention(
    name: str, is_free: IsFree, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **settings: Any
) -> FunctionCall | None:
    """Biases of the scores, such as relative positions, are passed as the mask."""
    scale = settings.get("scale") or query.shape[-1] ** -0.5
    if not isinstance(attn_mask, Tracked) or settings.get("is_causal") or settings.get("enable_gqa"):
        return None
    return _add("add", is_free, query @ key.mT * scale, attn_mask)


@recognises("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
def _multiply(name: str, is_free: IsFree, one: Any, two: Any) -> FunctionCall | None:
    return _elementwise(Scale(), one, two)


def _elementwise(layer_type: LayerType, one: Any, two: Any) -> FunctionCall | None:
    data, weight = (two, one) if isinstance(one, Tracked) else (one, two)
    if not isinstance(data, Tensor) or not isinstance(weight, Tracked):
        return None
    if not data.is_floating_point() or not data.dim() or not data.numel():
        return None
    stem, rest = weight.part.split()
    return FunctionCall(layer_type, {"weight": stem}, nn.Module, (data, rest))


@recognises("layer_norm")
def _layer_norm(
    name: str, is_free: IsFree, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> FunctionCall | None:
    return _layer(PerChannel(), lambda: nn.LayerNorm(shape, eps, device="meta"), (input,), weight, bias)


@recognises("rms_norm")
def _rms_norm(
    name: str, is_free: IsFree, input: Tensor, shape: Any, weight: Any = None, eps: float | None = None
) -> FunctionCall | None:
    return _layer(PerChannel(), lambda: nn.RMSNorm(shape, eps, device="meta"), (input,), weight)


@recognises("group_norm")
def _group_norm(
    name: str, is_free: IsFree, input: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> FunctionCall | None:
    stand_in = partial(nn.GroupNorm, groups, input.shape[1], eps, device="meta")
    return _layer(PerChannel(), stand_in, (input,), weight, bias)


def _layer(
    layer_type: LayerType, stand_in: Callable[[], nn.Module], args: tuple[Any, ...], weight: Any, bias: Any = None
) -> FunctionCall | None:
    """``None`` if a given argument is not tracked, or holds an element of a parameter more than once."""
    watched = {name: entry for name, entry in (("weight", weight), ("bias", bias)) if entry is not None}
    if weight is None or not all(isinstance(entry, Tracked) and entry.part.selects_once for entry in watched.values()):
        return None
    return FunctionCall(layer_type, {name: entry.part for name, entry in watched.items()}, stand_in, args)
