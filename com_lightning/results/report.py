"""The report of a merge: its data, as JSON, as tables and as Markdown. ``html.py`` makes a page of the same rows."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from com_lightning.core.sweep.task import LayerRecord, SkippedBatch
from com_lightning.results.conclusion import advice, headline
from com_lightning.results.model_size import ModelSize, size_rows
from com_lightning.results.origins import Origin
from com_lightning.results.outcome import ParameterOutcome
from com_lightning.results.summary import summarize
from com_lightning.results.tables import (
    finite,
    labelled,
    lower_is_better,
    mean,
    number,
    percent,
    share_column,
    share_of_expert,
    table,
)

MODELS = ("expert", "average", "merged")
"""The models that are compared, in the order in which tables and pictures show them."""

LAYER_COLUMNS = (
    "Drift and cosine compare the inputs of a layer in the merged model with those in the experts, before the layer is "
    "merged. Drift is their relative distance; both are means over tasks. The residual is the relative squared error "
    "of the layer's output after the merge. If the layer also makes up for the drift of other tensors, it is the error "
    "of its sum with them. The condition is a lower bound of the condition number. From about 1e6 on, rounding errors "
    "show: use more calibration samples or a higher ridge to lower it."
)
"""Explains the columns of :func:`layer_rows`."""

SIZE_COLUMNS = "Parameters and buffers in the precision that they are stored in, without what formats of files add."
"""Explains the table of :func:`~com_lightning.results.model_size.size_rows`."""

_GROUPS = {
    "embedding": "rows of the table",
    "grouped linear": "experts",
    "contraction": "stacked matrices",
    "sum": "elements",
    "product": "elements",
    "per channel": "channels",
    "batch normalisation": "channels",
}
"""Layer type -> what its independent regressions are."""


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
        size: What is stored: shared values, those of each task, and those of all experts as full models.
        samples: Task -> number of calibration samples.
        padding: In which layers padding was left out, one line for all tasks for which it is the same.
        private: What became of private layers, if the method solves them, in lines like those of ``padding``.
        overlap: Task -> how many of these samples are validated too; ``None`` if that cannot be known.
        held_out: Task -> whether validation left these samples out.
        skipped: Calibration batches that were left out because they lead to NaN or infinity.
        warnings: Everything unusual that was noticed.
        checks: What was checked, and what could not be and why: for example whether the files that were written give
            the outputs of the modules in memory.
        seconds: Duration of the merge, without validation.
        peak_memory: Peak memory in bytes: of the process on a CPU, else what was allocated on the device.
        seed: Seed of the calibration sample.
        versions: Package -> version.
        resumed: How many layers were taken from an earlier merge that was interrupted.
        date: When the merge ended, as ``2026-01-31 17:05 UTC``.
        command: The command line, or the call in Python, that the merge was started with.
        origins: Task -> where its expert comes from.
    """

    method: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    parameters: dict[str, ParameterOutcome] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    size: ModelSize = field(default_factory=ModelSize)
    samples: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int | None] = field(default_factory=dict)
    held_out: dict[str, bool] = field(default_factory=dict)
    padding: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    skipped: list[SkippedBatch] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    resumed: int = 0
    date: str = ""
    command: str = ""
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        """The old name of :attr:`monitor`."""
        warnings.warn("MergeReport.metric is now MergeReport.monitor", FutureWarning, stacklevel=2)
        return self.monitor

    @property
    def lower_is_better(self) -> bool:
        """Whether lower values of the monitored metric are better."""
        return lower_is_better(self.monitor or "") if self.mode is None else self.mode == "min"

    @property
    def monitor_label(self) -> str:
        """The monitored metric, and whether lower values of it are better."""
        return labelled(self.monitor, self.lower_is_better)

    @property
    def headline(self) -> str:
        """What the merge has achieved, in one sentence; empty if nothing has been merged."""
        return headline(self)

    @property
    def advice(self) -> str:
        """What to try next, from what is known of this merge; empty if there is nothing to say."""
        return advice(self)

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

    def mean(self, model: str) -> float | None:
        """The mean over tasks of the monitored metric, which a sweep can optimise.

        Args:
            model: ``"expert"``, ``"average"`` or ``"merged"``.

        Returns:
            The mean, or ``None`` if no task has a value.
        """
        return mean(self.values(model))

    def normalized(self, model: str, task: str, metric: str | None = None) -> float | None:
        """How much of its expert's metric a model keeps on a task, e.g. ``normalized("merged", "mnist")``.

        1 is as good as the expert, and less is worse: it is the metric divided by the expert's, or the expert's divided
        by the metric where lower values are better.

        Args:
            model: ``"expert"``, ``"average"`` or ``"merged"``.
            task: Name of the task.
            metric: Name of the metric; by default the monitored one. Whether lower values are better is guessed from
                the name of any other.

        Returns:
            The share, or ``None`` if a value is missing, or not above 0 where that makes a ratio meaningless.
        """
        metric = metric or self.monitor or ""
        lower = self.lower_is_better if metric == self.monitor else lower_is_better(metric)
        value, expert = (self.metrics.get(name, {}).get(task, {}).get(metric) for name in (model, "expert"))
        return share_of_expert(value, expert, lower)

    def mean_normalized(self, model: str) -> float | None:
        """The mean over tasks of :meth:`normalized`.

        Args:
            model: ``"expert"``, ``"average"`` or ``"merged"``.

        Returns:
            The mean, or ``None`` unless every task has a value.
        """
        ratios = [self.normalized(model, task) for task in self.tasks]
        return None if None in ratios else mean(ratios)

    @property
    def is_worse_than_average(self) -> bool:
        """Whether the plain average has a better mean of the monitored metric than the merged model."""
        average, merged = self.mean("average"), self.mean("merged")
        if average is None or merged is None or self.method.get("class") == "Average":
            return False
        return merged > average if self.lower_is_better else merged < average

    def compare_with_average(self) -> None:
        """Add a warning if the merged model :attr:`is_worse_than_average`."""
        if self.is_worse_than_average:
            samples = max(self.samples.values(), default=0)
            ridge = f" (now {self.method['ridge']})" if "ridge" in self.method else ""
            advice = f"Try more calibration samples (now {samples} per task), a higher ridge{ridge}" if samples else ""
            self.warnings.append(
                f"the merge is worse than the plain average: the mean {self.monitor} is "
                f"{number(self.mean('merged'))} merged and {number(self.mean('average'))} averaged. "
                f"{advice or 'Try other settings'}, or the method Average"
            )

    def to_dict(self) -> dict[str, Any]:
        """Convert everything to plain values. NaN and infinity become ``None``, which every JSON reader accepts."""
        content: dict[str, Any] = {**asdict(self), "metric": self.monitor}  # its name in earlier versions
        content["parameters"] = {name: str(outcome) for name, outcome in self.parameters.items()}
        content["normalized"] = {
            model: {task: {m: self.normalized(model, task, m) for m in values} for task, values in tasks.items()}
            for model, tasks in self.metrics.items()
        }
        content["share_of_experts"] = self.size.share
        content["mean_normalized"] = {model: self.mean_normalized(model) for model in self.metrics}
        content["headline"], content["advice"] = self.headline, self.advice
        plain: dict[str, Any] = finite(content)
        return plain

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def task_table(self) -> str:
        """The results at a glance: for each task the expert, the average and the merged model."""
        return table(task_rows(self))

    def layer_table(self) -> str:
        """For each layer the drift of its inputs, the residual of its fit, and its conditioning."""
        return table(layer_rows(self))

    def summary(self) -> str:
        """Data and cost in two lines, then lines for private layers, the padding of tasks, and skipped batches."""
        return summarize(self)

    def to_markdown(self) -> str:
        """The whole report as Markdown."""
        return markdown_report(self)

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        from com_lightning.results.html import html_fragment

        return html_fragment(self)

    def __str__(self) -> str:
        if not self.tasks:
            return "Nothing has been merged yet."
        metrics = f"{self.monitor_label}\n\n{self.task_table()}\n\n" if self.metrics else ""
        checks = "".join(f"\nChecked: {check}" for check in self.checks)
        warned = "".join(f"\nWarning: {warning}" for warning in self.warnings)
        return f"{metrics}{self.summary()}{checks}{warned}\n\n" + "\n".join(conclusion(self))


