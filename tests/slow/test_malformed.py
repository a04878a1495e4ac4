"""Thousands of checkpoints and configurations that are broken at random."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.helpers.broken import mutated_bytes, mutated_configs, mutated_content

pytestmark = pytest.mark.filterwarnings("ignore")
RUNS = {"bytes": mutated_bytes(4000), "content": mutated_content(3000), "configurations": mutated_configs(600)}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_is_broken_is_told_as_ours(run: Callable[[], None]) -> None:
    run()
