"""The main figures of all suites in one table: ``python -m benchmarks.suites.overview``.

README and docs copy their figures from what it writes, ``benchmarks/results/overview.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from benchmarks.suites import COLUMNS, SUITES
from benchmarks.suites.ablation import main_rows
from benchmarks.suites.labels import short
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.results import Row, write
from benchmarks.suites.rules import canonical
from benchmarks.suites.size import has_corrections, series
from benchmarks.suites.tables import MAIN_SAMPLES
from com_lightning.results.tables import table

MAIN: Mapping[str, Mapping[str, str]] = {
    "one model": {
        "average": "average",
        "best rule without data": "",
        "RegMean": "regmean",
        "RegMean++": "regmean_plus_plus",
        "chain, one-sided": "one_sided",
        "chain, experts' heads": "chain(refit_heads=False)",
    },
    "one model, heads solved for its features": {
        "RegMean++": "refitted(method=regmean_plus_plus)",
        "**chain (the default)**": "chain",
        "**chain, sensitivity and balance (accurate.yaml)**": "chain(sensitivity=probabilities, balance=True)",
    },
    "one model, biases and norms of each task": {
        "chain": "chain(private_biases=True)",
        "chain, sensitivity and balance": "chain(sensitivity=probabilities, private_biases=True, balance=True)",
    },
    "bound": {JOINT: JOINT},
}
"""Part -> label -> method. The method ``""`` is the best of all rules without data."""
SIZES = (0.01, 0.02, 0.05, 0.1)
"""Values that a task adds, as a share of the model."""


def overview(folder: Path) -> str:
    """Write ``overview.md`` to the folder of the suites' results. Returns the text."""
    measured = main_rows(folder)
    titles = [COLUMNS.get(name, name) for name in SUITES]
    by_size = _by_size(measured)
    parts = [
        "# The suites in one table",
        "Mean normalised metric (merged / expert; for the language model, perplexity of expert / merged) on test data, "
        f"%; ± the standard deviation between seeds. {MAIN_SAMPLES} calibration samples a task. {JOINT}: no merge, but "
        "one model trained on the data of all tasks at once.",
        table([["", *titles], *_main(measured)]),
    ]
    if by_size:
        parts += [
            "Adapters: each rule with the largest rank that was measured and fits, of at most so many values per task, "
            "as a share of the model. Biases and norms are counted, heads are not. In brackets: the share.",
            table([["", *titles], *by_size]),
        ]
    parts.append("`python -m benchmarks.suites.overview`, from the results of `python -m benchmarks.suites SUITE`.")
    text = "\n\n".join(parts) + "\n"
    write(folder / "overview.md", text)
    return text


def _main(measured: Mapping[str, Mapping[str, Row]]) -> list[list[str]]:
    found = []
    for part, methods in MAIN.items():
        rows = [[label, *(_find(rows, method) for rows in measured.values())] for label, method in methods.items()]
        rows = [row for row in rows if any(cell != "-" for cell in row[1:])]
        if rows:
            found += [[f"*{part}*", *[""] * len(measured)], *rows]
    return found


def _find(rows: Mapping[str, Row], method: str) -> str:
    if method:
        return _cell(rows.get(canonical(method)))
    best = best_without_data(rows)
    return "-" if best is None else f"{_cell(best)} ({short(best.label)})"


def best_without_data(rows: Mapping[str, Row]) -> Row | None:
    """The best of all rules that give one model and read no data, but the average."""
    free = [row for row in rows.values() if not row.samples and row.label not in (JOINT, "average")]
    return max((row for row in free if not row.per_task > 0), key=lambda row: row.mean, default=None)


def _by_size(measured: Mapping[str, Mapping[str, Row]]) -> list[list[str]]:
    by_suite = [series(list(rows.values())) for rows in measured.values()]
    names = dict.fromkeys(name for found in by_suite for name in found)
    found = []
    for size in SIZES:
        rows = [
            [f"{name}, at most {100 * size:g} %", *(_best(each.get(name, []), size) for each in by_suite)]
            for name in names
        ]
        found += [row for row in rows if any(cell != "-" for cell in row[1:])]
    return found


def _best(rows: list[Row], size: float) -> str:
    fitting = [row for row in rows if has_corrections(row) and row.per_task <= size]
    row = max(fitting, key=lambda row: row.per_task, default=None)
    return "-" if row is None else f"{_cell(row)} ({100 * row.per_task:.1f})"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{100 * row.mean:.1f}" + (f" ± {100 * row.spread:.1f}" if len(row.scores) > 1 else "")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.overview", description=__doc__)
    parser.add_argument(
        "--results", type=Path, default=Path("benchmarks/results"), help="folder of the suites' results"
    )
    print(overview(parser.parse_args().results))
