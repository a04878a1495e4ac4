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

from benchmarks.suites.renamed import current_name, current_settings
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
        values: task -> metric.
        seconds: duration of the merge, without validation. The machine may have been busy, so it does not show speed.
        settings: all settings of the method.
        versions: package -> version.
        chosen: for a grid, the setting that was measured.
        tried: for a grid, each setting -> its mean normalised metric on val, by which the choice was made.
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
    chosen: str = ""
    tried: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Entry:
        """An entry of a file, with today's names of options."""
        entry = cls(**content)
        entry.method, entry.chosen = current_name(entry.method), current_name(entry.chosen)
        entry.tried = {current_name(setting): score for setting, score in entry.tried.items()}
        entry.settings = current_settings(entry.settings)
        return entry

    @property
    def key(self) -> tuple[object, ...]:
        """Identifies an entry."""
        return self.method, self.seed, self.samples, self.source, self.trained


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


class Results:
    """The entries of a suite in a JSON file, which is complete after each of them.

    Args:
        suite: the suite.
        path: path of the file, without a suffix.
        split: the split that was measured on, ``"test"`` or ``"val"``.
    """

    def __init__(self, suite: Suite, path: Path, split: str = "test") -> None:
        self.suite, self.path, self.split = suite, path, split

    def entries(self) -> list[Entry]:
        """All entries of the file."""
        file = self.path.with_suffix(".json")
        return [Entry.read(entry) for entry in json.loads(file.read_text())["entries"]] if file.exists() else []

    def find(self, key: tuple[object, ...]) -> Entry | None:
        """The entry with a key."""
        return next((entry for entry in self.entries() if entry.key == key), None)

    def add(self, entry: Entry) -> None:
        """Store an entry, and replace an earlier one with the same key. Several processes may do so at once."""
        with locked(self.path):
            entries = [other for other in self.entries() if other.key != entry.key] + [entry]
            content = {
                "suite": self.suite.name,
                "tasks": self.suite.tasks,
                "metric": f"{self.split}_{self.suite.metric}",
                "training": {self.suite.folder(0).parent.name: self.suite.settings()},
                "entries": [asdict(each) for each in entries],
            }
            write(self.path.with_suffix(".json"), json.dumps(content, indent=1, default=str) + "\n")

    def normalized(self, entry: Entry) -> list[float] | None:
        """The normalised metric of each task; ``None`` if the experts of this seed were not measured."""
        expert = self.find((EXPERT, entry.seed, 0, "", entry.trained))
        if expert is None:
            return None
        return [self.suite.normalized(value, expert.values[task]) for task, value in entry.values.items()]

    def score(self, entry: Entry) -> float:
        """The mean normalised metric; NaN if there is none."""
        return self.suite.mean(values) if (values := self.normalized(entry)) else math.nan

    def rows(self, trained: str) -> list[Row]:
        """The merges of experts with the same training settings, best first."""
        entries = [entry for entry in self.entries() if entry.trained == trained and entry.method != EXPERT]
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
