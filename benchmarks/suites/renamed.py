"""Options that have been renamed or removed since results were measured, so that old results keep their meaning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

REMOVED = ("ridge=held_out", "balance=mean", "perturbed_copies=")
"""Parts of a method's name that stand for options which have been removed since."""
_TEXTS = {"balance=worst": "balance=True", "refit_private=": "refit_heads="}
_NAMES = {"refit_private": "refit_heads"}
_VALUES: Mapping[tuple[str, Any], Any] = {("balance", "worst"): True, ("balance", None): False}
_CHANGED_DEFAULTS = ("normalize", "refit_heads")
"""Options of the chain that had another default when some results were measured."""
_WITHOUT_EFFECT: Mapping[str, Any] = {"perturbed_copies": 0, "enough": None}
"""Removed options -> the value that changed nothing."""


def changed_since(rule: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be said in the name of a method, because the rule's defaults have changed since it was measured.

    Args:
        rule: name of the rule.
        settings: the settings that it was measured with, see :func:`current_settings`.

    Returns:
        Option -> value, also of those whose value is a default today.

    Example::

        >>> changed_since("chain", {"normalize": True, "refit_heads": False, "ridge": 0.01})
        {'normalize': True, 'refit_heads': False}
    """
    names = _CHANGED_DEFAULTS if rule in ("chain", "one_sided") else ()
    return {name: settings[name] for name in names if name in settings}


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
    result: dict[str, Any] = {}
    if settings.get("class") == "ChainOfMerges" and not {"refit_private", "refit_heads"} & set(settings):
        result["refit_heads"] = False  # results older than the option
    for name, value in settings.items():
        if name in _WITHOUT_EFFECT and value == _WITHOUT_EFFECT[name]:
            continue
        if isinstance(value, Mapping):
            value = current_settings(value)
        elif isinstance(value, (str, type(None))):
            value = _VALUES.get((name, value), value)
        result[_NAMES.get(name, name)] = value
    return result
