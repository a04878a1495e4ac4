"""Thousands of inputs that are broken at random: whatever comes of one, it is told as one of ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.broken import mutated_bytes, mutated_configs, mutated_content
from tests.helpers.running import run_apart

pytestmark = pytest.mark.filterwarnings("ignore")
RUNS = {"bytes": mutated_bytes(1000), "content": mutated_content(1000), "configurations": mutated_configs(200)}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_is_broken_is_told_as_ours(run: Callable[[], None]) -> None:
    """In this process, one after the other, and in a smaller form where one fails."""
    run()


def test_two_thousand_inputs_within_limits() -> None:
    """In a process each, in every place that reads something: see there."""
    run_apart("tests/slow/forked_inputs.py", timeout=3000)
