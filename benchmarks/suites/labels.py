"""Short names of methods for pictures and overviews."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from benchmarks.suites.calls import Call
from benchmarks.suites.rules import NAMES

_RULES: Mapping[str, str] = {
    "actmat": "ACTMat",
    "ada_merging": "AdaMerging",
    "breadcrumbs": "Model Breadcrumbs",
    "dare": "DARE",
    "della": "DELLA",
    "fisher": "Fisher",
    "iso_c": "Iso-C",
    "iso_cts": "Iso-CTS",
    "karcher_mean": "Karcher mean",
    "larv": "LARV",
    "lot": "LOT Merging",
    "one_sided": "chain, one-sided",
    "regmean": "RegMean",
    "regmean_plus_plus": "RegMean++",
    "svc": "SVC",
    "tact": "TACT",
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


def short(name: str, ranks: bool = True) -> str:
    """The short name of a method.

    Args:
        name: its canonical name, or the label of its row. What is not the name of a rule is returned as it is.
        ranks: whether a rule whose corrections have a rank is named with it, also if that is the default.

    Example::

        >>> short("chain(residual=False, balance=True)")
        'chain, no residual, balance'
        >>> short("refitted(method=ties(density=val))")
        'TIES, tuned, heads refitted'
    """
    text, comma, rest = name.partition(", samples of ")
    return _short(Call.parse(text), ranks) + comma + rest if text.partition("(")[0] in NAMES else name


def with_rank(call: Call) -> Mapping[str, Any]:
    """The settings of a call, with the rank of ``task_adapters`` also where it is the default."""
    if call.rule != "task_adapters":
        return call.options
    return {"rank": signature(NAMES[call.rule]).parameters["rank"].default, **call.options}


def _short(call: Call, ranks: bool = True) -> str:
    if call == BASE:
        return "base"
    options = dict(with_rank(call) if ranks else call.options)
    if call.rule in ("larv", "refitted", "svc", "task_adapters"):  # on top of another rule
        inner = options.pop("method", "chain")
        parts = [_short(inner if isinstance(inner, Call) else Call(inner), ranks)]
        parts += [_RULES[call.rule]] if call.rule in _RULES else []
    else:
        parts = [_RULES.get(call.rule, call.rule.replace("_", " "))]
    if call.rule == "refitted":
        options["refit_heads"] = True
    if call.rule == "task_adapters" and options.get("data", True):
        parts.append("corrections")
    tuned = [name for name, value in options.items() if value == "val" or isinstance(value, list)]
    parts += ["tuned"] * bool(tuned)
    # How corrections are made comes before their rank.
    options = dict(sorted(options.items(), key=lambda option: option[0] != "data"))
    parts += [_option(name, value) for name, value in options.items() if name not in tuned]
    return ", ".join(parts)


def _option(name: str, value: Any) -> str:
    if isinstance(value, Call):
        value = _short(value)
    elif isinstance(value, str) and value in _RULES:
        value = _RULES[value]
    return _OPTIONS.get((name, value), f"{name.removeprefix('task_').replace('_', ' ')} {value}")
