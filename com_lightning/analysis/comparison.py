"""The result of a comparison of merging rules: tables for people, JSON for programs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from com_lightning.results.importance_plot import LayerImportance
from com_lightning.results.report import MergeReport
from com_lightning.results.tables import (
    finite,
    labelled,
    lower_is_better,
    mean,
    number,
    percent,
    share_column,
    table,
)

TaskMetrics = dict[str, dict[str, float]]
"""Task -> metric -> value."""
Drift = list[tuple[str, dict[str, float]]]
"""Name of each layer, in the order of merging, and task -> relative drift of its input: the distance between its values
in the merged model and in the expert, divided by the norm of the latter."""


@dataclass
class Outcome:
    """One merge, and how good it was.

    Attributes:
        name: class of the rule, and settings that change the size of the result. All settings of one grid share it.
        label: the rule and its settings.
        method: class and settings, in full.
        seed: of the calibration sample. ``None`` if neither data nor chance have a part in the rule.
        metrics: ``"report"``, and ``"selection"`` if settings are chosen -> what was logged.
        seconds, peak_memory: as in :class:`~com_lightning.results.report.MergeReport`.
        drift: measured by two-sided chains only, which run both models.
        importance: similarity and importance of each task at each layer, if importance follows from similarity.
        warnings: of this merge alone.
        rule: class of the rule, and of those within it.
        size_settings: those that change the size of the result.
        size: bytes of the merged models, and of the experts as full models.
    """

    name: str
    label: str
    method: dict[str, Any]
    seed: int | None
    metrics: dict[str, TaskMetrics]
    seconds: float = 0.0
    peak_memory: int = 0
    drift: Drift = field(default_factory=list)
    importance: list[LayerImportance] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    rule: str = ""
    size_settings: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None


@dataclass
class Row:
    """A rule with the setting that is reported.

    Attributes:
        outcomes: one for each seed.
        tried: number of settings that it was chosen from.
        absolute, normalized: task -> mean over seeds of the metric, and of the share of the expert's, as in
            :meth:`MergeReport.normalized <com_lightning.results.report.MergeReport.normalized>`.
        mean_normalized: of the share, over tasks and seeds. ``None`` if a task has none.
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
        """Mean of the metric over tasks and seeds."""
        return mean(list(self.absolute.values()))

    @property
    def score(self) -> float | None:
        """What rules are ranked by: the mean over seeds."""
        return None if None in self.means else mean(self.means)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the score between seeds; ``None`` for one seed."""
        means = [value for value in self.means if value is not None]
        return statistics.stdev(means) if len(means) == len(self.means) > 1 else None

    @property
    def seconds(self) -> float:
        """Seconds of one merge, the mean over seeds."""
        return statistics.fmean(outcome.seconds for outcome in self.outcomes)

    @property
    def size(self) -> int | None:
        """Bytes of the merged models of all tasks."""
        return self.outcomes[0].size[0] if self.outcomes[0].size else None

    @property
    def size_share(self) -> float | None:
        """:attr:`size` as a share of the experts'."""
        merged, experts = self.outcomes[0].size or (0, 0)
        return merged / experts if experts else None

    @property
    def peak_memory(self) -> int:
        return max(outcome.peak_memory for outcome in self.outcomes)


