"""What a comparison of merging rules found, for people (tables) and for programs (JSON)."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from com_lightning.results.report import MergeReport
from com_lightning.results.tables import finite, lower_is_better, mean, number, percent, table

TaskMetrics = dict[str, dict[str, float]]
"""Task -> metric -> value."""


@dataclass
class Outcome:
    """One merge, and what it was worth.

    Attributes:
        name: the rule as it was listed; all settings of one grid share it.
        label: the rule and its settings.
        method: class and settings, in full.
        seed: of the calibration sample; ``None`` where the rule reads no data.
        metrics: ``"report"``, and ``"selection"`` if settings are chosen -> what was logged.
        seconds, peak_memory: as in :class:`~com_lightning.results.report.MergeReport`.
        shift: for each layer, in the order of merging, its name and task -> relative distance between its input in the
            merged model and in the expert. Of chains alone, which run both.
        warnings: of this merge alone.
    """

    name: str
    label: str
    method: dict[str, Any]
    seed: int | None
    metrics: dict[str, TaskMetrics]
    seconds: float = 0.0
    peak_memory: int = 0
    shift: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass
class Row:
    """A rule with the setting that is reported.

    Attributes:
        outcomes: one for each seed.
        tried: how many settings it was chosen from.
        absolute, normalized: task -> mean over seeds of the metric, and of the metric divided by the expert's.
        mean_normalized: of the normalised metric, over tasks and seeds; ``None`` where an expert's metric is 0.
        means: of each seed, what rules are ranked by, see :attr:`Comparison.by_share`.
    """

    outcomes: list[Outcome]
    tried: int
    absolute: dict[str, float | None]
    normalized: dict[str, float | None]
    mean_normalized: float | None
    means: list[float | None]

    @property
    def label(self) -> str:
        return self.outcomes[0].label

    @property
    def mean(self) -> float | None:
        """Of the metric, over tasks and seeds."""
        return mean(list(self.absolute.values()))

    @property
    def score(self) -> float | None:
        """What rules are ranked by: the mean over seeds."""
        return None if None in self.means else mean(self.means)

    @property
    def spread(self) -> float | None:
        """Standard deviation of that between seeds; ``None`` for one seed."""
        known = [mean for mean in self.means if mean is not None]
        return statistics.stdev(known) if len(known) == len(self.means) > 1 else None

    @property
    def seconds(self) -> float:
        """Of one merge, the mean over seeds."""
        return statistics.fmean(outcome.seconds for outcome in self.outcomes)

    @property
    def peak_memory(self) -> int:
        return max(outcome.peak_memory for outcome in self.outcomes)


@dataclass
class Comparison:
    """All that a comparison found.

    Attributes:
        tasks: their names, in order.
        metric: the metric that tables show, and that settings are chosen by.
        splits: which samples were for what, in words.
        counts: task -> the same in numbers, see :class:`~com_lightning.analysis.splits.Splits`.
        experts: split -> metrics of the experts.
        outcomes: all merges, in the order in which they are listed.
        average_shift: as :attr:`Outcome.shift`, with the plain average in place of a chain, on the first seed.
        warnings: what was odd.
        memory_is_of_each: whether ``peak_memory`` is that of one merge, or else the most since the process started.
    """

    tasks: list[str]
    metric: str | None = None
    splits: str = ""
    counts: dict[str, dict[str, int | None]] = field(default_factory=dict)
    experts: dict[str, TaskMetrics] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    average_shift: list[tuple[str, dict[str, float]]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory_is_of_each: bool = True

    @property
    def lower_is_better(self) -> bool:
        return lower_is_better(self.metric or "")

    @cached_property
    def rows(self) -> list[Row]:
        """One for each rule, the best first."""
        rows = []
        for name in dict.fromkeys(outcome.name for outcome in self.outcomes):
            settings = self._settings(name)
            chosen = settings[0]
            if len(settings) > 1:
                chosen = min(settings, key=lambda setting: self._place(self._row(setting, "selection")))
            rows.append(self._row(chosen, "report", len(settings)))
        return sorted(rows, key=self._place)

    def _settings(self, name: str) -> list[list[Outcome]]:
        own = [outcome for outcome in self.outcomes if outcome.name == name]
        return [[o for o in own if o.label == label] for label in dict.fromkeys(o.label for o in own)]

    def _row(self, outcomes: Sequence[Outcome], split: str, tried: int = 1) -> Row:
        metric = self.metric or ""
        reports = [
            MergeReport(tasks=self.tasks, monitor=metric, metrics={"expert": self.experts[split], "merged": o})
            for o in (outcome.metrics[split] for outcome in outcomes)
        ]
        absolute = {t: mean([r.metrics["merged"].get(t, {}).get(metric) for r in reports]) for t in self.tasks}
        normalized = {t: mean([r.normalized("merged", t) for r in reports]) for t in self.tasks}
        shares = [r.mean_normalized("merged") for r in reports]
        means = [mean([r.metrics["merged"].get(t, {}).get(metric) for t in self.tasks]) for r in reports]
        whole = None if None in shares else mean(shares)
        return Row(list(outcomes), tried, absolute, normalized, whole, shares if self.by_share else means)

    def _told(self, score: float | None) -> str:
        return percent(score) if self.by_share else number(score)

    @cached_property
    def by_share(self) -> bool:
        """Whether rules are ranked by the mean normalised metric: where all experts have one above 0. Else by its
        mean."""
        values = [t.get(self.metric or "") for metrics in self.experts.values() for t in metrics.values()]
        return all(value is not None and value > 0 for value in values)

    def _place(self, row: Row) -> tuple[bool, float]:
        """What is sorted by: the smaller, the better."""
        value = row.score
        if value is None or not math.isfinite(value):
            return True, 0.0
        return False, value if self.lower_is_better else -value

    def table(self) -> str:
        """The rules, best first: of each task the metric, and in brackets its share of the expert's."""
        grids = any(row.tried > 1 for row in self.rows)
        head = ["method", *self.tasks, "mean", "mean / expert", "± between seeds", "seconds", "GiB"]
        experts = [self.experts["report"].get(task, {}).get(self.metric or "") for task in self.tasks]
        rows = [head + ["best of"] * grids]
        rows.append(["(experts)", *map(number, experts), number(mean(experts)), *["-"] * 4] + [""] * grids)
        for row in self.rows:
            cells = [f"{number(row.absolute[t])} ({percent(row.normalized[t])})" for t in self.tasks]
            cells += [number(row.mean), percent(row.mean_normalized), self._told(row.spread)]
            cells += [f"{row.seconds:.1f}", f"{row.peak_memory / 2**30:.2f}"]
            rows.append([row.label, *cells] + [str(row.tried) if row.tried > 1 else ""] * grids)
        return table(rows)

    def settings_table(self) -> str:
        """All settings of rules that have several, with what they were chosen by."""
        share = "mean / expert" if self.by_share else "mean"
        rows = [["setting", f"{share}, selection split", "± between seeds", "chosen"]]
        chosen = {row.label for row in self.rows}
        for name in dict.fromkeys(outcome.name for outcome in self.outcomes):
            settings = self._settings(name)
            found = [self._row(own, "selection") for own in settings] if len(settings) > 1 else []
            for row in sorted(found, key=self._place):
                told = "yes" if row.label in chosen else ""
                rows.append([row.label, self._told(row.score), self._told(row.spread), told])
        return table(rows) if len(rows) > 1 else ""

    def edges(self) -> list[str]:
        """Which of the settings chosen are the smallest or largest of their grid, so that others may be better."""
        found = []
        for row in self.rows:
            settings = self._settings(row.outcomes[0].name)
            for name, value in row.outcomes[0].method.items():
                tried = [own[0].method.get(name) for own in settings]
                known = [other for other in tried if isinstance(other, float)]
                if not isinstance(value, float) or len(set(known)) < 2 or min(known) < value < max(known):
                    continue
                end = "largest" if value == max(known) else "smallest"
                found.append(f"{row.label}: no {name} beyond the {end} of the grid was tried")
        return found

    def __str__(self) -> str:
        if not self.outcomes:
            return "Nothing has been compared yet."
        better = ", lower is better" if self.lower_is_better else ""
        settings = self.settings_table()
        notes = [f"Warning: {warning}" for warning in (*self.warnings, *self.edges())]
        if not self.memory_is_of_each:
            notes.insert(0, "GiB: the most that the process has held so far, in the order listed, not of each merge.")
        parts = [f"{self.metric}{better}", self.table(), settings, self.splits, "\n".join(notes)]
        return "\n\n".join(part for part in parts if part)

    def to_markdown(self) -> str:
        """The whole as Markdown."""
        own = {f"{o.label}, seed {o.seed}: {warning}" for o in self.outcomes for warning in o.warnings}
        extra = "\n".join(f"- {line}" for line in sorted(own))
        parts = [f"# {len(self.rows)} ways to merge {', '.join(self.tasks)}", str(self)]
        return "\n\n".join([*parts, *([f"## Warnings of single merges\n\n{extra}"] if extra else [])]) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain values; NaN and infinity become ``None``."""
        methods = [
            {
                "label": row.label,
                "method": row.outcomes[0].method,
                "mean": row.mean,
                "mean_normalized": row.mean_normalized,
                "spread": row.spread,
                "tasks": {t: {"value": row.absolute[t], "normalized": row.normalized[t]} for t in self.tasks},
                "seconds": row.seconds,
                "peak_memory": row.peak_memory,
                "seeds": [outcome.seed for outcome in row.outcomes],
                "settings_tried": row.tried,
            }
            for row in self.rows
        ]
        plain: dict[str, Any] = finite(
            {"metric": self.metric, "lower_is_better": self.lower_is_better, "methods": methods, **asdict(self)}
        )
        return plain

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
