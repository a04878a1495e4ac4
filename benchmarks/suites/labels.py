"""Short names of methods for pictures and overviews."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.suites.calls import Call
from benchmarks.suites.rules import NAMES

_RULES: Mapping[str, str] = {
    "ada_merging": "AdaMerging",
    "breadcrumbs": "Model Breadcrumbs",
    "dare": "DARE",
    "della": "DELLA",
    "fisher": "Fisher",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "karcher_mean": "Karcher mean",
    "lot": "LOT Merging",
    "one_sided": "chain, one-sided",
    "regmean": "RegMean",
    "regmean_plus_plus": "RegMean++",
    "task_arithmetic": "task arithmetic",
    "ties": "TIES",
    "tsvm": "TSV-M",
    "wudi": "WUDI",
}
_OPTIONS: Mapping[tuple[str, Any], str] = {
    ("normalize", True): "rows by direction",
    ("normalize", False): "rows by size",
    ("refit_heads", True): "heads refitted",
    ("refit_heads", False): "experts' heads",
    ("residual", False): "no residual",
    ("sensitivity", "probabilities"): "sensitivity",
    ("private_biases", True): "private biases",
    ("private_biases", False): "shared biases",
    ("balance", True): "balance",
    ("balance", False): "no balance",
    ("data", False): "SVD",
}
BASE = Call("task_arithmetic", {"scale": 0})
"""The base, as a rule: task arithmetic at a scale of 0."""


def short(name: str) -> str:
    """The short name of a method.

    Args:
        name: its canonical name, or the label of its row. What is not the name of a rule is returned as it is.

    Example::

        >>> short("chain(residual=False, balance=True)")
        'chain, no residual, balance'
        >>> short("refitted(method=ties(density=val))")
        'TIES, tuned, heads refitted'
    """
    text, comma, rest = name.partition(", samples of ")
    return _short(Call.parse(text)) + comma + rest if text.partition("(")[0] in NAMES else name


def _short(call: Call) -> str:
    if call == BASE:
        return "base"
    options = dict(call.options)
    if call.rule in ("refitted", "task_adapters"):
        inner = options.pop("method", "chain")
        parts = [_short(inner if isinstance(inner, Call) else Call(inner))]
    else:
        parts = [_RULES.get(call.rule, call.rule.replace("_", " "))]
    if call.rule == "refitted":
        options["refit_heads"] = True
    if call.rule == "task_adapters" and options.get("data", True):
        parts.append("solved")
    tuned = [name for name, value in options.items() if value == "val" or isinstance(value, list)]
    parts += ["tuned"] * bool(tuned)
    parts += [_option(name, value) for name, value in options.items() if name not in tuned]
    return ", ".join(parts)


def _option(name: str, value: Any) -> str:
    if isinstance(value, Call):
        value = _short(value)
    elif isinstance(value, str) and value in _RULES:
        value = _RULES[value]
    return _OPTIONS.get((name, value), f"{name.removeprefix('task_').replace('_', ' ')} {value}")
