"""The benchmarks in small: their parts that take longer, or a process of their own."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.speed import large, timing
from benchmarks.speed.__main__ import TINY, main
from tests.helpers.running import ROOT


def test_the_benchmark_for_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    output = ["--work", str(tmp_path), "--output", str(tmp_path / "gpu")]
    failed = gpu.main(["--device", "cpu", "--tiny", *output, "--parts", "tests", "demo"])
    text = (tmp_path / "gpu.md").read_text()
    assert not failed, text
    assert "FAILED" not in text
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["tests", "demo"]


def test_a_contender_tells_what_it_found_as_its_last_line() -> None:
    sizes = [part for key, value in asdict(TINY).items() for part in (f"--{key}", value)]
    found = timing.in_a_process("benchmarks.speed.contenders", "one-sided", *sizes, "--threads", 1)
    assert found["seconds"] > 0
    assert found["layers"] > 0


def test_large_models_in_small(tmp_path: Path) -> None:
    output = tmp_path / "speed"
    main(["--parts", "large", "--tiny", "--threads", "1", "--output", str(output)])
    found = json.loads(output.with_suffix(".json").read_text())["large"]["found"]
    assert list(found) == list(large.METHODS)
    assert all(own["anonymous"] > 0 and own["seconds"] > 0 for own in found.values())
    assert "chain, two-sided, memory_budget=1" in output.with_suffix(".md").read_text()
