"""Results of measurements, stored as soon as they exist: one entry for each seed and method."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.suites.renamed import current_settings, is_removed
from benchmarks.suites.rules import canonical
from benchmarks.suites.suite import Suite

EXPERT = "expert"  # method of the experts' own entry


@dataclass
class Entry:
    """One merge of one seed's experts, or these experts themselves.

    Attributes:
        method: name of the method; all settings of a grid share one name.
        seed: seed of base, experts, calibration sample, and of rules that draw random numbers.
        samples: calibration samples per task; 0 if the method reads none.
        source: the split that these samples come from.
        trained: name of the folder of base and experts, which stands for the settings of their training.
        experts: digest of the weights of base and experts. Training on another machine, or with another PyTorch, gives
            others. Empty in entries that are older than this attribute.
        values: task -> metric.
        seconds: duration of the merge, without validation. The machine may have been busy, so it does not show speed.
        settings: all settings of the method.
        versions: package -> version.
        chosen: for a grid, the setting that was measured.
        tried: for a grid, each setting -> its mean normalised metric on val, by which the choice was made.
        size: numbers of values: ``"model"`` (one expert), ``"shared"`` (by all tasks), and ``"per_task"`` (what each
            task has beside its private layers, which the expert has too). Empty if they are not known.
    """

    method: str
    seed: int
    samples: int
    source: str
    trained: str
    values: dict[str, float]
    experts: str = ""
    seconds: float = 0.0
    settings: dict[str, object] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    chosen: str = ""
    tried: dict[str, float] = field(default_factory=dict)
    size: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Entry:
        """An entry of a file, with today's names of options."""
        entry = cls(**content)
        entry.settings = current_settings(entry.settings)
        entry.method, entry.chosen = (canonical(name, entry.settings) for name in (entry.method, entry.chosen))
        entry.tried = {canonical(setting, entry.settings): score for setting, score in entry.tried.items()}
        return entry

    @property
    def key(self) -> tuple[object, ...]:
        """Identifies an entry."""
        return self.method, self.seed, self.samples, self.source, self.trained, self.experts

    def replaces(self, other: Entry) -> bool:
        """Whether another entry is out of date: the same row of the same experts, or of earlier ones.

        Experts themselves are not: rows that were measured with earlier ones are compared with them.
        """
        same = self.key[:-1] == other.key[:-1]
        return same and (self.method != EXPERT or self.experts == other.experts)

    def share(self, what: str) -> float:
        """A number of values, ``"shared"`` or ``"per_task"``, as a share of one model's; NaN if it is not known."""
        return self.size[what] / self.size["model"] if self.size else math.nan


@dataclass
class Row:
    """The results of a method with one number of calibration samples.

    Attributes:
        label: name in tables, in which ``=val`` replaces the values of a grid. It also says which split the calibration
            samples come from, if others come from val.
        samples: calibration samples per task; 0 if the method reads none.
        entries: one entry for each seed.
        normalized: for each seed whose experts were measured, the normalised metric of each task.
        scores: their means over tasks.
    """

    label: str
    samples: int
    entries: list[Entry]
    normalized: list[list[float]]
    scores: list[float]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.mean(self.scores) if self.scores else math.nan

    @property
    def spread(self) -> float:
        """Standard deviation between seeds; 0 for a single seed."""
        return spread(self.scores)

    @property
    def per_task(self) -> float:
        """Values that each task has beside its private layers, as a share of one model's; NaN if not known."""
        return statistics.mean(entry.share("per_task") for entry in self.entries)


