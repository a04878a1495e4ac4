"""Methods by name, as the command line and the tables have them.

A method is a short name from :data:`METHODS`, or a call in Python's notation with plain values, of a class of
com_lightning (``ChainOfMerges(ridge=0.1)``) or of any module (``my_package.rules.MyRule(strength=2)``).
"""

from __future__ import annotations

import ast
from importlib import import_module
from typing import Any

import com_lightning
from com_lightning import MergingMethod

METHODS = {
    "average": "Average()",
    "regmean": "RegMean()",
    "one-sided": "ChainOfMerges(target='merged')",
    "two-sided": "ChainOfMerges()",
}
"""Short name -> what it stands for; all of these are run by default."""


def make_method(name: str) -> MergingMethod:
    """The method of a name.

    Raises:
        ValueError: if it is no name and no call of a method.

    Example::

        >>> make_method("one-sided").rule.target, make_method("ChainOfMerges(ridge=0.1)").rule.ridge
        ('merged', 0.1)
    """
    said = METHODS.get(name, name)
    try:
        call: Any = ast.parse(said, mode="eval").body
        if not isinstance(call, ast.Call):
            call = ast.Call(call, [], [])
        path = ast.unparse(call.func)
        arguments = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        module, _, cls = path.rpartition(".")
        method = getattr(import_module(module) if module else com_lightning, cls)(**arguments)
    except (SyntaxError, ValueError, AttributeError, ImportError, TypeError) as error:
        raise ValueError(
            f"method '{name}': give one of {', '.join(METHODS)}, or a call such as ChainOfMerges(ridge=0.1) or "
            f"my_package.MyRule(strength=2), with keywords alone ({error})"
        ) from error
    if call.args or not isinstance(method, MergingMethod):
        raise ValueError(f"method '{name}': arguments need their names, and the class must be a MergingMethod")
    return method