@dataclass
class Comparison:
    """Everything that a comparison measured.

    Attributes:
        tasks: their names, in order.
        monitor: the metric that tables show and that settings are chosen by.
        splits: which samples were used for what, in words.
        counts: task -> the same in numbers, see :class:`~com_lightning.analysis.splits.Splits`.
        experts: split -> metrics of the experts.
        outcomes: all merges, in the order in which they are listed.
        average_drift: the drift with the plain average in place of a chain, on the first seed.
        warnings: about experts and metrics.
        memory_is_of_each: whether ``peak_memory`` is that of one merge. If not, it is the most since the process
            started.
        mode: ``"min"`` if lower values of the metric are better, else ``"max"``; ``None``: guessed from its name.
    """

    tasks: list[str]
    monitor: str | None = None
    splits: str = ""
    counts: dict[str, dict[str, int | None]] = field(default_factory=dict)
    experts: dict[str, TaskMetrics] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)
    average_drift: Drift = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    memory_is_of_each: bool = True
    mode: Literal["min", "max"] | None = None

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values of the metric are better."""
        return lower_is_better(self.monitor or "") if self.mode is None else self.mode == "min"

    @cached_property
    def rows(self) -> list[Row]:
        """One for each rule, the best first."""
        rows = []
        for name in dict.fromkeys(outcome.name for outcome in self.outcomes):
            settings = self._settings(name)
            chosen = settings[0]
            if len(settings) > 1:
                chosen = min(settings, key=lambda setting: self._sort_key(self._row(setting, "selection")))
            rows.append(self._row(chosen, "report", len(settings)))
        return sorted(rows, key=self._sort_key)

    def _settings(self, name: str) -> list[list[Outcome]]:
        """The outcomes of each setting of a rule."""
        settings: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            if outcome.name == name:
                settings.setdefault(outcome.label, []).append(outcome)
        return list(settings.values())

    def _row(self, outcomes: Sequence[Outcome], split: str, tried: int = 1) -> Row:
        experts = self.experts[split]
        reports = [
            MergeReport(
                tasks=self.tasks, monitor=self.monitor, mode=self.mode, metrics={"expert": experts, "merged": merged}
            )
            for merged in (outcome.metrics[split] for outcome in outcomes)
        ]
        values = [report.values("merged") for report in reports]
        absolute = {task: mean(column) for task, column in zip(self.tasks, zip(*values))}
        normalized = {task: mean([report.normalized("merged", task) for report in reports]) for task in self.tasks}
        shares = [report.mean_normalized("merged") for report in reports]
        whole = None if None in shares else mean(shares)
        means = shares if self.by_share else [mean(row) for row in values]
        return Row(list(outcomes), tried, absolute, normalized, whole, means)

    @cached_property
    def sizes_differ(self) -> bool:
        """Whether some rules give larger models than others."""
        return len({row.size for row in self.rows if row.size}) > 1

    def _format(self, score: float | None) -> str:
        return percent(score) if self.by_share else number(score)

    @cached_property
    def by_share(self) -> bool:
        """Whether rules are ranked by the mean share of the experts.

        This is so if the metric of all experts is above 0, and that of all merges as well if lower values are better.
        If not, rules are ranked by the mean of the metric.
        """
        name, merges = (
            self.monitor or "",
            (metrics for outcome in self.outcomes for metrics in outcome.metrics.values()),
        )
        experts = [task.get(name) for metrics in self.experts.values() for task in metrics.values()]
        merged = [task.get(name) for metrics in merges for task in metrics.values()] if self.lower_is_better else []
        is_above = all(value is not None and value > 0 for value in experts)
        return is_above and not any(value is not None and value <= 0 for value in merged)

    @property
    def lower_score_is_better(self) -> bool:
        """Whether a lower :attr:`Row.score` is better. Of shares, the higher is always better."""
        return self.lower_is_better and not self.by_share

    @property
    def monitor_label(self) -> str:
        """The metric, and whether lower values of it are better."""
        return labelled(self.monitor, self.lower_is_better)

    @property
    def score_label(self) -> str:
        """What rules are ranked by, for the axes of pictures."""
        if self.by_share:
            return f"{self.monitor}: {share_column('merged', self.lower_is_better)} (%)"
        return self.monitor_label

    def _sort_key(self, row: Row) -> tuple[bool, float]:
        """The smaller, the better."""
        value = row.score
        if value is None or not math.isfinite(value):
            return True, 0.0
        return False, value if self.lower_score_is_better else -value

    def table(self) -> str:
        """The rules, best first. Each task has the metric and, in brackets, its share of the expert's."""
        return table(self.table_rows())

    def table_rows(self) -> list[list[str]]:
        """The cells of :meth:`table`; the first row is the head."""
        grids = any(row.tried > 1 for row in self.rows)
        head = [
            "method",
            *self.tasks,
            "mean",
            share_column("mean", self.lower_is_better),
            "± between seeds",
            "seconds",
            "GiB",
        ]
        experts = [self.experts["report"].get(task, {}).get(self.monitor or "") for task in self.tasks]
        sized = self.sizes_differ
        rows = [head + ["MB", "of the experts"] * sized + ["best of"] * grids]
        whole = next((row.outcomes[0].size[1] for row in self.rows if row.outcomes[0].size), 0)
        cells = [number(mean(experts)), *["-"] * 4, *[_megabytes(whole), percent(1.0)] * sized]
        rows.append(["(experts)", *map(number, experts), *cells] + [""] * grids)
        for row in self.rows:
            cells = [f"{number(row.absolute[t])} ({percent(row.normalized[t])})" for t in self.tasks]
            cells += [number(row.mean), percent(row.mean_normalized), self._format(row.spread)]
            cells += [f"{row.seconds:.1f}", f"{row.peak_memory / 2**30:.2f}"]
            cells += [_megabytes(row.size), percent(row.size_share)] * sized
            rows.append([row.label, *cells] + [str(row.tried) if row.tried > 1 else ""] * grids)
        return rows

    def settings_table(self) -> str:
        """All settings of each grid, with the score that they were chosen by. Empty without a grid."""
        rows = self.settings_rows()
        return table(rows) if len(rows) > 1 else ""

    def settings_rows(self) -> list[list[str]]:
        """The cells of :meth:`settings_table`; the first row is the head."""
        share = share_column("mean", self.lower_is_better) if self.by_share else "mean"
        rows = [["setting", f"{share}, selection split", "± between seeds", "chosen"]]
        chosen = {row.label for row in self.rows}
        for name in dict.fromkeys(outcome.name for outcome in self.outcomes):
            settings = self._settings(name)
            grid = [self._row(outcomes, "selection") for outcomes in settings] if len(settings) > 1 else []
            for row in sorted(grid, key=self._sort_key):
                mark = "yes" if row.label in chosen else ""
                rows.append([row.label, self._format(row.score), self._format(row.spread), mark])
        return rows

    def edges(self) -> list[str]:
        """The chosen settings that are the smallest or largest of their grid, because others may be better."""
        messages = []
        for row in self.rows:
            settings = self._settings(row.outcomes[0].name)
            for name, value in row.outcomes[0].method.items():
                tried = [outcomes[0].method.get(name) for outcomes in settings]
                numbers = [other for other in tried if isinstance(other, float)]
                if not isinstance(value, float) or len(set(numbers)) < 2 or min(numbers) < value < max(numbers):
                    continue
                end = "largest" if value == max(numbers) else "smallest"
                messages.append(f"{row.label}: no {name} beyond the {end} of the grid was tried")
        return messages

    def _repr_html_(self) -> str:
        """The comparison in a notebook."""
        from com_lightning.analysis.comparison_html import comparison_fragment

        return comparison_fragment(self)

    def __str__(self) -> str:
        if not self.outcomes:
            return "Nothing has been compared yet."
        notes = self.notes()
        parts = [self.monitor_label, self.table(), self.settings_table(), self.splits, "\n".join(notes)]
        return "\n\n".join(part for part in parts if part)

    def notes(self) -> list[str]:
        """What is to be known of the table, and warnings."""
        notes = [f"Warning: {warning}" for warning in (*self.warnings, *self.edges())]
        if not self.memory_is_of_each:
            notes.insert(0, "GiB: the most that the process has held so far, in the order listed, not of each merge.")
        if self.sizes_differ:
            notes.insert(
                0, "MB: what the merged models of all tasks hold, as it is stored; of the experts as full models."
            )
        return notes

    def to_markdown(self) -> str:
        """Everything as Markdown."""
        warnings = {f"{o.label}, seed {o.seed}: {warning}" for o in self.outcomes for warning in o.warnings}
        parts = [f"# {len(self.rows)} ways to merge {', '.join(self.tasks)}", str(self)]
        if warnings:
            parts += ["## Warnings of single merges", "\n".join(f"- {warning}" for warning in sorted(warnings))]
        return "\n\n".join(parts) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain values. NaN and infinity become ``None``."""
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
                "bytes": row.size,
                "share_of_experts": row.size_share,
                "seeds": [outcome.seed for outcome in row.outcomes],
                "settings_tried": row.tried,
            }
            for row in self.rows
        ]
        plain: dict[str, Any] = finite({"lower_is_better": self.lower_is_better, "methods": methods, **asdict(self)})
        return plain

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"


def _megabytes(count: int | None) -> str:
    """Megabytes without their unit."""
    return "-" if count is None else f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:,.0f}"
