"""Every layer as a linear regression.

A layer type says how its input becomes rows ``(n, g, f)`` (``g`` independent groups of ``f`` inputs) and how its
parameters become a weight ``(g, o, k)``, ``k = f + 1`` with a bias. Statistics and solver know nothing else about it.

A new layer type is one file in this folder: a class with the decorator :func:`register_layer_type`, or, if it is a
function rather than a module, a description with the decorator
:func:`~com_lightning.core.layers.functional.recognises`. All files here are imported with the package.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from com_lightning.core.layers.base import Arguments, LayerCall, LayerType, own_parameters, rows_with_data
from com_lightning.core.layers.registry import layer_type, register_layer_type

__all__ = [
    "Arguments",
    "LayerCall",
    "LayerType",
    "layer_type",
    "own_parameters",
    "register_layer_type",
    "rows_with_data",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
