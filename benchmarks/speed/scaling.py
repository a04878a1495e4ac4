"""How the cost of a merge grows with depth, with the number of calibration samples, and with the number of tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.lockstep import Setting
from benchmarks.speed.timing import Timed, exponent, in_turn, spread
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions

SIZES: Mapping[str, Sequence[int]] = {
    "blocks": (4, 8, 16, 32, 48),
    "samples": (64, 128, 256, 512, 1024, 2048),
    "tasks": (2, 4, 8, 16),
}
"""What is varied, one at a time; the others have the values of :data:`FIXED`."""
FIXED = {"blocks": 4, "samples": 256, "tasks": 4}
"""Large values, so that solving, whose cost does not depend on samples, does not hide the cost of samples."""
TINY: Mapping[str, Sequence[int]] = {"blocks": (1, 2), "samples": (4, 8), "tasks": (2, 3)}

Measured = dict[str, dict[int, list[float]]]
"""What was varied -> its size -> seconds of each repeat."""


def run(repeats: int, width: int, batch_size: int, sizes: Mapping[str, Sequence[int]] = SIZES) -> Measured:
    """Time the default chain of merges at every size, in turn."""
    things: dict[str, Timed] = {}
    for what, values in sizes.items():
        for value in values:
            numbers = {**FIXED, what: value}
            if sizes is TINY:
                numbers = {**{name: each[0] for name, each in TINY.items()}, what: value}
            things[f"{what} {value}"] = _timed(width, batch_size, **numbers)
    next(iter(things.values()))()  # the first use of each operation is slower
    measured = in_turn(things, repeats, "scaling")
    return {what: {value: measured[f"{what} {value}"] for value in values} for what, values in sizes.items()}


def _timed(width: int, batch_size: int, blocks: int, samples: int, tasks: int) -> Timed:
    def seconds() -> float:
        setting = Setting(
            blocks, width, samples, batch_size, tasks
        )  # made here, because all settings together would need much memory
        setting.rule = ChainOptions(residual=True)
        return setting.merge(merge_layers)[0].seconds

    return seconds


def exponents(measured: Measured) -> dict[str, list[float]]:
    """What was varied -> the power with which seconds grow, for each repeat."""
    return {
        what: [exponent(list(values), seconds) for seconds in zip(*values.values())]
        for what, values in measured.items()
    }


def rows(measured: Measured) -> list[list[str]]:
    """The rows of a table."""
    powers = exponents(measured)
    return [
        ["cost against", "from", "to", "seconds, from", "seconds, to", "exponent"],
        *(
            [
                what,
                str(min(values)),
                str(max(values)),
                *(f"{statistics.median(values[end]):.2f}" for end in (min(values), max(values))),
                spread(powers[what]),
            ]
            for what, values in measured.items()
        ),
    ]


def picture(measured: Measured, path: Path) -> None:
    """Seconds against each size, all axes logarithmic, with straight lines through them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    powers = exponents(measured)
    for axes, (what, values) in zip(figure.subplots(1, len(measured), sharey=True), measured.items()):
        sizes, medians = list(values), [statistics.median(seconds) for seconds in values.values()]
        for size, seconds in values.items():
            axes.plot([size] * len(seconds), seconds, ".", color="#9aa5b1", markersize=4)
        axes.plot(sizes, medians, marker="o", color="#2a6f97", label="median")
        line = [medians[-1] * size / sizes[-1] for size in sizes]
        axes.plot(sizes, line, "--", color="#e0a458", linewidth=1, label="in proportion")
        axes.set(xscale="log", yscale="log", xlabel=what)
        axes.set_title(f"{what}: exponent {statistics.median(powers[what]):.2f}", fontsize="medium")
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize="small")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds for the merge")
    figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=130)
