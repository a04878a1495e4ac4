"""What a merge costs, on one page: how long, how much memory, against what, on which machine.

It is drawn from what ``make bench`` has measured (``speed.json``, ``lockstep.json``): ``python -m benchmarks.cost``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure

from benchmarks.speed.contenders import THEIRS
from benchmarks.speed.timing import ratios
from com_lightning.results.tables import table

OURS, OTHERS = "#2a6f97", "#9aa5b1"


@dataclass
class Cost:
    """A merge, beside another way to do the same.

    Attributes:
        work: what is merged.
        rule: how.
        against: the other way; empty if there is none.
        seconds, their_seconds: of each repeat. Both were timed in turn.
        memory, their_memory: bytes, on top of models and data; of each repeat.
        machine: where it was measured.
    """

    work: str
    rule: str
    against: str
    seconds: Sequence[float]
    machine: str
    their_seconds: Sequence[float] = ()
    memory: Sequence[float] = ()
    their_memory: Sequence[float] = ()

    @property
    def speedup(self) -> float | None:
        """How many times as fast it is."""
        return median(ratios(self.their_seconds, self.seconds)) if self.their_seconds else None

    @property
    def memory_ratio(self) -> float | None:
        """How many times the other's memory it takes."""
        return median(ratios(self.memory, self.their_memory)) if self.memory and self.their_memory else None

    def row(self) -> list[str]:
        """The cells of the table."""
        return [
            self.work,
            self.rule,
            self.against or "-",
            _number(self.seconds),
            _number(self.their_seconds),
            "-" if self.speedup is None else f"{self.speedup:.2f}",
            _number(self.memory, 2**30),
            _number(self.their_memory, 2**30),
            self.machine,
        ]


COLUMNS = ("work", "rule", "against", "seconds", "theirs", "times as fast", "memory, GiB", "theirs, GiB", "machine")


def read(folder: Path) -> list[Cost]:
    """What was measured.

    Args:
        folder: that of the results.

    Returns:
        All merges of which there are results.
    """
    speed, lockstep = (_content(folder / f"{name}.json") for name in ("speed", "lockstep"))
    return [*_of_tower(speed.get("merges")), *_of_lockstep(lockstep), *_of_files(speed.get("files"))] + [
        Cost("8 experts of 1B parameters", rule, "", [found["seconds"]], _machine(part), memory=[found["anonymous"]])
        for part in [speed.get("large")]
        if part
        for rule, found in part["found"].items()
    ]


def page(costs: Sequence[Cost]) -> str:
    """The page, as Markdown."""
    return (
        "# What a merge costs\n\n"
        "Medians of all repeats. What is compared was timed in turn, in one run, and a ratio is the median of the "
        "ratios of all repeats. Memory comes on top of models and data.\n\n"
        f"{table([list(COLUMNS), *(cost.row() for cost in costs)])}\n\n"
        "![times as fast, and times the memory](cost.png)\n\n"
        "`make bench` measures, and `python -m benchmarks.cost` writes this page. Details, spreads and settings: "
        "[speed](speed.md), [lockstep](lockstep.md), [memory](memory.md).\n"
    )


def draw(costs: Sequence[Cost]) -> Figure:
    """Two panels: times as fast, and times the memory, for all merges that were compared with something."""
    compared = [cost for cost in costs if cost.speedup is not None]
    figure = Figure(figsize=(11, 1.2 + 0.5 * len(compared)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    names = [f"{cost.rule}\nagainst {cost.against}" for cost in compared]
    for axes, values, label in (
        (left, [cost.speedup for cost in compared], "times as fast"),
        (right, [cost.memory_ratio for cost in compared], "times the memory"),
    ):
        wins = [value is not None and (value >= 1) == (axes is left) for value in values]
        bars = axes.barh(names, [value or 0 for value in values], color=[OURS if win else OTHERS for win in wins])
        texts = ["" if value is None else f"{value:.1f}" for value in values]
        axes.bar_label(bars, texts, padding=4, fontsize=9, backgroundcolor="white")
        axes.axvline(1, color="black", linewidth=0.8, zorder=0)
        axes.set_xlabel(label)
        axes.margins(x=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    left.invert_yaxis()
    return figure


def _of_tower(part: Mapping[str, Any] | None) -> list[Cost]:
    found = part["found"] if part else {}
    theirs = found.get(THEIRS)
    costs = []
    for name, values in found.items():
        if "peak" in values and name != THEIRS and part:
            setting = part["setting"]
            work = f"CLIP ViT-B/32, {setting['tasks']} tasks × {setting['samples']} samples"
            rule = "chain (the default)" if name == "default" else f"chain, {name}"
            cost = Cost(work, rule, "", values["seconds"], _machine(part), memory=values["peak"])
            if theirs:
                cost.against, cost.their_seconds, cost.their_memory = THEIRS, theirs["seconds"], theirs["peak"]
            costs.append(cost)
    return costs


def _of_lockstep(part: Mapping[str, Any]) -> list[Cost]:
    if not part:
        return []
    columns, settings = part["repeated"]["columns"], part["settings"]
    work = f"ViT of {part['repeated']['blocks']} blocks, {settings['tasks']} tasks × {settings['samples']} samples"
    ours, theirs = columns["lockstep, s"], columns["naive chain, s"]
    return [Cost(work, "chain", "the naive chain", ours, _machine(part), their_seconds=theirs)]


def _of_files(part: Mapping[str, Any] | None) -> list[Cost]:
    if not part:
        return []
    return [
        Cost(
            f"{part['setting']['experts']} safetensors folders, without data",
            rule,
            "mergekit",
            found["com_lightning"]["seconds"],
            _machine(part),
            found["mergekit"]["seconds"],
            found["com_lightning"]["peak"],
            found["mergekit"]["peak"],
        )
        for rule, found in part["found"].items()
    ]


def _machine(part: Mapping[str, Any] | None) -> str:
    machine = part["environment"] if part else {}
    return f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores".replace("(R)", "")


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _number(values: Sequence[float], unit: float = 1.0) -> str:
    if not values:
        return "-"
    value = median(values) / unit
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"


def main(arguments: list[str] | None = None) -> None:
    """Write the page and its picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("benchmarks/results"), help="of the results")
    folder = parser.parse_args(arguments).folder
    costs = read(folder)
    (folder / "cost.md").write_text(page(costs), encoding="utf-8")
    draw(costs).savefig(folder / "cost.png", dpi=130)
    print(page(costs))


if __name__ == "__main__":
    main()
