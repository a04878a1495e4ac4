"""Pictures of a comparison: methods side by side, task by task, and the drift of inputs with and without a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from com_lightning.analysis.comparison import Comparison
from com_lightning.analysis.size_plot import draw_sizes
from com_lightning.results.figures import new_figure
from com_lightning.results.importance_plot import save_importance
from com_lightning.results.tables import number


def save_pictures(comparison: Comparison, folder: Path) -> bool:
    """Draw ``methods.png``, ``tasks.png``, and where they apply ``drift.png``, ``size.png`` and ``importance.png``.

    Args:
        comparison: What to draw.
        folder: Where to write the pictures.

    Returns:
        Whether matplotlib is installed. Without it, there is a warning in place of pictures.
    """
    if new_figure(1, 1) is None:
        return False
    _save(folder / "methods.png", (8, 1.2 + 0.35 * len(comparison.rows)), lambda axes: _bars(axes, comparison))
    wide, high = 3.5 + 0.9 * len(comparison.tasks), 1.4 + 0.35 * len(comparison.rows)
    _save(folder / "tasks.png", (max(wide, 5.5), high), lambda axes: _heat_map(axes, comparison))
    if comparison.average_drift:
        _save(folder / "drift.png", (9, 4.2), lambda axes: _drift(axes, comparison))
    if comparison.sizes_differ:
        _save(folder / "size.png", (8.5, 4.8), lambda axes: draw_sizes(axes, comparison))
    save_importance({row.label: row.outcomes[0].importance for row in comparison.rows}, folder / "importance.png")
    return True


def _save(path: Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    figure = new_figure(*size)
    assert figure is not None
    draw(figure.subplots())
    figure.savefig(path, dpi=130)


def _bars(axes: Any, comparison: Comparison) -> None:
    rows, factor = comparison.rows, 100 if comparison.by_share else 1
    values = [factor * (row.score or 0.0) for row in rows]
    spreads = [float("nan") if row.spread is None else factor * row.spread for row in rows]
    spread = any(value == value for value in spreads)
    places = range(len(values))
    colors = ["#2a6f97" if row.outcomes[0].drift else "#e0a458" for row in comparison.rows]
    axes.barh(places, values, xerr=spreads if spread else None, color=colors, capsize=3)
    axes.set_yticks(places, [row.label for row in comparison.rows], fontsize=8)
    axes.invert_yaxis()
    seeds = max(len(row.outcomes) for row in comparison.rows)
    whiskers = f"; standard deviation between {seeds} seeds" if spread else ""
    axes.set_xlabel(f"mean {comparison.score_label}{whiskers}")


def _heat_map(axes: Any, comparison: Comparison) -> None:
    rows, tasks = comparison.rows, comparison.tasks
    factor = 100 if comparison.by_share else 1
    values = [[(row.normalized if comparison.by_share else row.absolute)[task] for task in tasks] for row in rows]
    cells = [[float("nan") if value is None else factor * value for value in row] for row in values]
    image = axes.imshow(cells, aspect="auto", cmap="viridis_r" if comparison.lower_score_is_better else "viridis")
    axes.figure.colorbar(image, ax=axes, label=comparison.score_label)
    middle = sum(image.get_clim()) / 2
    for y, row in enumerate(rows):
        for x, task in enumerate(tasks):
            light = (cells[y][x] < middle) != comparison.lower_score_is_better
            text = number(row.absolute[task])
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if light else "black")
    axes.set_xticks(range(len(tasks)), tasks, rotation=20, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)


def _drift(axes: Any, comparison: Comparison) -> None:
    """Curves of the mean over tasks, with the range between tasks, for each chain and for the average."""
    curves = {"average (no chain)": comparison.average_drift}
    curves.update({row.label: row.outcomes[0].drift for row in comparison.rows if row.outcomes[0].drift})
    places: dict[str, int] = {}
    for curve in [*list(curves.values())[1:], comparison.average_drift]:
        for layer, _ in curve:
            places.setdefault(layer, len(places))
    colors = ["#9aa5b1", "#2a6f97", "#c1553b", "#6a994e", "#7b5ea7", "#b08900"]
    for index, (label, curve) in enumerate(curves.items()):
        points = [(places[layer], list(values.values())) for layer, values in curve if values]
        x = [place for place, _ in points]
        color = colors[index % len(colors)]
        axes.plot(x, [_average(v) for _, v in points], marker=".", linewidth=1.2, label=label, color=color)
        axes.fill_between(x, [min(v) for _, v in points], [max(v) for _, v in points], alpha=0.15, color=color)
    axes.set_xlabel("layer, in the order of merging")
    axes.set_ylabel("relative distance to the expert's input")
    axes.set_title("drift of inputs: mean and range over tasks, first seed", fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)


def _average(values: Sequence[float]) -> float:
    return sum(values) / len(values)
