"""The rules that a suite is measured with, and the names that results know them by."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from itertools import product
from typing import Any

import com_lightning as com
from benchmarks.suites.calls import Call
from benchmarks.suites.renamed import changed_since, current_name, is_removed
from benchmarks.suites.suite import Suite
from com_lightning import MergeError, MergingMethod

NAMES: dict[str, Callable[..., MergingMethod]] = {
    "actmat": com.ACTMat,
    "ada_merging": com.AdaMerging,
    "average": com.Average,
    "breadcrumbs": com.Breadcrumbs,
    "chain": com.ChainOfMerges,
    "combined": com.Combined,
    "dare": com.DARE,
    "della": com.DELLA,
    "esm": com.ESM,
    "featcal": com.FeatCal,
    "fisher": com.Fisher,
    "iso_c": com.IsoC,
    "iso_cts": com.IsoCTS,
    "karcher_mean": com.KarcherMean,
    "larv": com.LARV,
    "lot": com.LOT,
    "one_sided": partial(com.ChainOfMerges, target="merged", normalize=True, refit_heads=False),
    "refitted": com.Refitted,
    "regmean": com.RegMean,
    "regmean_plus_plus": com.RegMeanPlusPlus,
    "slerp": com.SLERP,
    "task_adapters": com.TaskAdapters,
    "svc": com.SVC,
    "tact": com.TACT,
    "task_arithmetic": com.TaskArithmetic,
    "ties": com.TIES,
    "tsvm": com.TSVM,
    "wudi": com.WUDI,
}
"""Name -> rule."""
RULES = (
    "average",
    "task_arithmetic",
    "task_arithmetic(scale=[0.05,0.1,0.15,0.2,0.25,0.3,0.4,0.5])",
    "ties",
    "ties(density=[0.1,0.2,0.3],scale=[0.5,1,1.5,2,2.5])",
    "dare",
    "dare(drop_rate=[0.5,0.9],scale=[0.05,0.1,0.2,0.3])",
    "breadcrumbs",
    "breadcrumbs(density=[0.1,0.15,0.3],scale=[0.1,0.2,0.3,0.5])",
    "della",
    "della(drop_rate=[0.3,0.5,0.7],scale=[0.5,0.8,1.1,1.5])",
    "karcher_mean",
    "tsvm",
    "tsvm(scale=[0.4,0.6,0.8,1,1.2])",
    "iso_c",
    "iso_c(scale=[0.4,0.7,1,1.3,1.6,2])",
    "iso_cts",
    "iso_cts(scale=[0.4,0.7,1,1.3,1.6,2])",
    "wudi",
    "actmat",
    "tact",
    "tact(density=[0.1,0.2,0.3,0.5,0.7])",
    "svc(method=task_arithmetic)",
    "svc(method=task_arithmetic,floor=[0.1,0.2,0.3,0.5,1])",
    "svc(method=tsvm,floor=1)",
    "larv(method=task_arithmetic)",
    "larv(method=tsvm)",
    "larv(method=iso_c)",
    "larv(method=tsvm,strength=[0.1,0.2,0.3,0.5])",
    "regmean",
    "regmean(ridge=[0.001,0.01,0.1])",
    "regmean_plus_plus",
    "regmean_plus_plus(ridge=[0.001,0.01,0.1])",
    "one_sided",
    "one_sided(ridge=[0.001,0.01,0.1])",
    "chain",
    "chain(ridge=[0.001,0.01,0.1])",
    "lot",
    "lot(ridge=[0.00001,0.0001,0.001,0.01])",
    "esm",
    "esm(scale=[0.5,1,1.5,2,3],polarize=[True,False])",
    "featcal",
    "featcal(ridge=[0.005,0.05,0.5])",
    "fisher",
    "ada_merging",
)
"""Each rule with its paper's defaults, and with a tuned strength or ridge if its paper tunes one or it matters."""


@dataclass(frozen=True)
class Setting:
    """A rule with all its settings.

    Attributes:
        name: the rule as it was listed, in its :func:`canonical` form. All settings of one grid share it.
        label: the rule and its settings.
        method: the rule.
    """

    name: str
    label: str
    method: MergingMethod


