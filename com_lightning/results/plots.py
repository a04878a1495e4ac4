"""One picture of a merge: the tasks before and after, and the covariate shift from layer to layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from com_lightning.results.report import MergeReport


def save_figure(report: MergeReport, path: Path) -> bool:
    """Draw a report. Returns whether there was matplotlib, and anything to draw."""
    figure = draw(report)
    if figure is not None:
        figure.savefig(path, dpi=130)
    return figure is not None


def draw(report: MergeReport) -> Any:
    """The picture of a report, as matplotlib's Figure; ``None`` without matplotlib, or anything to draw."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    kinds = [kind for kind in ("expert", "average", "merged") if kind in report.metrics]
    layers = [layer for layer in report.layers if layer.task is None]
    shifts = {task: [layer.distance.get(task) for layer in layers] for task in report.tasks}
    with_shift = any(value is not None for values in shifts.values() for value in values)
    if not kinds and not with_shift:
        return None
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, int(bool(kinds)) + int(with_shift), squeeze=False)[0]
    if kinds:
        axes = panels[0]
        width = 0.8 / len(kinds)
        colors = {"expert": "#9aa5b1", "average": "#e0a458", "merged": "#2a6f97"}
        for number, kind in enumerate(kinds):
            heights = [report.metrics[kind].get(task, {}).get(report.metric or "", 0.0) for task in report.tasks]
            places = [position + (number - (len(kinds) - 1) / 2) * width for position in range(len(report.tasks))]
            axes.bar(places, heights, width, label=kind, color=colors[kind])
        tilted = len(report.tasks) > 4 or max(map(len, report.tasks)) > 12
        axes.set_xticks(range(len(report.tasks)), report.tasks, **({"rotation": 20, "ha": "right"} if tilted else {}))
        axes.set_ylabel(report.metric or "")
        axes.set_title(f"each task before and after the merge ({report.method.get('class')})")
        axes.margins(y=0.2)  # room for the legend above the bars
        axes.legend(loc="upper center", ncols=len(kinds), frameon=False, columnspacing=1.2)
    if with_shift:
        axes = panels[-1]
        for task, values in shifts.items():
            known = [(number, value) for number, value in enumerate(values) if value is not None]
            axes.plot([n for n, _ in known], [value for _, value in known], marker=".", linewidth=1, label=task)
        for number, value in _spikes(shifts):
            name = layers[number].name or "(root)"
            axes.annotate(name, (number, value), xytext=(0, 3), textcoords="offset points", fontsize=7, ha="center")
        axes.set_xlabel("layer, in the order of merging")
        axes.set_ylabel("relative distance to the expert's input")
        axes.set_title("covariate shift on arrival")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        beside = len(report.tasks) > 4  # or it would hide the curves
        axes.legend(**({"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "frameon": False} if beside else {}))
    return figure


def _spikes(shifts: Mapping[str, Sequence[float | None]], most: int = 3) -> list[tuple[int, float]]:
    """Number and height of the layers that stand out most: peaks of the highest curve, twice its median at least."""
    highest = [max((value for value in values if value is not None), default=0.0) for values in zip(*shifts.values())]
    padded = [0.0, *highest, 0.0]
    typical = sorted(highest)[len(highest) // 2] if highest else 0.0
    peaks = [
        (number, value)
        for number, value in enumerate(highest)
        if value >= 2 * typical and value > 0 and padded[number] < value >= padded[number + 2]
    ]
    return sorted(sorted(peaks, key=lambda peak: -peak[1])[:most])
