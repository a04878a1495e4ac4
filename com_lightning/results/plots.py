"""One picture of a merge: each task before and after, and the drift of inputs from layer to layer.

Drift is how far the inputs of a layer in the merged model are from those in the experts, the covariate shift that a
chain of merges is about.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from com_lightning.results.figures import new_figure
from com_lightning.results.report import MODELS, MergeReport

_COLORS = {"expert": "#9aa5b1", "average": "#e0a458", "merged": "#2a6f97"}


def save_figure(report: MergeReport, path: Path) -> bool:
    """Draw a report and save the picture. Returns whether :func:`draw` has drawn one."""
    figure = draw(report)
    if figure is not None:
        figure.savefig(path, dpi=130)
    return figure is not None


def draw(report: MergeReport) -> Any:
    """The picture as a ``matplotlib.figure.Figure``; ``None`` without matplotlib, or if there is nothing to draw."""
    layers = [layer for layer in report.layers if layer.task is None]
    drift = {task: [layer.distance.get(task) for layer in layers] for task in report.tasks}
    has_drift = any(value is not None for values in drift.values() for value in values)
    has_metrics = any(model in report.metrics for model in MODELS)
    if not has_metrics and not has_drift:
        return None
    if (figure := new_figure(11, 4.2)) is None:
        return None
    panels = figure.subplots(1, has_metrics + has_drift, squeeze=False)[0]
    if has_metrics:
        _draw_tasks(panels[0], report)
    if has_drift:
        _draw_drift(panels[-1], drift, [layer.name or "(root)" for layer in layers])
    return figure


def _draw_tasks(axes: Any, report: MergeReport) -> None:
    """Bars of the monitored metric, side by side for each task."""
    models = [model for model in MODELS if model in report.metrics]
    width = 0.8 / len(models)
    for index, model in enumerate(models):
        heights = [value or 0.0 for value in report.values(model)]
        places = [position + (index - (len(models) - 1) / 2) * width for position in range(len(report.tasks))]
        axes.bar(places, heights, width, label=model, color=_COLORS[model])
    crowded = len(report.tasks) > 4 or max(map(len, report.tasks)) > 12
    axes.set_xticks(range(len(report.tasks)), report.tasks, **({"rotation": 20, "ha": "right"} if crowded else {}))
    axes.set_ylabel(report.monitor_label if report.monitor else "")
    axes.set_title(f"each task before and after the merge ({report.method.get('class')})")
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(loc="upper center", ncols=len(models), frameon=False, columnspacing=1.2)


def _draw_drift(axes: Any, drift: Mapping[str, Sequence[float | None]], layers: Sequence[str]) -> None:
    """A curve per task, with the names of the layers that stand out."""
    for task, values in drift.items():
        points = [(index, value) for index, value in enumerate(values) if value is not None]
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", linewidth=1, label=task)
    for index, value in _spikes(drift):
        label = {"xytext": (0, 3), "textcoords": "offset points", "fontsize": 7, "ha": "center"}
        axes.annotate(layers[index], (index, value), **label)
    axes.set_xlabel("layer, in the order of merging")
    axes.set_ylabel("relative distance to the expert's input")
    axes.set_title("drift of each layer's inputs, before it is merged")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    beside = len(drift) > 4  # a long legend would hide the curves
    axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False} if beside else {}))


def _spikes(drift: Mapping[str, Sequence[float | None]], count: int = 3) -> list[tuple[int, float]]:
    """Index and height of the layers that stand out most: peaks of the highest curve, at least twice its median."""
    highest = [max((value for value in values if value is not None), default=0.0) for values in zip(*drift.values())]
    padded = [0.0, *highest, 0.0]
    median = sorted(highest)[len(highest) // 2] if highest else 0.0
    peaks = [
        (index, value)
        for index, value in enumerate(highest)
        if value >= 2 * median and value > 0 and padded[index] < value >= padded[index + 2]
    ]
    return sorted(sorted(peaks, key=lambda peak: -peak[1])[:count])
