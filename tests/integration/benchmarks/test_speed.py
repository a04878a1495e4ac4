"""The speed benchmark in small: that it runs, and that what it divides by is what a merge does."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.speed import breakdown, candidates, contenders, floor, merges, scaling, timing
from benchmarks.speed.__main__ import TINY, main
from com_lightning.core.solve.statistics import InputSums


def here(module: str, name: str, *options: object) -> dict[str, float]:
    """What a process of its own would find: to start one takes longer than the rest."""
    found: dict[str, float] = {}
    contenders.CONTENDERS[name](TINY, found)
    return found


def test_it_writes_a_table_a_picture_and_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merges, "in_a_process", here)
    output = tmp_path / "speed"
    options = ["--tiny", "--repeats", "1", "--threads", "1", "--output", str(output)]
    main(["--parts", "scaling", *options])
    main(["--parts", "merges", *options])
    found = json.loads(output.with_suffix(".json").read_text())
    assert list(found) == ["merges", "scaling"], "what was not run again stays"
    assert all(len(columns["seconds"]) == 1 for columns in found["merges"]["found"].values())
    assert output.with_suffix(".png").stat().st_size > 0
    text = output.with_suffix(".md").read_text()
    assert all(name in text for name in ("| one-sided", "| default", "| blocks", "| tasks"))
    assert text in capsys.readouterr().out


def test_a_breakdown_has_all_parts_and_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breakdown, "in_a_process", lambda module, name, *options: breakdown.merge(name, TINY))
    found = breakdown.run(TINY, 1, 1)
    assert list(found) == list(contenders.RULES)
    assert list(found["default"]) == [*breakdown.PARTS, breakdown.REST, "all"]
    two_sided = {"drifts multiplied by weights", "drift of residual streams", "outputs compared"}
    assert set(found["default"]) - set(found["one-sided"]) == two_sided
    for own in found.values():
        *parts, total = (seconds for [seconds] in own.values())
        assert sum(parts) == pytest.approx(total)
        assert all(seconds > 0 for seconds in parts)


def test_the_other_way_of_each_candidate_computes_the_same() -> None:
    """One product has the Gram matrix and the drift, and a drift can be multiplied before or after."""
    rows = candidates.Rows.random(20, 6, 4)
    x, drift, weight = rows.scaled[:, 0], rows.drift[:, 0], rows.weight[0]
    both = torch.cat([x, drift], 1).T @ x
    torch.testing.assert_close(both[:7], x.T @ x)
    torch.testing.assert_close(weight @ both[7:], (drift @ weight.T).T @ x)
    found = candidates.run(TINY, 1)
    assert all(seconds > 0 for values in found.values() for [seconds] in values.values())
    assert len(candidates.rows(found)) == 1 + len(found) == 9


def test_timers_do_not_count_what_is_within_twice() -> None:
    timers = breakdown.Timers()
    inner = timers.timed("inner", lambda: time.sleep(0.02))

    def outer() -> None:
        time.sleep(0.01)
        inner()
        time.sleep(0.01)

    start = time.perf_counter()
    timers.timed("outer", outer)()
    passed = time.perf_counter() - start
    assert timers.seconds["inner"] >= 0.02
    assert timers.seconds["outer"] >= 0.02
    assert sum(timers.seconds.values()) <= passed  # counted twice, it would be 0.02 more


def test_the_floor_has_the_gram_matrices_that_a_merge_gathers(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[int] = []
    original = InputSums.to_means

    def noted(self: InputSums, weight: Tensor) -> object:
        means = original(self, weight)
        gathered.append(means.gram.shape[-1] if means.gram.shape[0] == 1 else 0)
        return means

    monkeypatch.setattr(InputSums, "to_means", noted)
    contenders.CONTENDERS["one-sided"](TINY, {})
    known = sorted(size for size in set(gathered) if size > 2)
    expected = [numbers for numbers, _, _ in floor.inputs(TINY)]
    assert known == sorted(set(expected))


def test_the_floor_counts_forwards_once_for_each_stream() -> None:
    seconds = {name: {"seconds": [number]} for name, number in zip(floor.PARTS, (10.0, 2.0, 1.0))}
    assert merges.floors(seconds) == {"one-sided": [13.0], "default": [23.0]}


def test_what_was_complete_is_kept_where_timing_is_interrupted() -> None:
    turns = iter([1.0, 2.0, 3.0])

    def second() -> float:
        if (turn := next(turns, None)) is None:
            raise KeyboardInterrupt
        return turn

    assert timing.in_turn({"a": second, "b": second}, 5, "test") == {"a": [1.0], "b": [2.0]}
    with pytest.raises(KeyboardInterrupt):
        timing.in_turn({"a": second}, 5, "test")


def test_cost_in_proportion_has_an_exponent_of_one() -> None:
    found = {"samples": {64: [1.0, 2.0], 128: [2.0, 8.0]}}
    assert scaling.exponents(found) == {"samples": [pytest.approx(1.0), pytest.approx(2.0)]}


@pytest.mark.skipif(importlib.util.find_spec("fusion_bench") is not None, reason="it is installed")
def test_a_library_that_is_not_installed_is_told_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["--parts", "files", "--tiny", "--output", str(tmp_path / "speed")])
    assert "mergekit is not installed" in capsys.readouterr().err
    assert not (tmp_path / "speed.json").exists()
    monkeypatch.setattr(merges, "in_a_process", lambda *_: {"seconds": 1.0, "peak": 1.0})
    found = merges.run(TINY, 2, 1)
    assert "FusionBench is not installed" in capsys.readouterr().err
    assert list(found) == [*floor.PARTS, *contenders.OURS]
