"""Docstrings as Griffe reads them: Sphinx roles become links, or code where their target has no page; ``Example::``
becomes a block of code, and what is told of two arguments at once an entry for each."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from griffe import Extension, NameResolutionError, Object

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
EXAMPLE = re.compile(r"^Example::\n\n((?:(?: {4}.*)?\n?)+)", re.MULTILINE)
PAIR = re.compile(r"^ {4}(\w+), (\w[\w, ]*): (.*(?:\n {8}.*)*)", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = PAIR.sub(_entries, EXAMPLE.sub(_block, obj.docstring.value))
            obj.docstring.value = ROLE.sub(lambda role: _link(obj, role[1], role[2]), text)


def _block(example: re.Match[str]) -> str:
    code = textwrap.dedent(example[1]).strip()
    return f"```{'pycon' if code.startswith('>>>') else 'python'}\n{code}\n```\n\n"


def _entries(pair: re.Match[str]) -> str:
    others = [f"    {name}: see ``{pair[1]}``." for name in pair[2].split(", ")]
    return "\n".join([f"    {pair[1]}: {pair[3]}", *others])


def _link(obj: Object, short: str, name: str) -> str:
    shown = name.rpartition(".")[2] if short else name
    try:
        path = name if name.startswith("com_lightning.") else obj.resolve(name)
    except NameResolutionError:
        return f"`{shown}`"
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
