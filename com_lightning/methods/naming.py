"""Rules by name: what a report, a configuration and Python call them is the same text."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from typing import Any

from com_lightning.errors import MergeError
from com_lightning.methods.base import MergingMethod

Rule = MergingMethod | type[MergingMethod] | str
"""A rule; its class, for its default settings; or the text that a report shows."""


def as_rule(given: Rule) -> MergingMethod:
    """Return the rule that is meant.

    Args:
        given: a rule, its class, or its text: a name, with settings or without. Upper and lower case, underscores and
            hyphens in a name do not matter.

    Returns:
        The rule.

    Raises:
        MergeError: if it is none, naming the nearest one.

    Example::

        >>> as_rule("ties"), as_rule("TIES(density=0.1)"), as_rule("task_arithmetic")
        (TIES(), TIES(density=0.1), TaskArithmetic())
        >>> as_rule("Refitted(method=TIES())")
        Refitted(method=TIES())
    """
    if isinstance(given, MergingMethod):
        return given
    if isinstance(given, type) and issubclass(given, MergingMethod) and not inspect.isabstract(given):
        return _made(given, {})
    if not isinstance(given, str):
        raise MergeError([f"method: must be a rule such as TIES(), its class or its name, got {given!r}"])
    no_rule = MergeError([f"method: {given!r} is no rule; write it as TIES or as TIES(density=0.2)"])
    name, bracket, settings = given.strip().partition("(")
    name = name.replace("-", "_").replace("++", "PlusPlus")
    try:
        return _of(ast.parse(name + bracket + settings, mode="eval").body, no_rule)
    except SyntaxError as error:
        raise no_rule from error


def rules() -> dict[str, type[MergingMethod]]:
    """Name -> class of all rules of this package, and of those of yours that are imported."""
    named: list[str] = importlib.import_module("com_lightning.methods").__all__
    pending: list[type[MergingMethod]] = [*MergingMethod.__subclasses__()]
    found = dict[str, type[MergingMethod]]()
    while pending:
        rule = pending.pop()
        pending += rule.__subclasses__()
        is_ours = rule.__module__.startswith("com_lightning.")
        if not inspect.isabstract(rule) and (rule.__name__ in named or not is_ours):
            found[rule.__name__] = rule
    return dict(sorted(found.items()))


def _of(node: ast.expr, no_rule: MergeError) -> MergingMethod:
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    if not isinstance(call.func, ast.Name) or call.args:
        raise no_rule
    known = {name.lower(): rule for name, rule in rules().items()}
    name = call.func.id.replace("_", "").lower()
    if name not in known:
        nearest = difflib.get_close_matches(name, known, 1, 0.5)
        hint = f"did you mean {known[nearest[0]].__name__}?" if nearest else f"there are {', '.join(rules())}"
        raise MergeError([f"method: no rule is called {call.func.id}; {hint}"])
    settings: dict[str, Any] = {}
    for keyword in call.keywords:
        try:
            is_rule = isinstance(keyword.value, ast.Call)
            value = _of(keyword.value, no_rule) if is_rule else ast.literal_eval(keyword.value)
        except ValueError as error:
            raise (error if isinstance(error, MergeError) else no_rule) from error
        settings[str(keyword.arg)] = value
    return _made(known[name], settings)


def _made(rule: type[MergingMethod], settings: dict[str, Any]) -> MergingMethod:
    known = inspect.signature(rule).parameters
    if unknown := [name for name in settings if name not in known]:
        raise MergeError([f"method: {rule.__name__} has no {', '.join(unknown)}; it has {', '.join(known)}"])
    needed = [name for name, p in known.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if missing := [name for name in needed if name not in settings]:
        example = f"{rule.__name__}({', '.join(f'{name}=...' for name in missing)})"
        raise MergeError([f"method: {rule.__name__} needs {' and '.join(missing)}: {example}"])
    return rule(**settings)
