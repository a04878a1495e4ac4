"""Checkpoints and configurations that are broken at random: whatever comes of it, it is told as one of ours.

Allowed are success, a MergeError, and the command line's own message on usage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError
from tests.helpers import Classifier, make_data, make_experts
from tests.helpers.broken import FEW, mutated_bytes, mutated_configs, mutated_content

pytestmark = pytest.mark.filterwarnings("ignore")
FEW["suppress_health_check"] = list(HealthCheck)


@pytest.mark.parametrize("run", [mutated_bytes(100), mutated_content(40)], ids=["bytes", "content"])
def test_broken_checkpoints(run: Callable[[], None]) -> None:
    run()


def test_broken_configurations() -> None:
    mutated_configs(10)()


def test_numbers_that_name_tasks_are_told_of() -> None:
    """As YAML reads what has no quotes."""
    experts: Any = dict(zip((1, "b"), make_experts((3, 3))))
    data: Any = {1: make_data(0), "b": make_data(1)}
    with pytest.raises(MergeError, match="names of tasks are text; put quotes around 1"):
        ChainOfMergesCallback(experts).plan(Classifier(), MergeDataModule(data))
