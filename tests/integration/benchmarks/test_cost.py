"""The one page on costs shows what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks.cost import draw, main, page, read
from benchmarks.speed.contenders import THEIRS

RESULTS = Path("benchmarks/results")


def test_the_page_is_that_of_the_results() -> None:
    costs = read(RESULTS)
    assert (RESULTS / "cost.md").read_text(encoding="utf-8") == page(costs)
    found = json.loads((RESULTS / "speed.json").read_text(encoding="utf-8"))["merges"]["found"]
    pairs = zip(found[THEIRS]["seconds"], found["default"]["seconds"])
    (default,) = (cost for cost in costs if cost.rule == "chain (the default)")
    assert default.speedup == median(theirs / ours for theirs, ours in pairs)
    assert all(cost.machine for cost in costs)
    compared = [cost for cost in costs if cost.against]
    assert len(draw(costs).axes[0].patches) == len(compared)


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "lockstep.json").write_bytes((RESULTS / "lockstep.json").read_bytes())
    main(["--folder", str(tmp_path)])
    assert [cost.against for cost in read(tmp_path)] == ["the naive chain"]
    assert (tmp_path / "cost.png").is_file()
