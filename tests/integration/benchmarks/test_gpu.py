"""The benchmark for GPUs runs, on a CPU and in small: what it measures is seen on a GPU alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu

ROOT = Path(__file__).parents[3]


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parts that take longer: tests/slow/test_benchmarks.py."""
    parts = ["precision", "lockstep"]
    monkeypatch.chdir(ROOT)
    options = ["--device", "cpu", "--tiny", "--work", str(tmp_path), "--output", str(tmp_path / "gpu")]
    failed = gpu.main([*options, "--parts", *parts])
    text = (tmp_path / "gpu.md").read_text()
    assert not failed, text
    assert "FAILED" not in text
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert list(content["parts"]) == parts
    layers = content["parts"]["lockstep"]["layers"]
    assert all(0 < layer["solving"] <= layer["seconds"] for model in layers.values() for layer in model)
    precisions = content["parts"]["precision"]["rows"][1:]
    assert float(precisions[0][2]) == 0
    assert all(float(row[2]) < (0.1 if "bf16" in row[0] or row[1] == "medium" else 1e-3) for row in precisions)


def test_a_part_that_fails_does_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setting: gpu.Setting) -> dict[str, object]:
        raise RuntimeError("out of luck")

    monkeypatch.setitem(gpu.PARTS, "demo", broken)
    monkeypatch.setitem(gpu.PARTS, "tests", lambda setting: {"rows": [["result"], ["passed"]]})
    output = ["--work", str(tmp_path), "--output", str(tmp_path / "gpu")]
    assert gpu.main(["--device", "cpu", "--tiny", "--parts", "demo", "tests", *output]) == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "FAILED: RuntimeError: out of luck" in text
    assert "Failed: demo." in text
    assert "passed" in text
