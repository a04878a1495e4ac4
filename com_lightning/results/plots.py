"""One picture of a merge: each task before and after, and the drift of inputs from layer to layer.

Drift is how far the inputs of a layer in the merged model are from those in the experts, the covariate shift that a
chain of merges is about.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from com_lightning.results.figures import new_figure, no_pictures
from com_lightning.results.importance_plot import draw_importance, importance_of
from com_lightning.results.report import MODELS, MergeReport

_COLORS = {"expert": "#9aa5b1", "average": "#e0a458", "merged": "#2a6f97"}
_TURNED: dict[str, Any] = {"rotation": 25, "ha": "right", "rotation_mode": "anchor"}


def save_figure(report: MergeReport, path: Path) -> bool:
    """Draw a report and save the picture. Returns whether :func:`draw` has drawn one."""
    figure = draw(report)
    if figure is not None:
        figure.savefig(path, dpi=130)
    return figure is not None


def draw(report: MergeReport) -> Any:
    """The picture as a ``matplotlib.figure.Figure``; ``None`` without matplotlib, or if there is nothing to draw."""
    return _figure(panels) if (panels := [draw for draw, _ in _panels(report)]) else None


def pictures(report: MergeReport) -> list[tuple[bytes, str]]:
    """The panels of the picture one by one, and that of importance if there is one, for pages of any width.

    Args:
        report: Report of a merge.

    Returns:
        PNG and description of each; an empty list without matplotlib, or if there is nothing to draw.
    """
    if no_pictures():
        return []
    drawn = [(png(_figure([panel])), description) for panel, description in _panels(report)]
    importance = draw_importance({"": importance_of(report.layers)})
    described = "similarity of each task's inputs, and its importance, from layer to layer"
    return [*drawn, *([(png(importance), described)] if importance is not None else [])]


def png(figure: Any) -> bytes:
    """A figure of matplotlib as a PNG."""
    file = BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def _panels(report: MergeReport) -> list[tuple[Callable[[Any], None], str]]:
    """What draws each panel that there is something for, and what it shows."""
    layers = [layer for layer in report.layers if layer.task is None]
    drift = {task: [layer.distance.get(task) for layer in layers] for task in report.tasks}
    panels: list[tuple[Callable[[Any], None], str]] = []
    if any(model in report.metrics for model in MODELS):
        panels.append((partial(_draw_tasks, report=report), "each task before and after the merge"))
    if any(value is not None for values in drift.values() for value in values):
        names = [layer.name or "(root)" for layer in layers]
        panels.append((partial(_draw_drift, drift=drift, layers=names), "the drift of inputs from layer to layer"))
    return panels


def _figure(panels: Sequence[Callable[[Any], None]]) -> Any:
    figure = new_figure(5.6 * len(panels), 4.0)
    if figure is None:
        return None
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]):
        panel(axes)
    return figure


def _draw_tasks(axes: Any, report: MergeReport) -> None:
    """Bars for each task: shares of the expert's metric if all tasks have one, else the metric itself."""
    from matplotlib.patheffects import withStroke

    compared = [model for model in ("average", "merged") if model in report.metrics]
    shares = {model: [report.normalized(model, task) for task in report.tasks] for model in compared}
    by_share = bool(shares) and not any(value is None for values in shares.values() for value in values)
    values = shares if by_share else {model: report.values(model) for model in MODELS if model in report.metrics}
    factor, places = (100 if by_share else 1), range(len(report.tasks))
    width = 0.8 / len(values)
    halo = [withStroke(linewidth=3, foreground="white")]  # the line at 100 % may cross a label
    small = {"fontsize": 7 if len(report.tasks) * len(values) > 8 else 8}
    for index, (model, column) in enumerate(values.items()):
        heights = [factor * (value or 0.0) for value in column]
        labels = ["" if value is None else f"{factor * value:.{0 if by_share else 2}f}" for value in column]
        across = [place + (index - (len(values) - 1) / 2) * width for place in places]
        bars = axes.bar(across, heights, width * 0.94, label=model, color=_COLORS[model])
        axes.bar_label(bars, labels, padding=1, path_effects=halo, **small)
    if by_share:
        axes.axhline(100, color="#4b5563", linestyle="--", linewidth=1, zorder=0, label="expert")
        axes.set_ylabel(f"{report.monitor}: share of the expert's (%)")
    else:
        axes.set_ylabel(report.monitor_label if report.monitor else "")
    longest = max(map(len, report.tasks), default=0)
    crowded = len(report.tasks) * max(longest, 4) > 50
    axes.set_xticks(places, report.tasks, **(_TURNED if crowded else {}))
    axes.set_title(f"each task before and after the merge ({report.method.get('class')})", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.2)  # room for the legend above the bars
    axes.legend(loc="upper center", ncols=len(values) + 1, frameon=False, columnspacing=1.2)


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
    axes.set_title("drift of each layer's inputs, before it is merged", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
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
