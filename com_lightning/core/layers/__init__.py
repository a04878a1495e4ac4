"""Every layer as a linear regression.

A layer type says how its input becomes rows ``(n, g, f)`` (``g`` independent groups of ``f`` inputs) and how its
parameters become a weight ``(g, o, k)``, ``k = f + 1`` with a bias. Statistics and solver know nothing else about it.
A new layer type is one class and one entry in :data:`LAYER_TYPES`, or, if it is a function rather than a module, in
:mod:`com_lightning.core.layers.functional`.
"""

from __future__ import annotations

from torch import nn
from torch.nn import UninitializedParameter

from com_lightning.core.layers.base import LayerType, kept, own_parameters
from com_lightning.core.layers.convolution import Convolution, TransposedConvolution
from com_lightning.core.layers.embedding import Embedding
from com_lightning.core.layers.linear import Bilinear, Linear
from com_lightning.core.layers.normalization import BatchNorm, PerChannel

__all__ = ["LAYER_TYPES", "Embedding", "LayerType", "PerChannel", "kept", "layer_type", "own_parameters"]

LAYER_TYPES: list[LayerType] = [
    Linear(),
    Bilinear(),
    Convolution(),
    TransposedConvolution(),
    Embedding(),
    BatchNorm(),
    PerChannel(),
]
"""The first type that matches is taken. Types of your own go to the front: ``LAYER_TYPES.insert(0, MyType())``."""


def layer_type(module: nn.Module) -> LayerType | None:
    """The type of a layer, or ``None`` where no closed form is known.

    Example::

        >>> layer_type(nn.Linear(2, 2)).name, layer_type(nn.LSTM(2, 2))
        ('linear', None)
    """
    if any(isinstance(p, UninitializedParameter) for p in module._parameters.values()):  # a lazy layer: no shape yet
        return None
    return next((kind for kind in LAYER_TYPES if kind.matches(module)), None)
