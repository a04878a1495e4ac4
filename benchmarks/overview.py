"""The first picture of the README, drawn from the results of the suites: ``python -m benchmarks.overview``."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from benchmarks.suites.ablation import main_rows
from benchmarks.suites.overview import best_without_data
from benchmarks.suites.pictures import GREY
from benchmarks.suites.pictures import colour as bar_colour
from benchmarks.suites.rules import canonical
from benchmarks.suites.tables import MAIN_SAMPLES

SUITE = "images8"
AS_THEY_ARE = {
    "average": "average",
    "best of the rules without data": "",
    "RegMean": "regmean",
    "RegMean++": "regmean_plus_plus",
    "chain": "chain(refit_heads=False)",
}
REFITTED = {
    "RegMean": "refitted(method=regmean)",
    "RegMean++": "refitted(method=regmean_plus_plus)",
    "chain (the default)": "chain",
    "… with sensitivity, balance": "chain(sensitivity=probabilities, balance=True)",
    "chain, adapters of rank 2": "chain(task_rank=2)",
    "chain, adapters of rank 8": "chain(task_rank=8)",
}
"""Bar -> method: with the experts' heads, and with heads that are solved for the merged model."""
TASKS = ("#4c72b0", "#dd8452", "#55a868")


def draw(folder: Path, path: Path) -> None:
    """Draw how three experts become one model, and how well that works on eight image tasks."""
    figure = Figure(figsize=(12.4, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    _scheme(left)
    _bars(right, folder)
    figure.savefig(path, dpi=150)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str, shade: float) -> None:
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=colour, ec="none", alpha=shade))
    axes.text(x + width / 2, y + height / 2, label, ha="center", va="center", fontsize=8.5)


def _scheme(axes: Axes) -> None:
    axes.set(xlim=(-0.2, 9.6), ylim=(-1.05, 4.5))
    axes.axis("off")
    for column, colour in enumerate(TASKS):
        x = 1.25 * column
        for row in range(4):
            _box(axes, x, 0.85 * row, 1.05, 0.62, colour, f"layer {row + 1}", 0.55)
        axes.text(x + 0.525, -0.3, f"task {'ABC'[column]}", ha="center", va="center", fontsize=9)
    axes.text(1.77, 4.1, "experts: one base, fine-tuned", ha="center", va="center", fontsize=10)
    for row in range(4):
        merged, now = row < 2, row == 2
        _box(axes, 6.3, 0.85 * row, 1.9, 0.62, "#8172b3" if row < 3 else "#cccccc", f"layer {row + 1}", 0.75)
        arrow = FancyArrowPatch((3.7, 0.85 * row + 0.31), (6.2, 0.85 * row + 0.31), arrowstyle="-|>", mutation_scale=11)
        arrow.set(color="black" if now else "#bbbbbb", linewidth=1.4 if now else 0.8)
        axes.add_patch(arrow)
        state = "merged" if merged else "being merged" if now else "still average"
        axes.text(8.35, 0.85 * row + 0.31, state, va="center", fontsize=8.5, color="black" if now else "#777777")
    axes.text(4.95, 2.17, "least squares", ha="center", va="bottom", fontsize=8.5)
    axes.text(4.95, 1.86, "in closed form", ha="center", va="top", fontsize=8.5)
    axes.text(7.25, 4.1, "one model", ha="center", va="center", fontsize=10)
    up = FancyArrowPatch((7.25, -0.35), (7.25, -0.05), arrowstyle="-|>", mutation_scale=11, color="black")
    axes.add_patch(up)
    axes.text(7.25, -0.52, "a few hundred samples of each task, no labels", ha="center", va="center", fontsize=8.5)
    axes.text(7.25, -0.92, "each layer is fitted to what the merged layers below it give", ha="center", fontsize=8.5)


def _bars(axes: Axes, folder: Path) -> None:
    rows = main_rows(folder)[SUITE]
    groups = (AS_THEY_ARE, "heads as they are"), (REFITTED, "heads refitted")
    position, places, labels = 0.0, list[float](), list[str]()
    for bars, what in groups:
        axes.text(-2, position, what, ha="right", va="center", fontsize=9, fontweight="bold")
        for label, method in bars.items():
            position += 1
            row = rows.get(canonical(method)) if method else best_without_data(rows)
            if row is None:
                raise SystemExit(f"{SUITE} was not measured with {method or 'any rule without data'}")
            colour = GREY if method == "average" else bar_colour(row)
            axes.barh(position, 100 * row.mean, xerr=100 * row.spread, color=colour, height=0.72, error_kw={"lw": 1})
            axes.text(100 * (row.mean + row.spread) + 1.5, position, f"{100 * row.mean:.0f}", va="center", fontsize=8.5)
            places.append(position)
            labels.append(label)
        position += 1.1
    axes.set_yticks(places, labels, fontsize=8.5)
    axes.set_ylim(position - 0.4, -0.7)
    axes.set_xlim(0, 105)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"eight image tasks in one small ViT: accuracy, % of the experts' ({MAIN_SAMPLES} samples a task)",
                   fontsize=9.5, loc="right")  # fmt: skip


if __name__ == "__main__":
    draw(Path("benchmarks/results"), Path("docs/overview.png"))
