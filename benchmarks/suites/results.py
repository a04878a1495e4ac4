"""What was measured: kept as it comes, one entry for each seed and method, and shown as a table and a picture."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.suites.suite import Suite
from com_lightning.report import table

EXPERT = "expert"  # the entry of the experts themselves


@dataclass
class Entry:
    """One merge of one seed's experts, or these experts themselves.

    Attributes:
        method: its name.
        seed: of base, experts and calibration sample.
        samples: calibration samples per task; 0 where none are read.
        source: the split they are from.
        trained: which settings base and experts were trained with (their folder's name).
        values: task -> metric.
        seconds: of the merge, without validation.
        settings: of the method, all of them.
        versions: of what computed it.
    """

    method: str
    seed: int
    samples: int
    source: str
    trained: str
    values: dict[str, float]
    seconds: float = 0.0
    settings: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        """What no two entries have in common."""
        return self.method, self.seed, self.samples, self.source, self.trained


class Results:
    """The entries of a suite in a JSON file, which is whole after each of them.

    Args:
        suite: what was measured.
        path: of the file, without a suffix.
        split: on which data, ``"test"`` or ``"val"``.
    """

    def __init__(self, suite: Suite, path: Path, split: str = "test") -> None:
        self.suite, self.path, self.split = suite, path, split

    def entries(self) -> list[Entry]:
        """Those of the file."""
        file = self.path.with_suffix(".json")
        return [Entry(**entry) for entry in json.loads(file.read_text())["entries"]] if file.exists() else []

    def find(self, key: tuple[object, ...]) -> Entry | None:
        """The entry with a key."""
        return next((entry for entry in self.entries() if entry.key == key), None)

    def add(self, entry: Entry) -> None:
        """Keep an entry, in place of the one with its key. Several processes may."""
        with _lock(self.path):
            entries = [other for other in self.entries() if other.key != entry.key] + [entry]
            content = {
                "suite": self.suite.name,
                "tasks": self.suite.tasks,
                "metric": f"{self.split}_{self.suite.metric}",
                "training": {self.suite.folder(0).parent.name: self.suite.settings()},
                "entries": [asdict(each) for each in entries],
            }
            _write(self.path.with_suffix(".json"), json.dumps(content, indent=1, default=str) + "\n")

    def normalized(self, entry: Entry) -> dict[str, float] | None:
        """Task -> normalised metric; ``None`` where the experts of its seed were not measured."""
        expert = self.find((EXPERT, entry.seed, 0, "", entry.trained))
        if expert is None:
            return None
        return {t: self.suite.normalized(value, expert.values[t]) for t, value in entry.values.items()}

    def rows(self, trained: str) -> list[tuple[str, list[Entry]]]:
        """The merges of experts that were trained alike: name, with samples where there are several -> entries."""
        entries = [entry for entry in self.entries() if entry.trained == trained and entry.method != EXPERT]
        numbers = {entry.samples for entry in entries if entry.samples}
        sources = {entry.source for entry in entries if entry.samples}
        found: dict[str, list[Entry]] = {}
        for entry in entries:
            name = entry.method
            if entry.samples:
                name += f", {entry.samples} samples" if len(numbers) > 1 else ""
                name += f" of {entry.source}" if len(sources) > 1 else ""
            found.setdefault(name, []).append(entry)
        return list(found.items())

    def show(self, trained: str) -> str:
        """Write the table (.md) and the picture (.png) of experts that were trained alike; returns the table."""
        text = self._markdown(trained)
        with _lock(self.path):
            _write(self.path.with_suffix(".md"), text)
        self._picture(trained)
        return text

    def _markdown(self, trained: str) -> str:
        suite, tasks, lower = self.suite, self.suite.tasks, self.suite.lower_is_better
        score = "geometric mean" if lower else "mean"
        scale, digits = (1.0, 3) if lower else (100.0, 1)
        head = [["method", *tasks, score, "spread", "seeds", "seconds"]]
        relative, absolute, excess = list(head), [head[0][:-1]], []
        experts = [e for e in self.entries() if e.method == EXPERT and e.trained == trained]
        for name, entries in [("experts", experts), *self.rows(trained)]:
            values = [list(entry.values.values()) for entry in entries]
            absolute.append([name, *_cells(values, suite.mean, scale, digits), str(len(entries))])
            normalized = [list(n.values()) for n in map(self.normalized, entries) if n is not None]
            if name != "experts" and normalized:
                seconds = statistics.mean(entry.seconds for entry in entries)
                cells = _cells(normalized, suite.mean, 100.0, 1)
                relative.append([name, *cells, str(len(normalized)), f"{seconds:.1f}"])
                above = [100 / statistics.geometric_mean(run) - 100 for run in normalized if all(run)]
                excess.append(f"{name} {statistics.mean(above or [math.nan]):.1f} %")
        entries = [entry for _, each in self.rows(trained) for entry in each]
        seeds = sorted({entry.seed for entry in experts})
        samples = sorted({entry.samples for entry in entries if entry.samples})
        sources = sorted({entry.source for entry in entries if entry.samples})
        versions = sorted({", ".join(f"{k} {v}" for k, v in e.versions.items()) for e in [*experts, *entries]})
        what = "experts' perplexity / merged" if lower else "merged accuracy / expert's"
        unit = "Perplexity" if lower else "Accuracy (%)"
        parts = [
            f"# {suite.name}",
            f"Normalised ({what}, %) on {self.split} data, {_listed(samples)} calibration samples a task "
            f"from {_listed(sources)}; mean over seeds of base, experts and sample; spread: the standard deviation of "
            "the mean over tasks between seeds.",
            table(relative),
            *([f"Perplexity above the experts', geometric mean over tasks: {'; '.join(excess)}."] if lower else []),
            f"{unit}:",
            table(absolute),
            *(f"`{command}`" for command in self._commands(trained, seeds)),
            f"{'; '.join(versions)}. Trained as `{trained}`.",
        ]
        return "\n\n".join(parts) + "\n"

    def _commands(self, trained: str, seeds: Sequence[int]) -> Iterator[str]:
        """What measures all of it again."""
        entries = [entry for _, each in self.rows(trained) for entry in each]
        settings = sorted({(entry.samples, entry.source) for entry in entries if entry.samples})
        for number, (samples, source) in enumerate(settings):
            # What needs no samples is told with the first.
            chosen = [e for e in entries if (e.samples, e.source) == (samples, source) or not (e.samples or number)]
            command = ["python", "-m", "benchmarks.suites", self.suite.name, "--seeds", *map(str, seeds)]
            command += ["--samples", str(samples), "--source", source, "--split", self.split]
            yield shlex.join([*command, "--methods", *dict.fromkeys(e.method for e in chosen)])

    def _picture(self, trained: str) -> None:
        from matplotlib.figure import Figure

        rows = []
        for name, entries in self.rows(trained):
            means = [100 * self.suite.mean(list(n.values())) for n in map(self.normalized, entries) if n is not None]
            if means:
                rows.append((name, statistics.mean(means), _spread(means)))
        figure = Figure(figsize=(8, 1.2 + 0.4 * len(rows)), layout="constrained")
        axes = figure.subplots()
        names, values, spreads = ([row[column] for row in reversed(rows)] for column in range(3))
        bars = axes.barh(names, values, xerr=spreads, color="#2a6f97", capsize=3)
        axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4, fontsize=8)
        what = "perplexity (experts' / merged, %)" if self.suite.lower_is_better else "accuracy (merged / expert, %)"
        axes.set_xlabel(f"{self.suite.name}: normalised {what}, mean of {len(self.suite.tasks)} tasks")
        axes.set_xlim(0, 105)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.png")
        figure.savefig(temporary, dpi=130)
        temporary.replace(self.path.with_suffix(".png"))


def versions() -> dict[str, str]:
    """Of what takes part in a merge."""
    packages = ("com_lightning", "torch", "lightning", "transformers")
    found = {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}
    return {**found, "threads": str(torch.get_num_threads())}


def _cells(
    runs: Sequence[Sequence[float]], mean: Callable[[Sequence[float]], float], scale: float, digits: int
) -> list[str]:
    """Mean of each task over runs, mean of them all, spread between runs."""
    means = [scale * mean(run) for run in runs]
    per_task = [scale * statistics.mean(column) for column in zip(*runs)]
    spread = f"{_spread(means):.{digits}f}" if len(runs) > 1 else "-"
    return [*(f"{value:.{digits}f}" for value in [*per_task, statistics.mean(means) if means else math.nan]), spread]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _listed(values: Sequence[object]) -> str:
    return " or ".join(map(str, values)) or "no"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time reads the file and writes it anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _write(path: Path, content: str) -> None:
    temporary = path.with_suffix(f".{os.getpid()}{path.suffix}")
    temporary.write_text(content)
    temporary.replace(path)
