"""The effect of each option of the chain, from the results of the suites: ``python -m benchmarks.suites.ablation``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.suites import SUITES, make_suite
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.pictures import GREY, WITH_DATA, WITHOUT
from benchmarks.suites.results import Results, Row, write
from benchmarks.suites.tables import MAIN_SAMPLES
from com_lightning.results.tables import table

ROWS: Mapping[str, str] = {
    "average": "average",
    "RegMean": "regmean",
    "RegMean++": "regmean_plus_plus",
    "RegMean, heads refitted": "refitted(method=regmean)",
    "RegMean++, heads refitted": "refitted(method=regmean_plus_plus)",
    "chain, one-sided": "one_sided",
    "chain, two-sided": "chain(residual=False)",
    "residual (the default)": "chain",
    "default, normalize=False": "chain(normalize=False)",
    "default, balance": "chain(balance=True)",
    "default, sensitivity": "chain(sensitivity=probabilities)",
    "default, private_biases": "chain(private_biases=True)",
    "default, refit_heads": "chain(refit_heads=True)",
    "default, refit_heads, normalize=False": "chain(normalize=False, refit_heads=True)",
    "all: residual, sensitivity, balance, private_biases": (
        "chain(sensitivity=probabilities, private_biases=True, balance=True)"
    ),
    "all, normalize=False": "chain(normalize=False, sensitivity=probabilities, private_biases=True, balance=True)",
    "all but residual": "chain(residual=False, sensitivity=probabilities, private_biases=True, balance=True)",
    "all but sensitivity": "chain(private_biases=True, balance=True)",
    "all but balance": "chain(sensitivity=probabilities, private_biases=True)",
    "all but private_biases": "chain(sensitivity=probabilities, balance=True)",
    "all, refit_heads": ("chain(sensitivity=probabilities, private_biases=True, refit_heads=True, balance=True)"),
    "all, refit_heads, normalize=False": (
        "chain(normalize=False, sensitivity=probabilities, private_biases=True, refit_heads=True, balance=True)"
    ),
    "all but private_biases, refit_heads": "chain(sensitivity=probabilities, refit_heads=True, balance=True)",
    "all but private_biases, refit_heads, normalize=False": (
        "chain(normalize=False, sensitivity=probabilities, refit_heads=True, balance=True)"
    ),
    JOINT: JOINT,
}
"""Name of a row -> its method."""


def ablation(folder: Path) -> str:
    """Write ``ablation.md`` and ``ablation.png`` to the folder of the suites' results. Returns the table."""
    measured: dict[str, dict[str, Row]] = {}
    for name in SUITES:
        suite = make_suite(name)
        rows = Results(suite, folder / name).rows(suite.folder(0).parent.name)
        measured[name] = {row.label: row for row in rows if row.samples in (0, MAIN_SAMPLES)}
    lines = [["", *SUITES]]
    for label, method in ROWS.items():
        if any(method in rows for rows in measured.values()):
            lines.append([label, *(_cell(rows.get(method)) for rows in measured.values())])
    text = (
        "# What each option brings\n\n"
        f"Mean normalised metric on test data, %, {MAIN_SAMPLES} calibration samples a task; ± the standard deviation "
        "between seeds (in brackets: how many). With `private_biases` each task has its own biases and norms; all "
        f"other rows are one model. {JOINT}: not a merge, but one model trained on the data of all tasks at once.\n\n"
        f"{table(lines)}\n\n"
        "`python -m benchmarks.suites.ablation`, from the results of `python -m benchmarks.suites SUITE`.\n"
    )
    write(folder / "ablation.md", text)
    _draw(measured, folder / "ablation.png")
    return text


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    spread = f" ± {100 * row.spread:.1f}" if len(row.scores) > 1 else ""
    return f"{100 * row.mean:.1f}{spread} ({len(row.scores)})"


def _draw(measured: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    suites = [name for name, rows in measured.items() if any(method in rows for method in ROWS.values())]
    labels = [label for label, method in ROWS.items() if any(method in measured[name] for name in suites)]
    figure = Figure(figsize=(3 + 2.2 * len(suites), 1 + 0.3 * len(labels)), layout="constrained")
    figure.subplots(1, max(len(suites), 1), sharey=True)
    for axes, name in zip(figure.axes, suites):
        for place, label in enumerate(labels):
            if row := measured[name].get(ROWS[label]):
                color = GREY if label == JOINT else WITH_DATA if row.label.startswith("chain") else WITHOUT
                spread = 100 * row.spread if len(row.scores) > 1 else float("nan")
                axes.barh(place, 100 * row.mean, xerr=spread, color=color, ecolor="#333333", capsize=2)
                axes.text(2, place, f"{100 * row.mean:.1f}", va="center", fontsize=7, color="white")
        axes.set_title(name, fontsize=9)
        axes.set_xlim(0, 108)
        axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
    figure.axes[0].set_yticks(range(len(labels)), labels, fontsize=8)
    figure.axes[0].set_ylim(len(labels) - 0.4, -0.6)
    figure.supxlabel("normalised metric, mean of tasks (%)", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.ablation", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of the suites' results"
    )
    print(ablation(parser.parse_args().results))
