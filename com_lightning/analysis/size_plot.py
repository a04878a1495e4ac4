"""Accuracy against size: a point for each rule, and a line through those of a rule with results of many sizes."""

from __future__ import annotations

import itertools
from statistics import fmean
from typing import Any

from com_lightning.analysis.comparison import Comparison, Row

_COLORS = ("#2a6f97", "#c1553b", "#6a994e", "#7b5ea7", "#b08900", "#3d9a9a")
_OTHERS = "#6b7280"
_LONGEST = 48
"""Characters of a label."""
_GAP = 0.042
"""The least distance between the labels of two rules of one size, as a share of the height."""


def draw_sizes(axes: Any, comparison: Comparison) -> None:
    """Draw the metric of each rule against the bytes of the merged models of all tasks.

    Args:
        axes: of matplotlib.
        comparison: what to draw. Rules without a size or a score are left out.
    """
    factor = 100 if comparison.by_share else 1
    rows = [row for row in comparison.rows if row.size and row.score is not None]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row.outcomes[0].rule or row.label, []).append(row)
    lines = {name: sorted(members, key=lambda row: row.size or 0) for name, members in lines.items()}
    curves = {name: members for name, members in lines.items() if len({row.size for row in members}) > 1}
    singles = [row for name, members in lines.items() if name not in curves for row in members]
    best = max(curves, key=lambda name: fmean(row.score or 0.0 for row in curves[name]), default=None)
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]
    for (name, members), color in zip(curves.items(), itertools.cycle(_COLORS)):
        x, y = [_mb(row) for row in members], [factor * (row.score or 0.0) for row in members]
        spreads = [factor * row.spread if row.spread is not None else 0.0 for row in members]
        bars = spreads if any(spreads) else None
        axes.errorbar(x, y, yerr=bars, color=color, marker="o", markersize=5, capsize=3, label=name)
        # Labels of the best curve are above it, and those of the others below, so that they meet less often.
        side = (0, 7) if (name == best) != comparison.lower_score_is_better else (0, -7)
        style: dict[str, Any] = {
            "textcoords": "offset points",
            "ha": "center",
            "va": "bottom" if side[1] > 0 else "top",
        }
        for row, place, height in zip(members, x, y):
            text = axes.annotate(_setting(row), (place, height), side, **style, fontsize=8, color=color, zorder=5)
            text.set_path_effects(halo)
    axes.margins(x=0.08)
    _label_singles(axes, comparison, singles, factor)
    whole = next((row.outcomes[0].size[1] for row in rows if row.outcomes[0].size), 0)
    seeds = max(len(row.outcomes) for row in comparison.rows)
    axes.set_ylabel(f"mean {comparison.score_label}")
    axes.set_xlabel("MB of the merged models of all tasks")
    axes.set_title(
        f"accuracy against size{f'; standard deviation between {seeds} seeds' if seeds > 1 else ''}",
        fontsize=10,
        pad=10,
    )
    if comparison.by_share:
        text = f"{len(comparison.tasks)} experts, {whole / 1e6:,.3g} MB"
        axes.axhline(100, color=_OTHERS, linewidth=0.9, linestyle="--", label=text)
    if whole:
        above = axes.secondary_xaxis("top", functions=(lambda mb: 1e8 * mb / whole, lambda part: part * whole / 1e8))
        above.set_xlabel("% of the experts as full models", fontsize=8)
        above.tick_params(labelsize=8)
    if curves or comparison.by_share:
        axes.legend(frameon=False, loc="upper right" if comparison.lower_score_is_better else "lower right", fontsize=9)
    axes.grid(alpha=0.25)
    axes.spines[["right"]].set_visible(False)


def _label_singles(axes: Any, comparison: Comparison, rows: list[Row], factor: float) -> None:
    """Points of rules of one size, with labels that do not lie on each other."""
    if not rows:
        return
    heights = [factor * (row.score or 0.0) for row in comparison.rows if row.size and row.score is not None]
    low, high = min(heights), max([*heights, 100.0] if comparison.by_share else heights)
    margin = 0.1 * (high - low or 1.0)
    axes.set_ylim(low - 1.5 * margin, high + margin)
    places = [_mb(row) for row in comparison.rows if row.size]
    shift = 0.02 * (max(places) - min(places) or 1.0)
    gap, taken = _GAP * (high - low + 2.5 * margin), float("-inf")
    for row in sorted(rows, key=lambda row: row.score or 0.0):
        place, height = _mb(row), factor * (row.score or 0.0)
        taken = max(height, taken + gap)
        axes.plot([place], [height], marker="o", markersize=5, color=_OTHERS)
        label = row.label if len(row.label) <= _LONGEST else f"{row.label[: _LONGEST - 3]}..."
        line = {"arrowstyle": "-", "color": _OTHERS, "linewidth": 0.6}
        axes.annotate(
            label, (place, height), (place + shift, taken), va="center", fontsize=8, color=_OTHERS, arrowprops=line
        )


def _mb(row: Row) -> float:
    return (row.size or 0) / 1e6


def _setting(row: Row) -> str:
    """The settings of a point on a line in a few words."""
    settings = row.outcomes[0].size_settings
    words = [f"rank {value}" for name, value in settings.items() if name.endswith("rank") and value]
    words += [name.replace("_", " ") for name, value in settings.items() if value is True]
    words += [f"{100 * value:g} %" for value in settings.values() if isinstance(value, float) and value]
    return ", ".join(words) or "shared alone"
