"""Several processes merge as one does."""

from __future__ import annotations

from tests.helpers import run_apart


def test_several_processes_merge_as_one() -> None:
    run_apart("tests/integration/forked_processes.py", timeout=900)
