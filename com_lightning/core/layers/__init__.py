"""Every layer as a linear regression.

A layer type turns the input of a layer into rows ``(n, g, f)``: ``g`` independent groups of ``f`` inputs. It turns the
parameters into a weight ``(g, o, k)``, where ``k`` is ``f + 1`` with a bias, else ``f``. Statistics and solver know
nothing else about a layer.

A new layer type is one file in this folder. It holds a class with the decorator :func:`register_layer_type`. If the
layer is a function and not a module, it holds a description with the decorator
:func:`~com_lightning.core.layers.functional.recognises`. The package imports all files here.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from com_lightning.core.layers.base import Arguments, LayerCall, LayerType, RowMask, rows_with_data, stored_parameters
from com_lightning.core.layers.registry import layer_type_of, register_layer_type

__all__ = [
    "Arguments",
    "LayerCall",
    "LayerType",
    "RowMask",
    "layer_type_of",
    "register_layer_type",
    "rows_with_data",
    "stored_parameters",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
