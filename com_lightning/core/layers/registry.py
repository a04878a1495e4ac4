"""The type of each layer. Layer types register themselves here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, overload

from torch import nn
from torch.nn import UninitializedParameter

from com_lightning.core.layers.base import LayerType

Type = TypeVar("Type", bound=type[LayerType])

_SPECIFIC: list[LayerType] = []
_GENERIC: list[LayerType] = []


@overload
def register_layer_type(cls: Type) -> Type: ...
@overload
def register_layer_type(*, generic: bool = False) -> Callable[[Type], Type]: ...
def register_layer_type(cls: Type | None = None, *, generic: bool = False) -> Type | Callable[[Type], Type]:
    """Register a layer type: from now on, modules that it matches are layers. Use it as a decorator of a class.

    If several types match a module, the one that was registered last is used.

    Args:
        cls: a layer type that can be created without arguments.
        generic: use the type only if no other type matches.

    Returns:
        The class, or the decorator if only ``generic`` is given.
    """

    def register(cls: Type) -> Type:
        (_GENERIC if generic else _SPECIFIC).insert(0, cls())
        return cls

    return register if cls is None else register(cls)


def layer_type_of(module: nn.Module) -> LayerType | None:
    """Return the type of a layer, or ``None`` if the layer has no closed form.

    Example::

        >>> layer_type_of(nn.Linear(2, 2)).name, layer_type_of(nn.LSTM(2, 2))
        ('linear', None)
    """
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):  # a lazy layer: no shape yet
        return None
    return next((entry for entry in (*_SPECIFIC, *_GENERIC) if entry.matches(module)), None)