def conclusion(report: MergeReport) -> list[str]:
    """The lines that a report ends with: the headline, and the advice if there is some."""
    return [report.headline, *([f"Next: {report.advice}"] if report.advice else [])]


def task_rows(report: MergeReport) -> list[list[str]]:
    """A head, a row per task with the metric of each model and its share of the expert's, and a row of means."""
    models = [model for model in MODELS if model in report.metrics]
    compared = [model for model in models if model != "expert" and "expert" in models]
    values = [report.values(model) for model in models]
    ratios = [[report.normalized(model, task) for task in report.tasks] for model in compared]
    rows = [["task", *models, *(share_column(model, report.lower_is_better) for model in compared)]]
    for index, task in enumerate(report.tasks):
        rows.append([task, *(number(v[index]) for v in values), *(percent(r[index]) for r in ratios)])
    means = [percent(report.mean_normalized(model)) for model in compared]
    return [*rows, ["mean", *(number(mean(v)) for v in values), *means]]


def layer_rows(report: MergeReport) -> list[list[str]]:
    """A head, and a row per layer in the order of merging; :data:`LAYER_COLUMNS` explains the columns."""
    rows = [["layer", "type", "drift", "cosine", "residual", "condition", "seconds", "note"]]
    start = "average" if report.method.get("anchor", "average") == "average" else "anchor"
    for layer in report.layers:
        means = [mean(list(values.values())) for values in (layer.distance, layer.cosine)]
        numbers = [number(value) for value in (*means, layer.residual, layer.condition)]
        name, notes = layer.name or "(root)", "; ".join(_notes(layer, start))
        rows.append([name, layer.layer_type, *numbers, f"{layer.seconds:.2f}", notes])
    return rows


