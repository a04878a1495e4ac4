"""Hyperparameters in a file are data: they never name code that the user has not named.

LightningCLI saves hyperparameters as its configuration has them. A nested network is then a dictionary with
``class_path`` and ``init_args``, and a function may be a text such as ``torch.nn.functional.relu``. When Lightning
loads such a checkpoint, it imports and calls whatever they name, also with ``weights_only=True``. A file could thus run
any function of any installed package. :func:`check_hyperparameters` looks at all names before Lightning sees them.
"""

from __future__ import annotations

import enum
import importlib.util
import inspect
import os
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from lightning.pytorch import LightningModule
from torch import nn

KEYS = ("hyper_parameters", "hparams", "module_arguments")
"""Keys of a checkpoint that Lightning reads hyperparameters from."""
INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"
"""What LightningCLI names as the function that makes the module."""
PACKAGES = ("torch.nn", "torchvision", "torchmetrics", "transformers")
"""Modules (``nn.Module``) of these packages may be named by a file."""

_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_TEXTS = (str, int, float, bool, bytes, type(None), enum.Enum, os.PathLike)

Place = tuple[str | int, ...]
"""Keys and positions that lead to a value."""


def check_hyperparameters(content: Mapping[str, Any], model: LightningModule) -> None:
    """Make sure that a checkpoint's hyperparameters name no code but the user's own. Nothing is imported.

    A name is the user's own if it stands at the same place in the hyperparameters of ``model``; or if it is the class
    of a module inside ``model``; or if it is an ``nn.Module`` of the package that defines ``model``, or of one of
    :data:`PACKAGES`, that is imported already. Functions are the user's own by the first rule, or if they are in
    ``torch.nn``.

    Args:
        content: of the checkpoint.
        model: the user's own module, of the class that is to be made.

    Raises:
        ValueError: naming what the file names, and where.
    """
    for key in KEYS:
        given = content.get(key)
        # Without an instantiator Lightning passes the values to the class as they are.
        if not isinstance(given, Mapping) or given.get("_instantiator") is None:
            continue
        if given["_instantiator"] != INSTANTIATOR:
            raise ValueError(f"{key} name {given['_instantiator']!r} to make the module, which is not called")
        module_class: type = type(model)
        if (name := given.get("_class_path")) is not None:
            found = _imported(str(name))
            if not (isinstance(found, type) and issubclass(found, type(model))):
                raise ValueError(f"{key} name the class {name!r}, which is no {type(model).__name__} that is imported")
            module_class = found
        own = dict(_strings((), dict(model.hparams)))
        values = {name: value for name, value in given.items() if name not in ("_instantiator", "_class_path")}
        for place, name in _named(values, module_class):
            if not _is_allowed(place, name, model, own):
                raise ValueError(
                    f"{key} name {name!r} at {'.'.join(map(str, place))}, which is not imported or called because "
                    "neither your model nor its configuration has it. If you trust the file, build the module "
                    "yourself and pass it, or pass its state_dict"
                )


def restore_hyperparameters(module: LightningModule, content: Mapping[str, Any]) -> None:
    """Give a module that LightningCLI made the hyperparameters of its file, which are plain values.

    Outside of LightningCLI, ``save_hyperparameters`` has noted the nested modules themselves. A checkpoint with these
    could not be loaded safely.

    Args:
        module: that was made from the checkpoint.
        content: of the checkpoint.
    """
    given = content.get(KEYS[0])
    if isinstance(given, Mapping) and given.get("_instantiator") is not None:
        module.hparams.clear()
        module.hparams.update(given)


def _named(values: Mapping[str, Any], made: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """All texts among the arguments of a class that may be taken for names of code."""
    hints = _hints(made)
    for name, value in values.items():
        yield from _named_in((*place, name), value, hints.get(name, Any))


def _named_in(place: Place, value: Any, hint: Any) -> Iterator[tuple[Place, str]]:
    if isinstance(value, Mapping) and "class_path" in value:
        name = str(value["class_path"])
        yield (*place, "class_path"), name
        inner = {key: part for key, part in value.items() if key != "class_path"}
        for key, part in inner.items():
            if isinstance(part, Mapping):
                yield from _named(part, _imported(name), (*place, key))
            else:
                yield from _named_in((*place, key), part, None)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named_in((*place, key), part, hint)
    elif isinstance(value, (list, tuple, set)):
        for number, part in enumerate(value):
            yield from _named_in((*place, number), part, hint)
    elif isinstance(value, str) and (hint is Any or not _is_text(hint)):
        for text in _texts_in_yaml(value):  # where a text alone will not do, it is read as YAML
            is_name = _DOTTED.fullmatch(text) and _exists(text)
            if text == "class_path" or (hint is not Any and (is_name or Path(text).is_file())):
                yield place, value if text == "class_path" else text


def _texts_in_yaml(value: str) -> Iterator[str]:
    """All texts in a text of YAML, keys among them; the text itself if it is none."""
    try:
        pending = [yaml.safe_load(value)]
    except (yaml.YAMLError, RecursionError, ValueError):
        pending = [value]
    seen: set[int] = set()  # an alias is the object that it stands for
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, (Mapping, list)) and id(part) not in seen:
            seen.add(id(part))
            pending += [*part, *part.values()] if isinstance(part, Mapping) else part


def _is_allowed(place: Place, name: str, model: LightningModule, own: Mapping[Place, str]) -> bool:
    if own.get(place) == name:
        return True
    found = _imported(name)
    if isinstance(found, type) and issubclass(found, nn.Module):
        if any(type(module) is found for module in model.modules()):
            return True
        packages = (*PACKAGES, type(model).__module__.partition(".")[0])
        return any(f"{found.__module__}.".startswith(f"{package}.") for package in packages)
    home = getattr(found, "__module__", None) or ""
    return isinstance(found, (types.FunctionType, types.BuiltinFunctionType)) and (
        name.startswith("torch.nn.") and home.partition(".")[0] == "torch"
    )


def _is_text(hint: Any) -> bool:
    """Whether a parameter takes a text as it is, by its annotation."""
    if hint is Any or get_origin(hint) is Literal:
        return True
    if isinstance(hint, type) and not get_args(hint):
        return issubclass(hint, _TEXTS)
    origin = get_origin(hint)
    is_container = isinstance(origin, type) and issubclass(origin, (Sequence, Mapping, set, frozenset))
    if origin in (Union, types.UnionType) or is_container:
        return all(argument is Ellipsis or _is_text(argument) for argument in get_args(hint))
    return False


def _hints(made: Any) -> dict[str, Any]:
    """Annotations of what a class or function takes. ``None`` for all that are not known."""
    if made is None:
        return _Unknown()
    function = made.__init__ if inspect.isclass(made) else made
    try:
        hints = get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError):
        return _Unknown()
    variadic = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {name: hints.get(name, Any) for name in parameters}
    return _Unknown(known) if variadic else known


class _Unknown(dict[str, Any]):
    """What is not here may be of any type, also a function."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key)


def _strings(place: Place, value: Any) -> Iterator[tuple[Place, str]]:
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _strings((*place, key), part)
    elif isinstance(value, (list, tuple)):
        for number, part in enumerate(value):
            yield from _strings((*place, number), part)


def _imported(name: str) -> Any:
    """What a dotted name stands for, if the module that has it is imported already."""
    module, _, attribute = name.rpartition(".")
    found = sys.modules.get(module)
    return None if found is None else vars(found).get(attribute)


def _exists(name: str) -> bool:
    """Whether a dotted name begins with a package that could be imported."""
    top = name.partition(".")[0]
    try:
        return top in sys.modules or importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False
