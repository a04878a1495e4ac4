"""A merge that is killed loses nothing."""

from __future__ import annotations

import os

import pytest

from tests.helpers import run_apart


def test_a_merge_that_is_killed_loses_nothing() -> None:
    run_apart("tests/slow/forked_kills.py", timeout=900)


def test_killed_at_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "KILL_EVERYWHERE", "1")
    run_apart("tests/slow/forked_kills.py", timeout=1800)