def _notes(layer: LayerRecord, start: str) -> list[str]:
    notes = []
    if layer.note or layer.shared_with:
        notes.append(layer.note or f"same inputs as {layer.shared_with}")
    if layer.unpaired:
        order = f", {layer.permuted} of them because rows come in another order" if layer.permuted else ""
        notes.append(f"{layer.unpaired} calls merged one-sided{order}")
    if layer.corrected_for:
        notes.append(f"makes up for the drift of {' and '.join(layer.corrected_for)}")
    if layer.uncorrected:
        notes.append(f"{layer.uncorrected} calls could not make up for drift")
    if missed := layer.groups_without_data:
        groups = f"{missed:,} of {layer.groups:,} {_GROUPS.get(layer.layer_type, 'groups')} "
        notes.append(f"{groups if layer.groups > 1 else ''}saw no data")
    if zeros := layer.groups_of_zeros:
        groups = f"{zeros:,} of {layer.groups:,} {_GROUPS.get(layer.layer_type, 'groups')} "
        notes.append(f"{groups if layer.groups > 1 else ''}saw only zeros")
    if layer.calls > 1:
        notes.append(f"merged from the first of {layer.calls} calls")
    if layer.late:
        notes.append(f"{layer.late} forwards came after it was merged")
    if layer.groups_kept_average:
        notes.append(f"{layer.groups_kept_average:,} of {layer.groups:,} keep the {start} because it is better")
    return notes


def origin_rows(report: MergeReport) -> list[list[str]]:
    """A head, and a row per task with the source of its expert; an empty list if it is not known."""
    rows = [[task, origin.source] for task, origin in report.origins.items()]
    return [["task", "expert"], *rows] if rows else []


def averaged_rows(report: MergeReport) -> list[list[str]]:
    """A head, and a row per parameter that was averaged, with the reason; an empty list if none was."""
    averaged = [[n, outcome.detail or ""] for n, outcome in report.parameters.items() if outcome.status == "averaged"]
    return [["parameter", "why"], *averaged] if averaged else []


def title(report: MergeReport) -> str:
    """The heading of a report."""
    return f"Merge of {len(report.tasks)} experts with {report.method.get('class')}"


def settings(report: MergeReport) -> str:
    """The settings of the method in one line."""
    return ", ".join(f"{name}={value}" for name, value in report.method.items() if name != "class")


def versions(report: MergeReport) -> str:
    """The date, the seed of the calibration sample and the versions of packages in one line."""
    date = f"{report.date}; " if report.date else ""
    seed = f"calibration seed {report.seed}; " if report.seed is not None else ""
    return f"{date}{seed}{', '.join(f'{name} {version}' for name, version in report.versions.items())}."


def markdown_report(report: MergeReport) -> str:
    """The whole report as Markdown."""
    options, averaged = settings(report), averaged_rows(report)
    parts = [
        f"# {title(report)}",
        f"Settings: {options}." if options else "",
        *conclusion(report),
        f"## Metrics\n\n{labelled(f'`{report.monitor}`', report.lower_is_better)}\n\n{table(task_rows(report))}"
        if report.metrics
        else "",
        summarize(report),
        "\n".join(f"- **Warning**: {warning}" for warning in report.warnings),
        "## Checked\n\n" + "\n".join(f"- {check}" for check in report.checks) if report.checks else "",
        f"## Size\n\n{SIZE_COLUMNS}\n\n{table(size_rows(report.size))}" if report.size.tasks else "",
        f"## Layers\n\n{LAYER_COLUMNS}\n\n{table(layer_rows(report))}" if report.layers else "",
        f"## Averaged parameters\n\n{table(averaged)}" if averaged else "",
        f"## Experts\n\n{table(origin_rows(report))}" if report.origins else "",
        f"Made with `{report.command}`." if report.command else "",
        versions(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