def read_settings(listed: str) -> list[Setting]:
    """Read a rule with its settings, like a call in Python; text needs no quotes, and a list of values makes a grid.

    Args:
        listed: a name, or a name called with settings. A rule within a rule is written in the same way. Old names of
            options are understood. Nothing is executed.

    Returns:
        All settings of the grid.

    Raises:
        MergeError: if there is no such rule, or it does not take these settings.

    Example::

        >>> [setting.label for setting in read_settings("ties(density=[0.1,0.3])")]
        ['ties(density=0.1)', 'ties(density=0.3)']
    """
    listed = current_name(listed)
    if is_removed(listed):
        raise MergeError([f"{listed}: this option has been removed"])
    try:
        call = Call.parse(listed)
        grid = [value if isinstance(value, list) else [value] for value in call.options.values()]
        points = [Call(call.rule, dict(zip(call.options, values))) for values in product(*grid)]
        methods = [_make(point) for point in points]
        return [Setting(str(_canonical(call)), str(_canonical(p)), method) for p, method in zip(points, methods)]
    except MergeError:
        raise
    except (SyntaxError, TypeError, ValueError) as error:
        raise MergeError([f"{listed}: {error}"]) from error


def canonical(name: str, settings: Mapping[str, Any] | None = None) -> str:
    """The one name of a method: without settings that are defaults today, and in the order of the rule's signature.

    Args:
        name: a name as listed. What is not the name of a rule, such as ``expert``, is returned as it is.
        settings: the stored settings of a measurement, if the name comes from one. Defaults may have changed since.

    Example::

        >>> canonical("ties(scale=[1, 2], density=0.2)")
        'ties(scale=[1, 2])'
    """
    name = current_name(name)
    if _plain(name) not in NAMES:
        return name
    call = Call.parse(name)
    return str(_canonical(Call(call.rule, {**changed_since(call.rule, settings or {}), **call.options})))


def _canonical(call: Call) -> Call:
    parameters = _parameters(call.rule)
    options = {}
    for name in sorted(call.options, key=lambda name: list(parameters).index(name) if name in parameters else math.inf):
        value = _with_rules(parameters.get(name), call.options[name])
        if isinstance(value, Call):
            value = _canonical(value)
        if name not in parameters or value != parameters[name].default:
            options[name] = value
    return Call(call.rule, options)


def _make(call: Call) -> MergingMethod:
    if call.rule not in NAMES:
        near = difflib.get_close_matches(call.rule, NAMES, 1)
        raise MergeError([f"there is no rule '{call.rule}'{f'; did you mean {near[0]}?' if near else ''}"])
    parameters = _parameters(call.rule)
    values = {name: _with_rules(parameters.get(name), value) for name, value in call.options.items()}
    return NAMES[call.rule](**{name: _make(v) if isinstance(v, Call) else v for name, v in values.items()})


def _with_rules(parameter: Parameter | None, value: Any) -> Any:
    """The value of a setting, with names of rules where a parameter takes a rule."""
    takes_rule = parameter is not None and "MergingMethod" in str(parameter.annotation) and value != parameter.default
    return Call(value) if takes_rule and isinstance(value, str) and value in NAMES else value


def _parameters(rule: str) -> Mapping[str, Parameter]:
    return signature(NAMES[rule]).parameters


def settings_for(suite: Suite, methods: Sequence[str] | None = None) -> list[Setting]:
    """The settings to measure on a suite.

    Args:
        suite: the suite.
        methods: as for :func:`read_settings`; by default all of :data:`RULES` that apply to the suite.

    Returns:
        The settings, in order.

    Raises:
        MergeError: with all problems of the list, or with the rules that do not apply to the suite.
    """
    if methods is None:
        methods = [rule for rule in RULES if _plain(rule) not in suite.not_applicable]
    settings, problems = list[Setting](), list[str]()
    for listed in methods:
        try:
            settings += read_settings(listed)
        except MergeError as error:
            problems += error.problems
    named = dict.fromkeys(_plain(setting.name) for setting in settings)
    problems += [f"{n} is not for {suite.name}: {suite.not_applicable[n]}" for n in named if n in suite.not_applicable]
    if problems:
        raise MergeError(problems)
    return settings


def _plain(name: str) -> str:
    return name.partition("(")[0]
