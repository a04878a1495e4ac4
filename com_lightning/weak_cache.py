"""A cache that does not keep what it was asked about alive."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

T = TypeVar("T")


def weak_cache(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Let a function of one class or function remember its results, as long as that class or function lives.

    Classes may be made while a program runs: a trainer's view for a task, a parametrised layer. Through its properties
    such a class refers to a whole merge with its data, so that :func:`functools.cache` would keep all of it forever.

    Returns:
        The function with a memory.

    Example::

        >>> weak_cache(lambda cls: cls.__name__)(int)
        'int'
    """
    results: WeakKeyDictionary[Any, T] = WeakKeyDictionary()

    @wraps(function)
    def cached(key: Any) -> T:
        if key not in results:
            results[key] = function(key)
        return results[key]

    return cached
