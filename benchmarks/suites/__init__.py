"""Suites of real tasks to compare merging methods on, offline, from data and models that registry packages ship."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.suites.suite import Suite

SUITES = {
    "images8": "benchmarks.suites.images8.Images8",
    "images8-resnet": "benchmarks.suites.images8.Images8ResNet",
    "texts6": "benchmarks.suites.texts6.Texts6",
    "lm4": "benchmarks.suites.lm4.LM4",
    "lora6": "benchmarks.suites.texts6.Lora6",
}
"""Name of each suite -> its class, imported when it is asked for."""


def make_suite(name: str) -> Suite:
    """The suite of a name."""
    module, _, cls = SUITES[name].rpartition(".")
    suite: Suite = getattr(import_module(module), cls)()
    return suite
