"""The example of an existing project, trained on its own data."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from tests.helpers.existing_project import OUTPUTS, patched


def test_the_merge_beats_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with patched(tmp_path, monkeypatch):
        for script in ("train", "validate"):
            runpy.run_module(f"patched.{script}", run_name="__main__")
    report = json.loads((OUTPUTS / "merged" / "report.json").read_text())
    assert report["mean_normalized"]["merged"] > 1.5 * report["mean_normalized"]["average"]
