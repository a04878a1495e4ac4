"""Names of rules as calls: ``refitted(method=ties(density=0.2))`` as text and as a tree."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Call:
    """The name of a rule and its settings, as they are written in lists and tables.

    Attributes:
        rule: name of the rule.
        options: setting -> value: a number, a text, a rule within the rule, or a list of values, which makes a grid.
    """

    rule: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Call:
        """Read a call. Text needs no quotes, and nothing is executed.

        Raises:
            SyntaxError: if the text is no expression.
            ValueError: if it is neither a name nor a call with named settings.

        Example::

            >>> Call.parse("chain(target=merged, ridge=[0.1, 1])").options
            {'target': 'merged', 'ridge': [0.1, 1]}
        """
        return _call(ast.parse(text.strip(), mode="eval").body)

    @property
    def grid(self) -> list[str]:
        """The settings with a list of values."""
        return [name for name, value in self.options.items() if isinstance(value, list)]

    def __str__(self) -> str:
        """Return the text, without quotes."""
        options = ", ".join(f"{name}={_text(value)}" for name, value in self.options.items())
        return f"{self.rule}({options})" if options else self.rule


def _call(node: ast.expr) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError("write a name, or name(setting=value)")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError("settings are written as name=value")
    return Call(node.func.id, {str(keyword.arg): _value(keyword.value) for keyword in node.keywords})


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # text without quotes
        return node.id
    if isinstance(node, ast.Call):
        return _call(node)
    return [_value(element) for element in node.elts] if isinstance(node, ast.List) else ast.literal_eval(node)


def _text(value: Any) -> str:
    return f"[{', '.join(map(_text, value))}]" if isinstance(value, list) else str(value)
