"""The speed benchmark in small: that it runs, and that what it divides by is what a merge does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.lockstep import Setting
from benchmarks.speed import floor, large, peers, scaling
from benchmarks.speed.__main__ import TINY, main
from com_lightning.core.chain import merge_layers
from com_lightning.core.statistics import InputStatistics


def test_it_writes_a_table_a_picture_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "speed"
    options = ["--tiny", "--repeats", "1", "--threads", "1", "--output", str(output)]
    main(["--parts", "scaling", *options])
    main(["--parts", "floor", *options])
    found = json.loads(output.with_suffix(".json").read_text())
    assert list(found) == ["floor", "scaling"], "what was not run again stays"
    assert all(len(columns["merge / floor"]) == 1 for columns in found["floor"]["found"].values())
    assert output.with_suffix(".png").stat().st_size > 0
    text = output.with_suffix(".md").read_text()
    assert all(name in text for name in ("| one-sided", "| default", "| blocks", "| tasks"))
    assert text in capsys.readouterr().out


@pytest.mark.slow
def test_large_models_in_small(tmp_path: Path) -> None:
    output = tmp_path / "speed"
    main(["--parts", "large", "--tiny", "--threads", "1", "--output", str(output)])
    found = json.loads(output.with_suffix(".json").read_text())["large"]["found"]
    assert list(found) == list(large.METHODS)
    assert all(own["anonymous"] > 0 and own["seconds"] > 0 for own in found.values())
    assert "chain, two-sided, memory_budget=1" in output.with_suffix(".md").read_text()


def test_the_floor_has_the_gram_matrices_that_a_merge_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (TINY.width, TINY.samples, TINY.batch_size, TINY.tasks, TINY.image, TINY.patch)
    setting = Setting(2, *sizes)
    setting.rule = floor.RULES["one-sided"]
    gathered: list[int] = []
    original = InputStatistics.mean_gram

    def noted(self: InputStatistics) -> object:
        gram = original(self)
        gathered.append(gram.shape[-1] if gram.shape[0] == 1 else 0)
        return gram

    monkeypatch.setattr(InputStatistics, "mean_gram", noted)
    setting.merge(merge_layers)
    known = sorted(size for size in set(gathered) if size > 2)
    expected = [numbers for numbers, _, _ in floor.inputs(setting)]
    assert known == sorted(set(expected))


def test_cost_in_proportion_has_an_exponent_of_one() -> None:
    found = {"samples": {64: [1.0, 2.0], 128: [2.0, 8.0]}}
    assert scaling.exponents(found) == {"samples": [pytest.approx(1.0), pytest.approx(2.0)]}


@pytest.mark.skipif(importlib.util.find_spec("fusion_bench") is not None, reason="it is installed")
def test_a_library_that_is_not_installed_is_told_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--parts", "peers", "files", "--tiny", "--output", str(tmp_path / "speed")])
    told = capsys.readouterr().err
    assert "FusionBench is not installed" in told
    assert "mergekit is not installed" in told
    assert not (tmp_path / "speed.json").exists()
    assert isinstance(peers.run(TINY, 1, 1), str)
