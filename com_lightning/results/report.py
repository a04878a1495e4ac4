"""The report of a merge: its data, and their JSON. ``markdown.py`` and ``html.py`` render it for people."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from com_lightning.core.sweep.task import LayerRecord, SkippedBatch
from com_lightning.results import markdown
from com_lightning.results.tables import finite, lower_is_better, mean, number, table

Status = Literal[
    "solved",
    "solved in part",
    "averaged",
    "merged",
    "re-estimated",
    "buffer",
    "private",
    "private, solved for each task",
    "private, solved for the merged model",
    "folded",
]


@dataclass(frozen=True)
class ParameterOutcome:
    """What became of one parameter or buffer. As text, it reads like ``averaged: no calibration forward uses it``.

    Attributes:
        status: One of

            - ``"solved"``: merged in closed form; ``"solved in part"``: no data reached its other values;
            - ``"averaged"``: averaged instead of being solved, or by a method that only averages;
            - ``"merged"``: merged by a rule that treats each parameter on its own;
            - ``"re-estimated"``: running statistics, computed from the merged model's inputs;
            - ``"buffer"``: any other buffer;
            - ``"private"``: kept by each task; ``"private, solved for each task"``: it would be shared by default;
              ``"private, solved for the merged model"``: refitted to the features of the merged model;
            - ``"folded"``: part of an adapter that was merged into its layer.
        detail: Why the parameter was not solved, or the name of the rule that merged it.
    """

    status: Status
    detail: str | None = None

    def __str__(self) -> str:
        if self.detail is None:
            return self.status
        return f"{self.status}{' by ' if self.status == 'merged' else ': '}{self.detail}"


@dataclass
class MergeReport:
    """Everything that is known about a merge.

    Attributes:
        method: Class and settings of the merging method.
        tasks: Names of the tasks, in order.
        monitor: The metric that tables show and that models are compared by.
        mode: ``"min"`` if lower values of that metric are better, else ``"max"``; ``None``: guessed from its name.
        metrics: ``"expert"``, ``"average"`` or ``"merged"`` -> task -> metric -> value, from ``trainer.validate``.
        layers: What happened at each layer, in the order of merging.
        parameters: Name of each parameter and buffer -> what became of it.
        sizes: What became of parameters, as in ``parameters`` -> number of values. Private values are counted for each
            task. Values that no calibration data reached count as averaged.
        samples: Task -> number of calibration samples.
        overlap: Task -> how many of these samples are validated too; ``None`` if that cannot be known.
        skipped: Calibration batches that were left out because they lead to NaN or infinity.
        warnings: Everything unusual that was noticed.
        seconds: Duration of the merge, without validation.
        peak_memory: Peak memory in bytes: of the process on a CPU, else what was allocated on the device.
        seed: Seed of the calibration sample.
        versions: Package -> version.
        resumed: How many layers were taken from an earlier merge that was interrupted.
    """

    method: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    parameters: dict[str, ParameterOutcome] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int | None] = field(default_factory=dict)
    skipped: list[SkippedBatch] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    resumed: int = 0

    @property
    def metric(self) -> str | None:
        """The old name of :attr:`monitor`."""
        warnings.warn("MergeReport.metric is now MergeReport.monitor", FutureWarning, stacklevel=2)
        return self.monitor

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values of the monitored metric are better."""
        return lower_is_better(self.monitor or "") if self.mode is None else self.mode == "min"

    def choose_monitor(self, name: str | None = None, mode: Literal["min", "max"] | None = None) -> None:
        """Choose the metric that tables show and that models are compared by. A name that was not logged is a warning.

        Args:
            name: Name of the metric; by default the first logged one that is not a loss.
            mode: Whether its lowest or its highest value is best; by default guessed from its name.
        """
        models = list(self.metrics.values())
        logged = list(next(iter(models[-1].values()), {})) if models else []
        if name is not None and name not in logged:
            self.warnings.append(f"monitor: '{name}' was not logged. Logged metrics: {', '.join(logged) or 'none'}")
            name = mode = None
        self.monitor = name or next((n for n in logged if "loss" not in n), logged[0] if logged else None)
        self.mode = mode
        if self.monitor is not None:
            self.mode = "min" if self.lower_is_better else "max"

    def values(self, model: str) -> list[float | None]:
        """The monitored metric of each task.

        Args:
            model: ``"expert"``, ``"average"`` or ``"merged"``.

        Returns:
            One value per task, ``None`` where it is missing.
        """
        metrics = self.metrics.get(model, {})
        return [metrics.get(task, {}).get(self.monitor or "") for task in self.tasks]

    def normalized(self, model: str, task: str, metric: str | None = None) -> float | None:
        """A metric of a task divided by its expert's, e.g. ``normalized("merged", "mnist")``.

        Args:
            model: ``"expert"``, ``"average"`` or ``"merged"``.
            task: Name of the task.
            metric: Name of the metric; by default the monitored one.

        Returns:
            The ratio, or ``None`` if a value is missing or the expert's is 0.
        """
        metric = metric or self.monitor or ""
        value = self.metrics.get(model, {}).get(task, {}).get(metric)
        expert = self.metrics.get("expert", {}).get(task, {}).get(metric)
        return value / expert if value is not None and expert else None

    def mean_normalized(self, model: str) -> float | None:
        """The mean over tasks of :meth:`normalized`.

        Args:
            model: ``"expert"``, ``"average"`` or ``"merged"``.

        Returns:
            The mean, or ``None`` unless every task has a value.
        """
        ratios = [self.normalized(model, task) for task in self.tasks]
        return None if None in ratios else mean(ratios)

    def compare_with_average(self) -> None:
        """Add a warning if the plain average has a better mean of the monitored metric than the merged model."""
        average, merged = (mean(self.values(model)) for model in ("average", "merged"))
        if average is None or merged is None or self.method.get("class") == "Average":
            return
        if merged > average if self.lower_is_better else merged < average:
            samples = max(self.samples.values(), default=0)
            ridge = f" (now {self.method['ridge']})" if "ridge" in self.method else ""
            advice = f"Try more calibration samples (now {samples} per task), a higher ridge{ridge}" if samples else ""
            self.warnings.append(
                f"the merge is worse than the plain average: the mean {self.monitor} is {number(merged)} merged and "
                f"{number(average)} averaged. {advice or 'Try other settings'}, or the method Average"
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert everything to plain values. NaN and infinity become ``None``, which every JSON reader accepts."""
        content: dict[str, Any] = {**asdict(self), "metric": self.monitor}  # its name in earlier versions
        content["parameters"] = {name: str(outcome) for name, outcome in self.parameters.items()}
        content["normalized"] = {
            model: {task: {m: self.normalized(model, task, m) for m in values} for task, values in tasks.items()}
            for model, tasks in self.metrics.items()
        }
        content["mean_normalized"] = {model: self.mean_normalized(model) for model in self.metrics}
        plain: dict[str, Any] = finite(content)
        return plain

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def task_table(self) -> str:
        """The results at a glance: for each task the expert, the average and the merged model."""
        return table(markdown.task_rows(self))

    def layer_table(self) -> str:
        """For each layer the drift of its inputs, the residual of its fit, and its conditioning."""
        return table(markdown.layer_rows(self))

    def summary(self) -> str:
        """Data and cost in two lines, then one line for each skipped batch."""
        return markdown.summary(self)

    def to_markdown(self) -> str:
        """The whole report as Markdown."""
        return markdown.markdown_report(self)

    def __str__(self) -> str:
        if not self.tasks:
            return "Nothing has been merged yet."
        metrics = f"{self.monitor}\n\n{self.task_table()}\n\n" if self.metrics else ""
        return f"{metrics}{self.summary()}" + "".join(f"\nWarning: {warning}" for warning in self.warnings)
