"""Merging rules by name, in one line: ``task_arithmetic(scale=[0.2, 0.3]), regmean, chain``."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import product
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from com_lightning import methods as rules
from com_lightning.errors import MergeError
from com_lightning.methods import MergingMethod

NAMES: dict[str, tuple[type[MergingMethod], dict[str, Any]]] = {
    "average": (rules.Average, {}),
    "breadcrumbs": (rules.Breadcrumbs, {}),
    "chain": (rules.ChainOfMerges, {}),
    "combined": (rules.Combined, {}),
    "dare": (rules.DARE, {}),
    "della": (rules.DELLA, {}),
    "iso_c": (rules.IsoC, {}),
    "iso_cts": (rules.IsoCTS, {}),
    "karcher_mean": (rules.KarcherMean, {}),
    "one_sided": (rules.ChainOfMerges, {"target": "merged"}),
    "refitted": (rules.Refitted, {}),
    "regmean": (rules.RegMean, {}),
    "regmean_plus_plus": (rules.RegMeanPlusPlus, {}),
    "slerp": (rules.SLERP, {}),
    "task_arithmetic": (rules.TaskArithmetic, {}),
    "ties": (rules.TIES, {}),
    "tsvm": (rules.TSVM, {}),
    "wudi": (rules.WUDI, {}),
    "lot": (rules.LOT, {}),
    "fisher": (rules.Fisher, {}),
    "ada_merging": (rules.AdaMerging, {}),
}
"""Name -> class, and the settings that the name stands for."""
_ALIASES = {"chainofmerges": "chain", "karcher": "karcher_mean"}


@dataclass(frozen=True)
class Setting:
    """A rule with all its settings.

    Attributes:
        name: the rule as it was listed; the settings of one grid share it.
        label: the rule and what was set, on one line.
        method: the rule itself.
    """

    name: str
    label: str
    method: MergingMethod


def read_methods(listed: str | Sequence[Any]) -> list[Setting]:
    """Return the rules of a list, in order. A list of values in place of one is a grid: one setting for each value.

    Args:
        listed: names with their settings, separated by commas: case and underscores do not matter, text needs no
            quotes, and a class of your own is named by its path (``my.Rule(a=1)``). Or a sequence of such texts,
            dictionaries with ``class_path`` and ``init_args``, and rules. Nothing in a text is executed.

    Raises:
        MergeError: with all problems at once.

    Example::

        >>> [setting.label for setting in read_methods("ties(density=[0.1, 0.2]), RegMean, chain(target=merged)")]
        ['ties(density=0.1)', 'ties(density=0.2)', 'regmean', 'chain(target=merged)']
    """
    found: list[Setting] = []
    problems: list[str] = []
    entries: list[Any] = []
    for entry in [listed] if isinstance(listed, (str, Mapping, MergingMethod)) else listed:
        try:
            entries += _parse(entry) if isinstance(entry, str) else [entry]
        except _Wrong as wrong:
            problems.append(f"methods: {wrong}")
    for entry in entries:
        try:
            found += _settings(entry)
        except _Wrong as wrong:
            problems.append(f"methods: {wrong}")
    labels = [setting.label for setting in found]
    problems += [f"methods: {label} is listed twice" for label in dict.fromkeys(labels) if labels.count(label) > 1]
    if not found and not problems:
        problems.append(f"methods: none is given; known are {', '.join(NAMES)}")
    if problems:
        raise MergeError(problems)
    return found


class _Wrong(Exception):
    """What is wrong with an entry."""


@dataclass(frozen=True)
class _Variant:
    """One point of a grid: how it is told, and how jsonargparse has it."""

    label: str
    config: Any


def _settings(entry: Any) -> list[Setting]:
    if isinstance(entry, MergingMethod):
        name = _name_of(type(entry))
        given = {k: v for k, v in entry.describe().items() if k != "class" and v is not None}
        label = _label(name, {k: _text(v) for k, v in given.items() if v != _defaults(type(entry)).get(k, v)})
        return [Setting(label, label, entry)]
    name, variants = _variants(entry)
    return [Setting(name, variant.label, _made(variant)) for variant in variants]


def _parse(text: str) -> list[Any]:
    """Text as names (strings) and dictionaries."""
    try:
        # Lines may be broken anywhere.
        tree = ast.parse(f"[{text.replace('++', '_plus_plus')}\n]", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        told = error.msg if isinstance(error, SyntaxError) else str(error)
        raise _Wrong(f"'{text[:200]}' cannot be read ({told}); {_USAGE}") from error
    if not isinstance(tree, ast.List):
        raise _Wrong(f"'{text[:200]}' cannot be read; {_USAGE}")
    nodes = [part for node in tree.elts for part in (node.elts if isinstance(node, ast.List) else [node])]
    return [_called(node) for node in nodes]


_USAGE = 'write names with settings, separated by commas: "task_arithmetic(scale=[0.2,0.3]),regmean,chain"'


def _called(node: ast.expr) -> dict[str, Any]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # in quotes, or from a list of YAML
        return _one(node.value)
    named = node.func if isinstance(node, ast.Call) else node
    path = _dotted(named)
    if path is None:
        raise _Wrong(f"'{ast.unparse(node)}' is no method; {_USAGE}")
    if not isinstance(node, ast.Call):
        return {"class_path": path, "init_args": {}}
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise _Wrong(f"'{ast.unparse(node)}': settings have a name, as in {path}(setting=value)")
    return {"class_path": path, "init_args": {str(k.arg): _value(k.value) for k in node.keywords}}


def _one(text: str) -> dict[str, Any]:
    parsed = _parse(text)
    if len(parsed) != 1:
        raise _Wrong(f"'{text}' has to be one method")
    one: dict[str, Any] = parsed[0]
    return one


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call):
        return _called(node)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_value(part) for part in node.elts]
    if (path := _dotted(node)) is not None:
        return path
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise _Wrong(f"'{ast.unparse(node)}' is no value: numbers, text, lists and dictionaries are") from error


def _dotted(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (before := _dotted(node.value)) is not None:
        return f"{before}.{node.attr}"
    return None


def _variants(spec: Any) -> tuple[str, list[_Variant]]:
    """An entry as one line, and all points of the grid that it spans, also within rules that a rule takes."""
    if isinstance(spec, str):
        spec = _one(spec)
    if not isinstance(spec, Mapping) or "class_path" not in spec or set(spec) - {"class_path", "init_args"}:
        raise _Wrong(f"{spec!r} is no method; give its name, or a dictionary with class_path and init_args")
    name, kind, preset = _lookup(str(spec["class_path"]))
    given = dict(spec.get("init_args") or {})
    known = [parameter for parameter in inspect.signature(kind).parameters if parameter not in preset]
    if unknown := [own for own in given if own not in known]:
        raise _Wrong(f"{name} has no setting '{unknown[0]}'{_meant(unknown[0], known)} It has {', '.join(known)}")
    hints = get_type_hints(kind.__init__)
    options: list[list[_Variant]] = []
    for own, value in given.items():
        values = value if isinstance(value, (list, tuple)) and not _takes_lists(hints.get(own)) else [value]
        if not values:
            raise _Wrong(f"{name}: {own} is an empty list")
        if hints.get(own) is MergingMethod:
            options.append([variant for part in values for variant in _variants(part)[1]])
        else:
            options.append([_Variant(_text(part), part) for part in values])
    result = []
    for chosen in product(*options):
        label = _label(name, {own: variant.label for own, variant in zip(given, chosen)})
        arguments = {own: variant.config for own, variant in zip(given, chosen)}
        path = f"{kind.__module__}.{kind.__qualname__}"
        result.append(_Variant(label, {"class_path": path, "init_args": {**preset, **arguments}}))
    told = {own: [variant.label for variant in some] for own, some in zip(given, options)}
    return _label(name, {k: f"[{', '.join(v)}]" if len(v) > 1 else v[0] for k, v in told.items()}), result


def _lookup(path: str) -> tuple[str, type[MergingMethod], dict[str, Any]]:
    own = path.rpartition(".")[2] if path.startswith("com_lightning.") else path
    plain = own.lower().replace("_", "")
    plain = _ALIASES.get(plain, plain)
    for name, (kind, preset) in NAMES.items():
        if plain.replace("_", "") == name.replace("_", ""):
            return name, kind, preset
    module, _, last = path.rpartition(".")
    if module:
        try:
            kind = getattr(import_module(module), last)
        except (ImportError, AttributeError, ValueError) as error:
            raise _Wrong(f"{path} cannot be imported ({error})") from error
        if isinstance(kind, type) and issubclass(kind, MergingMethod):
            return last, kind, {}
        raise _Wrong(f"{path} is no MergingMethod")
    raise _Wrong(f"'{path}' is no method{_meant(path, NAMES)} Known are {', '.join(NAMES)}")


def _made(variant: _Variant) -> MergingMethod:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--method", type=MergingMethod)
    try:
        config = parser.parse_object({"method": variant.config})
        made = (parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes)(config).method
    except (ArgumentError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "class_path" not in line]
        told = " ".join(line for line in lines if line and line != 'Parser key "method":')
        raise _Wrong(f"{variant.label}: {told.replace('Parser key ', '').replace(chr(34), '')}") from error
    assert isinstance(made, MergingMethod)
    return made


def _name_of(kind: type) -> str:
    return next((name for name, (own, preset) in NAMES.items() if own is kind and not preset), kind.__name__)


def _defaults(kind: type) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(kind).parameters.items()}


def _takes_lists(hint: Any) -> bool:
    if get_origin(hint) is Union:
        return any(map(_takes_lists, get_args(hint)))
    kind = get_origin(hint) or hint
    return isinstance(kind, type) and issubclass(kind, Sequence) and kind is not str


def _label(name: str, given: Mapping[str, str]) -> str:
    return f"{name}({', '.join(f'{own}={text}' for own, text in given.items())})" if given else name


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _meant(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word.lower(), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else "."
