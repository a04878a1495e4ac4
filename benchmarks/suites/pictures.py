"""Pictures of results: methods side by side, the effect of more calibration samples, and accuracy against size."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.suites.labels import short
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.results import Results, Row

CHAIN, WITH_DATA, WITHOUT, GREY = "#8172b3", "#2a6f97", "#e0a458", "#9aa5b1"
_KINDS = {
    CHAIN: "chain of merges",
    WITH_DATA: "other rules that read calibration data",
    WITHOUT: "rules without data",
    GREY: "joint training, no merge",
}


def colour(row: Row) -> str:
    """The colour of a method's bar: its kind."""
    if row.label == JOINT:
        return GREY
    if row.label.startswith("chain") or row.label.startswith("task_adapters(method=chain"):
        return CHAIN
    return WITH_DATA if row.samples else WITHOUT


def draw_bars(results: Results, rows: Sequence[Row]) -> None:
    """The methods, best first: ``<suite>.png``."""
    labels = [short(row.label) for row in rows]
    longest = max(map(len, labels), default=0)
    figure = Figure(figsize=(5 + 0.062 * longest, 1.6 + 0.2 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for kind, what in _KINDS.items():
        some = [(place, row) for place, row in enumerate(rows) if colour(row) == kind]
        if some:
            draw_row_bars(axes, some, kind, what)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_title(results.suite.title, fontsize=10)
    axes.set_xlabel(_what(results) + ("\ntuned: chosen on val" if any("tuned" in label for label in labels) else ""))
    axes.xaxis.label.set_fontsize(8.5)
    axes.set_xlim(0, 110)
    axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
    figure.legend(frameon=False, fontsize=8, ncols=2, loc="outside lower center")
    _save(figure, results, ".png")


def draw_row_bars(axes: Axes, rows: Sequence[tuple[float, Row]], color: str, label: str | None = None) -> None:
    """Bars at some places, with error bars and numbers. A single seed has no error bar: its spread is not known."""
    values = [100 * row.mean for _, row in rows]
    spreads = [100 * row.spread if len(row.scores) > 1 else float("nan") for _, row in rows]
    style: dict[str, Any] = {"ecolor": "#333333", "capsize": 1.5, "error_kw": {"linewidth": 0.8}, "height": 0.75}
    bars = axes.barh([place for place, _ in rows], values, xerr=spreads, color=color, label=label, **style)
    for bar, value, between in zip(bars, values, spreads):
        end = value + (between if between == between else 0)
        axes.text(end + 1, bar.get_y() + bar.get_height() / 2, f"{value:.1f}", va="center", fontsize=7)


def draw_samples(results: Results, several: Mapping[str, Mapping[int, Row]], average: Row | None) -> None:
    """Each method against its number of calibration samples: ``<suite>-samples.png``."""
    figure = Figure(figsize=(9, 5 + 0.18 * len(several)), layout="constrained")
    axes = figure.subplots()
    colors: Any = colormaps["tab10"].colors  # type: ignore[attr-defined]
    for place, (label, rows) in enumerate(several.items()):
        numbers = sorted(rows)
        values, spreads = ([100 * getattr(rows[n], name) for n in numbers] for name in ("mean", "spread"))
        style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "linewidth": 1.4}
        line = ["-", "--", ":"][place // len(colors) % 3]
        color = colors[place % len(colors)]
        axes.errorbar(numbers, values, spreads, label=short(label), color=color, linestyle=line, **style)
    if average is not None:
        axes.axhline(100 * average.mean, color=GREY, linestyle="--", label="average (no data)")
    axes.set_xscale("log", base=2)
    ticks = sorted({number for rows in several.values() for number in rows})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_title(results.suite.title, fontsize=10)
    axes.set_xlabel("calibration samples a task", fontsize=9)
    axes.set_ylabel(_what(results), fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    axes.grid(alpha=0.3)
    _save(figure, results, "-samples.png")


def draw_size(results: Results, series: Mapping[str, Sequence[Row]], lines: Mapping[str, Row]) -> None:
    """Accuracy against what each task adds to the shared model: ``<suite>-size.png``.

    Args:
        results: the suite and where the picture is written.
        series: name -> its rows, from small to large.
        lines: name -> row that all others are compared with, as a horizontal line.
    """
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    colors: Any = colormaps["tab10"].colors  # type: ignore[attr-defined]
    others = iter([colors[1], colors[2], colors[3], colors[5], colors[6], colors[8], colors[9]] * 9)
    ours = iter([CHAIN, colors[0], colors[7]] * 9)
    for name, rows in series.items():
        sizes, values = ([100 * getattr(row, what) for row in rows] for what in ("per_task", "mean"))
        spreads = [100 * row.spread if len(row.scores) > 1 else float("nan") for row in rows]
        chained = name.startswith("chain")
        style: dict[str, Any] = {"marker": "o" if chained else "s", "markersize": 4, "capsize": 2, "linewidth": 1.4}
        color = next(ours) if chained else next(others)
        label = f"{name}, adapters" if chained else name
        axes.errorbar(sizes, values, spreads, label=label, color=color, linestyle="-" if chained else "--", **style)
    for (name, row), line in zip(lines.items(), ("--", ":", "-.") * len(lines)):
        axes.axhline(100 * row.mean, color="#666666", linewidth=1, linestyle=line, label=name)
    axes.axhline(100, color=GREY, linewidth=0.8)
    axes.set_xscale("symlog", linthresh=1)
    largest = max((100 * row.per_task for rows in series.values() for row in rows), default=1)
    axes.set_xlim(left=-0.05)
    ticks = [tick for tick in (0, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick <= 2 * largest]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    lowest = min((100 * row.mean for rows in series.values() for row in rows), default=0)
    axes.set_ylim(max(lowest - 3, 0), 102)
    axes.set_title(results.suite.title, fontsize=10)
    axes.set_xlabel(
        "values that each task adds, % of the model (heads, which experts have too, not counted)", fontsize=9
    )
    axes.set_ylabel(_what(results), fontsize=9)
    figure.legend(frameon=False, fontsize=8, ncols=3, loc="outside lower center")
    axes.grid(alpha=0.3)
    _save(figure, results, "-size.png")


def _what(results: Results) -> str:
    suite = results.suite
    what = "perplexity (experts' / merged, %)" if suite.lower_is_better else "accuracy (merged / expert, %)"
    return f"normalised {what},\nmean of {len(suite.tasks)} tasks"


def _save(figure: Figure, results: Results, ending: str) -> None:
    """Write under another name first, so that the picture is always complete."""
    target = results.path.with_name(results.path.name + ending)
    temporary = target.with_suffix(f".{os.getpid()}.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(target)
