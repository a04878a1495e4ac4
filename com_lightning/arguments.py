"""Arguments are checked by their annotations, so that no constructor and no rule meets a value that it cannot compare.

A configuration can give any value: jsonargparse lets ``null`` through for a number or a flag, and Python checks
nothing. Ranges of values are checked by whoever takes them, in ``problems``.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from os import PathLike
from reprlib import repr as shortened
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy

from com_lightning.errors import MergeError
from com_lightning.weak_cache import weak_cache

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(function: Function) -> Function:
    """Return a function or an ``__init__`` that raises a MergeError for arguments that do not fit their annotations.

    An argument that is the default is right.

    Example::

        >>> @checked
        ... def scaled(value: float, ridge: float = 0.1) -> float:
        ...     return value / ridge
        >>> scaled(1, ridge=None)
        Traceback (most recent call last):
        ...
        com_lightning.errors.MergeError: one problem:
          1. ridge: must be a number, got None
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # too few arguments or too many: Python says which
            return function(*args, **kwargs)
        if problems := argument_problems(function, given):
            raise MergeError(problems)
        return function(*args, **kwargs)

    return call  # type: ignore[return-value]


def argument_problems(function: Callable[..., Any], given: Mapping[str, Any]) -> list[str]:
    """Compare values with the annotations of a function.

    Args:
        function: the function.
        given: name of an argument -> its value.

    Returns:
        One sentence for each value that does not fit.
    """
    parameters, hints = inspect.signature(function).parameters, _hints(function)
    return [
        f"{name}: must be {_words(hints[name])}, got {shortened(value)}"
        for name, value in given.items()
        if name in hints and value is not parameters[name].default and not _fits(value, hints[name])
    ]


@weak_cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = get_type_hints(function)
    except (NameError, TypeError):  # a user's own rule may name types that only type checkers know
        return {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [name for name, p in inspect.signature(function).parameters.items() if p.kind not in variadic]
    return {name: hints[name] for name in named if name in hints}


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


_BASIC: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    type(None): ("None", lambda value: value is None),
    # 1 and 0 say what is meant. A text does not: "false" would count as true.
    bool: (
        "true or false",
        lambda value: isinstance(value, numpy.bool_) or (isinstance(value, Integral) and value in (0, 1)),
    ),
    int: ("a whole number", _is_whole),
    float: ("a number", lambda value: isinstance(value, Real) and not isinstance(value, bool)),
    str: ("text", lambda value: isinstance(value, (str, PathLike))),
}
"""Type -> its name in messages, and whether a value is of it."""


def _fits(value: Any, hint: Any, inside: bool = False) -> bool:
    # Experts and datamodules are inside of containers and unions. Whoever reads them says best what is wrong with one.
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument, True) for argument in arguments)
    if origin is Literal:
        return any(value is choice or (isinstance(value, str) and value == choice) for choice in arguments)
    if hint in _BASIC:
        return _BASIC[hint][1](value)
    if origin is list:
        return isinstance(value, (list, tuple, set)) and all(_fits(part, arguments[0], True) for part in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(part, arguments[1], True) for part in value.values())
    return not isinstance(hint, type) or (value is not None if inside else isinstance(value, hint))


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, arguments))
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if hint in _BASIC:
        return _BASIC[hint][0]
    if origin is list:
        return f"a list (each entry {_words(arguments[0])})"
    if origin in (dict, Mapping):
        return f"a dictionary (each value {_words(arguments[1])})"
    return f"a {getattr(hint, '__name__', hint)}"
