"""A report as Markdown, and the rows of its tables, which the web page shows too."""

from __future__ import annotations

from typing import TYPE_CHECKING

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.results.tables import mean, number, percent, table

if TYPE_CHECKING:
    from com_lightning.results.report import MergeReport

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


def task_rows(report: MergeReport) -> list[list[str]]:
    """A head, a row per task with the metric of each model and its share of the expert's, and a row of means."""
    models = [model for model in MODELS if model in report.metrics]
    compared = [model for model in models if model != "expert" and "expert" in models]
    values = [report.values(model) for model in models]
    ratios = [[report.normalized(model, task) for task in report.tasks] for model in compared]
    rows = [["task", *models, *(f"{model} / expert" for model in compared)]]
    for index, task in enumerate(report.tasks):
        rows.append([task, *(number(v[index]) for v in values), *(percent(r[index]) for r in ratios)])
    means = [percent(report.mean_normalized(model)) for model in compared]
    return [*rows, ["mean", *(number(mean(v)) for v in values), *means]]


def layer_rows(report: MergeReport) -> list[list[str]]:
    """A head, and a row per layer in the order of merging; :data:`LAYER_COLUMNS` explains the columns."""
    rows = [["layer", "type", "drift", "cosine", "residual", "condition", "seconds", "note"]]
    for layer in report.layers:
        means = [mean(list(values.values())) for values in (layer.distance, layer.cosine)]
        numbers = [number(value) for value in (*means, layer.residual, layer.condition)]
        name, notes = layer.name or "(root)", "; ".join(_notes(layer))
        rows.append([name, layer.layer_type, *numbers, f"{layer.seconds:.2f}", notes])
    return rows


def _notes(layer: LayerRecord) -> list[str]:
    notes = []
    if layer.note or layer.shared_with:
        notes.append(layer.note or f"same inputs as {layer.shared_with}")
    if layer.unpaired:
        notes.append(f"{layer.unpaired} calls merged one-sided")
    if layer.corrected_for:
        notes.append(f"makes up for the drift of {' and '.join(layer.corrected_for)}")
    if layer.uncorrected:
        notes.append(f"{layer.uncorrected} calls could not make up for drift")
    if missed := layer.groups_without_data:
        groups = f"{missed:,} of {layer.groups:,} {_GROUPS.get(layer.layer_type, 'groups')} "
        notes.append(f"{groups if layer.groups > 1 else ''}saw no data")
    if layer.groups_kept_average:
        notes.append(f"{layer.groups_kept_average:,} of {layer.groups:,} keep the average because it is better")
    return notes


def averaged_rows(report: MergeReport) -> list[list[str]]:
    """A head, and a row per parameter that was averaged, with the reason; an empty list if none was."""
    averaged = [[n, outcome.detail or ""] for n, outcome in report.parameters.items() if outcome.status == "averaged"]
    return [["parameter", "why"], *averaged] if averaged else []


def summary(report: MergeReport) -> str:
    """Data and cost in two lines, then one line for each skipped batch."""
    resumed = f"{report.resumed} layers from an interrupted merge, the rest in " if report.resumed else ""
    cost = f"{resumed}{report.seconds:.1f} s, peak memory {report.peak_memory / 2**30:.2f} GiB"
    phrases = {"private": f"private to their tasks{_private(report)}", "buffer": "in buffers that are left unchanged"}
    sizes = ", ".join(f"{count:,} {phrases.get(what, what)}" for what, count in report.sizes.items() if count)
    lines = [f"{report.method.get('class', 'merge')}: {_data(report)}; {cost}.", f"Values: {sizes}."]
    return "\n".join([*lines, *(f"Skipped: {batch}." for batch in report.skipped)])


def _data(report: MergeReport) -> str:
    counts = sorted(set(report.samples.values()))
    if not counts:
        return "no calibration data"
    total = sum(overlap or 0 for overlap in report.overlap.values())
    overlap = f"{total} of them in total are validated too" if total else "none of them is validated too"
    if None in report.overlap.values():
        overlap = "it is not known how many of them are validated too"
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} calibration samples per task ({overlap})"


def _private(report: MergeReport) -> str:
    """The names of a few private parameters, in brackets, and how many were solved."""
    statuses = [outcome.status for outcome in report.parameters.values()]
    refitted = statuses.count("private, solved for the merged model")
    solved = statuses.count("private, solved for each task")
    private = ("private", "private, solved for the merged model")
    names = [name for name, outcome in report.parameters.items() if outcome.status in private]
    entries = [*names[:4], *["..."] * (len(names) > 4)]
    entries += [f"{refitted} of them solved for the merged model"] * bool(refitted)
    entries += [f"{solved} biases and norms solved for each task"] * bool(solved)
    return f" ({', '.join(entries)})" if entries else ""


def title(report: MergeReport) -> str:
    """The heading of a report."""
    return f"Merge of {len(report.tasks)} experts with {report.method.get('class')}"


def settings(report: MergeReport) -> str:
    """The settings of the method in one line."""
    return ", ".join(f"{name}={value}" for name, value in report.method.items() if name != "class")


def versions(report: MergeReport) -> str:
    """The seed of the calibration sample and the versions of packages in one line."""
    seed = f"Calibration seed {report.seed}; " if report.seed is not None else ""
    return f"{seed}{', '.join(f'{name} {version}' for name, version in report.versions.items())}."


def markdown_report(report: MergeReport) -> str:
    """The whole report as Markdown."""
    options, averaged = settings(report), averaged_rows(report)
    parts = [
        f"# {title(report)}",
        f"Settings: {options}." if options else "",
        f"## Metrics\n\n`{report.monitor}`\n\n{table(task_rows(report))}" if report.metrics else "",
        summary(report),
        "\n".join(f"- **Warning**: {warning}" for warning in report.warnings),
        f"## Layers\n\n{LAYER_COLUMNS}\n\n{table(layer_rows(report))}" if report.layers else "",
        f"## Averaged parameters\n\n{table(averaged)}" if averaged else "",
        versions(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