class Results:
    """The entries of a suite in a JSON file, which is complete after each of them.

    Args:
        suite: the suite.
        path: path of the file, without a suffix.
        split: the split that was measured on, ``"test"`` or ``"val"``.
    """

    def __init__(self, suite: Suite, path: Path, split: str = "test") -> None:
        self.suite, self.path, self.split = suite, path, split
        self._entries: list[Entry] = []
        self._read: tuple[int, ...] = ()

    def entries(self) -> list[Entry]:
        """All entries of the file but those of options that have been removed since."""
        file = self.path.with_suffix(".json")
        if not file.exists():
            return []
        state = (stat := file.stat()).st_mtime_ns, stat.st_size, stat.st_ino
        if self._read != state:  # reading hundreds of names takes a second
            stored = json.loads(file.read_text())["entries"]
            self._entries = [Entry.read(entry) for entry in stored if not is_removed(entry["method"])]
            self._read = state
        return list(self._entries)

    def find(self, key: tuple[object, ...]) -> Entry | None:
        """The entry with a key."""
        return next((entry for entry in self.entries() if entry.key == key), None)

    def add(self, entry: Entry) -> None:
        """Store an entry, and remove those that it replaces. Several processes may do so at once."""
        with locked(self.path):
            entries = [other for other in self.entries() if not entry.replaces(other)] + [entry]
            used = {(each.seed, each.trained, each.experts) for each in entries if each.method != EXPERT}
            newest = {(each.seed, each.trained): each.experts for each in entries if each.method == EXPERT}
            entries = [
                each
                for each in entries
                if each.method != EXPERT
                or each.experts == newest[each.seed, each.trained]
                or (each.seed, each.trained, each.experts) in used
            ]
            content = {
                "suite": self.suite.name,
                "tasks": self.suite.tasks,
                "metric": f"{self.split}_{self.suite.metric}",
                "training": {self.suite.folder(0).parent.name: self.suite.settings()},
                "entries": [asdict(each) for each in entries],
            }
            write(self.path.with_suffix(".json"), json.dumps(content, indent=1, default=str) + "\n")

    def newest(self, trained: str) -> dict[int, Entry]:
        """Seed -> the entry of the experts that were measured last."""
        return {entry.seed: entry for entry in self.entries() if entry.method == EXPERT and entry.trained == trained}

    def normalized(self, entry: Entry) -> list[float] | None:
        """The normalised metric of each task; ``None`` if the experts of this seed were not measured."""
        expert = self.find((EXPERT, entry.seed, 0, "", entry.trained, entry.experts))
        if expert is None:
            return None
        return [self.suite.normalized(value, expert.values[task]) for task, value in entry.values.items()]

    def score(self, entry: Entry) -> float:
        """The mean normalised metric; NaN if there is none."""
        return self.suite.mean(values) if (values := self.normalized(entry)) else math.nan

    def rows(self, trained: str, earlier: bool = False) -> list[Row]:
        """The merges of experts with the same training settings, best first.

        Args:
            trained: stands for these settings.
            earlier: instead of merges of the newest experts, those of earlier experts, where no row of the newest ones
                has the same label. No row mixes both.
        """
        newest = {seed: entry.experts for seed, entry in self.newest(trained).items()}
        if any(newest.values()):  # experts without a digest are older than all others, whatever their seed
            newest = {seed: digest or "none" for seed, digest in newest.items()}
        entries = [entry for entry in self.entries() if entry.trained == trained and entry.method != EXPERT]
        rows = self._rows([entry for entry in entries if entry.experts == newest.get(entry.seed, entry.experts)])
        if not earlier:
            return rows
        known = {(row.label, row.samples) for row in rows}
        old = self._rows([entry for entry in entries if entry.experts != newest.get(entry.seed, entry.experts)])
        return [row for row in old if (row.label, row.samples) not in known]

    def _rows(self, entries: Sequence[Entry]) -> list[Row]:
        sources = {entry.source for entry in entries if entry.samples}
        usual = "val" if "val" in sources else next(iter(sources), "")
        grouped: dict[tuple[str, int], list[Entry]] = {}
        for entry in entries:
            label = _shown(entry.method) if entry.tried else entry.method
            label += f", samples of {entry.source}" if entry.samples and entry.source != usual else ""
            grouped.setdefault((label, entry.samples), []).append(entry)
        rows = []
        for (label, samples), each in grouped.items():
            normalized = [values for values in map(self.normalized, each) if values is not None]
            rows.append(Row(label, samples, each, normalized, [self.suite.mean(values) for values in normalized]))
        return sorted(rows, key=lambda row: math.inf if math.isnan(row.mean) else -row.mean)


def spread(values: Sequence[float]) -> float:
    """The standard deviation; 0 for a single value, NaN if one of the values is NaN."""
    if any(map(math.isnan, values)):
        return math.nan
    return statistics.stdev(values) if len(values) > 1 else 0.0


def versions() -> dict[str, str]:
    """Versions of everything that takes part in a merge."""
    packages = ("com_lightning", "torch", "lightning", "transformers")
    installed = {name: metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **installed, "threads": str(torch.get_num_threads())}


def _shown(name: str) -> str:
    """The short name of a grid.

    Example::

        >>> _shown("ties(density=[0.1, 0.2], trim=model, scale=[1, 2])")
        'ties(density=val, trim=model, scale=val)'
    """
    return re.sub(r"=\[[^\[\]]*\]", "=val", name)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let only one process at a time read and write the files of a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def write(path: Path, content: str) -> None:
    """Write a text file completely or not at all."""
    temporary = path.with_suffix(f".{os.getpid()}{path.suffix}")
    temporary.write_text(content)
    temporary.replace(path)
