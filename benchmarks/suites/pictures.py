"""Pictures of results: methods side by side, and the effect of more calibration samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from benchmarks.suites.results import Results, Row

WITH_DATA, WITHOUT, GREY = "#2a6f97", "#e0a458", "#9aa5b1"


def draw_bars(results: Results, rows: Sequence[Row]) -> None:
    """The methods, best first: ``<suite>.png``."""
    longest = max((len(row.label) for row in rows), default=0)
    figure = Figure(figsize=(5 + 0.062 * longest, 1.4 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for with_data, color in ((True, WITH_DATA), (False, WITHOUT)):
        some = [(place, row) for place, row in enumerate(rows) if bool(row.samples) == with_data]
        values = [100 * row.mean for _, row in some]
        # A single seed has no error bar, because its spread is not known.
        spreads = [100 * row.spread if len(row.scores) > 1 else float("nan") for _, row in some]
        label = "reads calibration data" if with_data else "reads none"
        style: dict[str, Any] = {"ecolor": "#333333", "capsize": 2, "error_kw": {"linewidth": 1}}
        bars = axes.barh([place for place, _ in some], values, xerr=spreads, color=color, label=label, **style)
        for bar, value, between in zip(bars, values, spreads):
            end = value + (between if between == between else 0)
            axes.text(end + 1, bar.get_y() + bar.get_height() / 2, f"{value:.1f}", va="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    chosen = "\n=val: chosen on val" if any(row.entries[0].tried for row in rows) else ""
    axes.set_xlabel(_what(results).replace(", mean", ",\nmean") + chosen, fontsize=9)
    axes.set_xlim(0, 108)
    axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
    if len({bool(row.samples) for row in rows}) > 1:
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    _save(figure, results, ".png")


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
        axes.errorbar(numbers, values, spreads, label=label, color=colors[place % len(colors)], linestyle=line, **style)
    if average is not None:
        axes.axhline(100 * average.mean, color=GREY, linestyle="--", label="average (no data)")
    axes.set_xscale("log", base=2)
    ticks = sorted({number for rows in several.values() for number in rows})
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.set_xlabel("calibration samples a task")
    axes.set_ylabel(_what(results).replace(", mean", ",\nmean"), fontsize=9)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center")
    axes.grid(alpha=0.3)
    _save(figure, results, "-samples.png")


def _what(results: Results) -> str:
    suite = results.suite
    what = "perplexity (experts' / merged, %)" if suite.lower_is_better else "accuracy (merged / expert, %)"
    return f"{suite.name}: normalised {what}, mean of {len(suite.tasks)} tasks"


def _save(figure: Figure, results: Results, ending: str) -> None:
    """Write under another name first, so that the picture is always complete."""
    target = results.path.with_name(results.path.name + ending)
    temporary = target.with_suffix(f".{os.getpid()}.png")
    figure.savefig(temporary, dpi=130)
    temporary.replace(target)
