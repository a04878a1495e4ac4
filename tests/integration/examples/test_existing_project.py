"""The example of a project that does not know of merging: what adds it is short, applies, and runs."""

from __future__ import annotations

import importlib
import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.existing_project import DIFF, EXAMPLE, OUTPUTS, patched


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with patched(tmp_path, monkeypatch) as folder:
        yield folder


def images() -> tuple[Tensor, Tensor]:
    """270 of them are validated, and 256 of these calibrated on."""
    labels = torch.arange(900) % 10
    return torch.rand(900, 1, 8, 8, generator=torch.Generator().manual_seed(0)), labels


def few(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random images, and fewer."""
    data = importlib.import_module(f"{package}.data")
    monkeypatch.setattr(data, "mnist", images)
    monkeypatch.setattr(data, "optical", images)


def test_the_diff_adds_less_than_ten_lines() -> None:
    lines = DIFF.read_text().splitlines()
    added = [line for line in lines if re.match(r"\+(?!\+\+)", line)]
    removed = [line for line in lines if re.match(r"-(?!--)", line)]
    assert 0 < len(added) < 10
    assert not removed
    assert DIFF.read_text() in (EXAMPLE / "README.md").read_text()


def test_script_and_configuration_merge_alike(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("patched", "examples.existing_project"):
        few(package, monkeypatch)
    runpy.run_module("patched.train", run_name="__main__")
    capsys.readouterr()
    runpy.run_module("patched.validate", run_name="__main__")
    assert "| mean " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["main", "validate", f"--config={EXAMPLE / 'merge.yaml'}"])
    runpy.run_module("examples.existing_project.main", run_name="__main__")
    assert "| mean " in capsys.readouterr().out
    script, configuration = (OUTPUTS / name for name in ("merged", "merged_by_configuration"))
    ours, theirs = (load_file(folder / "merged.safetensors") for folder in (script, configuration))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    metrics = [json.loads((folder / "report.json").read_text())["metrics"] for folder in (script, configuration)]
    assert metrics[0] == metrics[1]
    assert set(metrics[0]["merged"]) == {"optical", "negative", "tilted"}
