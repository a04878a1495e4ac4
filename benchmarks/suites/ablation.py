"""The effect of each option of the chain, from the results of the suites: ``python -m benchmarks.suites.ablation``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.suites import COLUMNS, SUITES, make_suite
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.pictures import GREY, colour, draw_row_bars
from benchmarks.suites.results import Results, Row, write
from benchmarks.suites.rules import canonical
from benchmarks.suites.tables import MAIN_SAMPLES
from com_lightning.results.tables import table

_ACCURATE = "sensitivity=probabilities, balance=True"
ROWS: Mapping[str, str] = {
    "average": "average",
    "RegMean": "regmean",
    "RegMean, heads refitted": "refitted(method=regmean)",
    "RegMean++": "regmean_plus_plus",
    "RegMean++, heads refitted": "refitted(method=regmean_plus_plus)",
    "chain, one-sided, experts' heads": "one_sided",
    "chain (the default)": "chain",
    "default, experts' heads": "chain(refit_heads=False)",
    "default, residual streams not repaired": "chain(residual=False)",
    "default, rows by direction": "chain(normalize=True)",
    "default, balance": "chain(balance=True)",
    "default, sensitivity": "chain(sensitivity=probabilities)",
    "accurate: sensitivity, balance": f"chain({_ACCURATE})",
    "accurate, experts' heads": f"chain({_ACCURATE}, refit_heads=False)",
    "accurate, residual streams not repaired": f"chain({_ACCURATE}, residual=False)",
    "accurate, rows by direction": f"chain({_ACCURATE}, normalize=True)",
    "default, private biases and norms": "chain(private_biases=True)",
    "accurate, private biases and norms": f"chain({_ACCURATE}, private_biases=True)",
    "adapters of rank 1": "chain(task_rank=1)",
    "adapters of rank 2": "chain(task_rank=2)",
    "adapters of rank 4": "chain(task_rank=4)",
    "adapters of rank 8": "chain(task_rank=8)",
    "adapters of rank 4, sensitivity": "chain(sensitivity=probabilities, task_rank=4)",
    JOINT: JOINT,
}
"""Name of a row -> its method."""


def main_rows(folder: Path) -> dict[str, dict[str, Row]]:
    """Suite -> canonical name of a method -> its row, without calibration data or with the usual number of samples."""
    measured: dict[str, dict[str, Row]] = {}
    for name in SUITES:
        suite = make_suite(name)
        rows = Results(suite, folder / name).rows(suite.folder(0).parent.name)
        measured[name] = {row.label: row for row in rows if row.samples in (0, MAIN_SAMPLES)}
    return measured


def ablation(folder: Path) -> str:
    """Write ``ablation.md`` and ``ablation.png`` to the folder of the suites' results. Returns the table."""
    measured = main_rows(folder)
    labels: dict[str, str] = {}
    for label, method in ROWS.items():
        labels.setdefault(canonical(method), label)  # an option's default may have become what a row says of it
    shown = {label: method for method, label in labels.items() if any(method in rows for rows in measured.values())}
    lines = [["", *(COLUMNS.get(name, name) for name in SUITES)]]
    lines += [[label, *(cell(rows.get(method)) for rows in measured.values())] for label, method in shown.items()]
    text = (
        "# What each option brings\n\n"
        f"Mean normalised metric on test data, %, {MAIN_SAMPLES} calibration samples a task; ± the standard deviation "
        "between seeds (in brackets: how many). With private biases and norms, and with adapters, each task has values "
        "of its own; all other rows are one model. The language model has no heads. "
        f"{JOINT}: not a merge, but one model trained on the data of all tasks at once.\n\n"
        f"{table(lines)}\n\n"
        "`python -m benchmarks.suites.ablation`, from the results of `python -m benchmarks.suites SUITE`.\n"
    )
    write(folder / "ablation.md", text)
    _draw(measured, shown, folder / "ablation.png")
    return text


def cell(row: Row | None) -> str:
    """Mean, spread and number of seeds."""
    if row is None:
        return "-"
    spread = f" ± {100 * row.spread:.1f}" if len(row.scores) > 1 else ""
    return f"{100 * row.mean:.1f}{spread} ({len(row.scores)})"


def _draw(measured: Mapping[str, Mapping[str, Row]], shown: Mapping[str, str], path: Path) -> None:
    suites = {name: rows for name, rows in measured.items() if any(method in rows for method in shown.values())}
    figure = Figure(figsize=(3 + 2.2 * len(suites), 1 + 0.27 * len(shown)), layout="constrained")
    figure.subplots(1, max(len(suites), 1), sharey=True)
    for axes, (name, rows) in zip(figure.axes, suites.items()):
        for place, method in enumerate(shown.values()):
            if row := rows.get(method):
                draw_row_bars(axes, [(place, row)], colour(row))
        axes.set_title(COLUMNS.get(name, name), fontsize=9)
        axes.set_xlim(0, 119)
        axes.axvline(100, color=GREY, linewidth=0.8, linestyle=":")
    figure.axes[0].set_yticks(range(len(shown)), list(shown), fontsize=8)
    figure.axes[0].set_ylim(len(shown) - 0.4, -0.6)
    figure.supxlabel("normalised metric, mean of tasks (%)", fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.ablation", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of the suites' results"
    )
    print(ablation(parser.parse_args().results))
