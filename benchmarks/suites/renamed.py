"""Options that have been renamed or removed since results were measured, so that old results keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REMOVED = ("ridge=held_out", "balance=mean", "perturbed_copies=")
"""Parts of a method's name that stand for options which have been removed since."""
_TEXTS = {"balance=worst": "balance=True", "refit_private=": "refit_heads="}
_NAMES = {"refit_private": "refit_heads"}
_VALUES: Mapping[tuple[str, Any], Any] = {("balance", "worst"): True, ("balance", None): False}
_WITHOUT_EFFECT: Mapping[str, Any] = {"perturbed_copies": 0, "enough": None}
"""Removed options -> the value that changed nothing."""


def is_removed(method: str) -> bool:
    """Whether a method was measured with options that have been removed since."""
    return any(text in method for text in REMOVED)


def current_name(method: str) -> str:
    """The name of a method with today's names of its options.

    Example::

        >>> current_name("chain(refit_private=True, balance=worst)")
        'chain(refit_heads=True, balance=True)'
    """
    for old, new in _TEXTS.items():
        method = method.replace(old, new)
    return method


def current_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a method with today's names; removed options that had no effect are left out.

    Example::

        >>> current_settings({"refit_private": True, "balance": None, "perturbed_copies": 0, "enough": None})
        {'refit_heads': True, 'balance': False}
    """
    result = {}
    for name, value in settings.items():
        if name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name]:
            continue
        if isinstance(value, Mapping):
            value = current_settings(value)
        elif isinstance(value, (str, type(None))):
            value = _VALUES.get((name, value), value)
        result[_NAMES.get(name, name)] = value
    return result
