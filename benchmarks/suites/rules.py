"""The rules that a suite is measured with by default."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.suites.suite import Suite
from com_lightning.errors import MergeError
from com_lightning.methods.registry import Setting, read_methods

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
    "fisher",
    "ada_merging",
)
"""Each rule with its paper's defaults, and with a tuned strength or ridge if its paper tunes one or it matters."""


def settings_for(suite: Suite, methods: Sequence[str] | None = None) -> list[Setting]:
    """The settings to measure on a suite.

    Args:
        suite: the suite.
        methods: as for :func:`~com_lightning.methods.registry.read_methods`; by default all of :data:`RULES` that apply
            to the suite.

    Returns:
        The settings, in order.

    Raises:
        MergeError: with all problems of the list, or with the rules that do not apply to the suite.
    """
    if methods is None:
        methods = [rule for rule in RULES if _plain(rule) not in suite.not_applicable]
    settings = read_methods(methods)
    named = dict.fromkeys(_plain(setting.name) for setting in settings)
    if wrong := [f"{n} is not for {suite.name}: {suite.not_applicable[n]}" for n in named if n in suite.not_applicable]:
        raise MergeError(wrong)
    return settings


def _plain(name: str) -> str:
    return name.partition("(")[0]
