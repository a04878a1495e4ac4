"""Results as tables (.md) and pictures (.png)."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Iterator, Sequence

from benchmarks.suites.calls import Call
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.pictures import draw_bars, draw_samples, draw_size
from benchmarks.suites.results import Entry, Results, Row, locked, spread, write
from benchmarks.suites.size import lines, series, size_table
from com_lightning.results.tables import table

MAIN_SAMPLES = 256  # the number of calibration samples in the main table, if there are several
VAL_SAMPLES = 1000  # per task, at most, to choose settings on


def show(results: Results, trained: str) -> str:
    """Write table and pictures of experts with the same training settings. Returns the table."""
    rows = results.rows(trained)
    text = "\n\n".join(_parts(results, trained, rows)) + "\n"
    with locked(results.path):
        write(results.path.with_suffix(".md"), text)
        main = _main(rows)
        draw_bars(results, main)
        if several := _by_samples(rows):
            average = next((row for row in main if row.label == "average"), None)
            draw_samples(results, several, average)
        if by_size := series(main):
            draw_size(results, by_size, lines(main))
    return text


def _main(rows: Sequence[Row]) -> list[Row]:
    """The rows without calibration data, and those with one number of samples."""
    numbers = {row.samples for row in rows if row.samples}
    number = MAIN_SAMPLES if MAIN_SAMPLES in numbers else max(numbers, default=0)
    return [row for row in rows if row.samples in (0, number)]


def _by_samples(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """Label -> samples -> row, for methods with rows that are not in the main table; in its order."""
    by_label: dict[str, dict[int, Row]] = {}
    for row in sorted(rows, key=lambda row: row not in _main(rows)):
        if row.samples:
            by_label.setdefault(row.label, {})[row.samples] = row
    shown = {row.label for row in rows if row not in _main(rows)}
    return {label: numbers for label, numbers in by_label.items() if label in shown}


def _parts(results: Results, trained: str, rows: Sequence[Row]) -> Iterator[str]:
    suite, main, several = results.suite, _main(rows), _by_samples(rows)
    lower = suite.lower_is_better
    earlier = _main(results.rows(trained, earlier=True))
    experts = list(results.newest(trained).values())
    entries = [entry for row in rows for entry in row.entries]
    what = "experts' perplexity / merged" if lower else "merged accuracy / expert's"
    sources = " or ".join(sorted({entry.source for row in main for entry in row.entries if entry.samples}))
    number = next((row.samples for row in main if row.samples), 0)
    calibrated = f"{number} calibration samples a task from {sources}" if number else "no calibration data"
    yield f"# {suite.title}"
    yield (
        f"Normalised ({what}, %) on {results.split} data, {calibrated}; mean over seeds of base, experts, sample and "
        "random choices, best first; spread: the standard deviation of the mean over tasks between seeds."
    )
    yield _relative(results, main)
    if any(row.label == JOINT for row in main):
        yield f"{JOINT}: not a merge, but one model trained on the train data of all tasks at once, as an upper bound."
    if not_here := [f"`{name}` ({why})" for name, why in suite.not_applicable.items()]:
        yield f"Not here: {'; '.join(not_here)}."
    if any(row.entries[0].tried for row in main):
        yield (
            f"`=val`: chosen on val, separately for each seed, on up to {VAL_SAMPLES:,} samples of each task that the "
            "rule was not calibrated on. Only the chosen setting was measured on test."
        )
        yield _chosen(main)
    if several:
        yield "By calibration samples a task (mean normalised, %, ± spread):"
        yield _samples(several)
    if by_size := series(main):
        yield (
            "Accuracy against size. A task has the shared model, and its own values: biases, norms and corrections. "
            "Its head, which its expert has too, is not counted. All tasks: shared values and those of all tasks, as a "
            f"share of {len(suite.tasks)} experts."
        )
        yield size_table(by_size, lines(main))
    yield "Perplexity:" if lower else "Accuracy (%):"
    yield _absolute(results, experts, main)
    if earlier:
        yield (
            "Measured earlier, with experts of another run of the same training, and normalised by these experts. Rows "
            "of this table and of those above differ by the experts too:"
        )
        yield _relative(results, earlier)
    for command in _commands(results, rows, sorted({entry.seed for entry in experts})):
        yield f"`{command}`"
    yield f"{_versions([*experts, *entries])}. Trained as `{trained}`."
    if earlier:
        yield f"Measured earlier: {_versions([entry for row in earlier for entry in row.entries])}."


def _versions(entries: Sequence[Entry]) -> str:
    return "; ".join(sorted({", ".join(f"{k} {v}" for k, v in entry.versions.items()) for entry in entries}))


def _relative(results: Results, rows: Sequence[Row]) -> str:
    suite = results.suite
    lines = [["method", *suite.tasks, _mean_name(results), "spread", "seeds"]]
    for row in rows:
        cells = _cells(row.normalized, row.scores, 100.0, 1)
        lines.append([row.label, *cells, str(len(row.scores))])
    return table(lines)


def _absolute(results: Results, experts: Sequence[Entry], rows: Sequence[Row]) -> str:
    suite, lower = results.suite, results.suite.lower_is_better
    scale, digits = (1.0, 3) if lower else (100.0, 1)
    lines = [["method", *suite.tasks, _mean_name(results), "spread", "seeds", *["above experts (%)"] * lower]]
    for label, entries, scores in [("experts", experts, []), *((row.label, row.entries, row.scores) for row in rows)]:
        values = [list(entry.values.values()) for entry in entries]
        cells = _cells(values, [suite.mean(run) for run in values], scale, digits)
        above = statistics.mean([100 / score - 100 if score else math.inf for score in scores] or [0.0])
        lines.append([label, *cells, str(len(entries)), *[f"{above:.1f}"] * lower])
    return table(lines)


def _chosen(rows: Sequence[Row]) -> str:
    """The setting that was chosen from each grid, with its score on val."""
    grids = [row for row in rows if row.entries[0].tried]
    seeds = sorted({entry.seed for row in grids for entry in row.entries})
    lines = [["chosen on val (mean normalised there, %)", "of", *(f"seed {seed}" for seed in seeds)]]
    for row in grids:
        grid = Call.parse(row.entries[0].method).grid
        by_seed = {
            e.seed: f"`{', '.join(f'{name}={e.settings.get(name)}' for name in grid)}` ({100 * e.tried[e.chosen]:.1f})"
            for e in row.entries
        }
        lines.append([row.label, str(len(row.entries[0].tried)), *(by_seed.get(seed, "") for seed in seeds)])
    return table(lines)


def _samples(several: dict[str, dict[int, Row]]) -> str:
    numbers = sorted({number for rows in several.values() for number in rows})
    lines = [["method", *map(str, numbers)]]
    for label, rows in several.items():
        lines.append([label, *(_with_spread(rows[number]) if number in rows else "-" for number in numbers)])
    return table(lines)


def _with_spread(row: Row) -> str:
    return f"{100 * row.mean:.1f}" + (f" ± {100 * row.spread:.1f}" if len(row.scores) > 1 else "")


def _mean_name(results: Results) -> str:
    return "geometric mean" if results.suite.lower_is_better else "mean"


def _cells(runs: Sequence[Sequence[float]], means: Sequence[float], scale: float, digits: int) -> list[str]:
    """Mean over runs of each task, mean of all, spread between runs."""
    values = [*(statistics.mean(column) for column in zip(*runs)), statistics.mean(means) if means else math.nan]
    between = f"{scale * spread(means):.{digits}f}" if len(means) > 1 else "-"
    return [*(f"{scale * value:.{digits}f}" for value in values), between]


def _commands(results: Results, rows: Sequence[Row], seeds: Sequence[int]) -> Iterator[str]:
    """The commands that measure everything again."""
    numbers: dict[tuple[str, str], set[int]] = {}
    entries = [entry for row in rows for entry in row.entries]
    oracle = ["--oracle"] * any(entry.method == JOINT for entry in entries)
    for entry in (entry for entry in entries if entry.method != JOINT):
        numbers.setdefault((entry.source, entry.method), set()).update([entry.samples] if entry.samples else [])
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (source, method), own in numbers.items():
        groups.setdefault((source, tuple(sorted(own))), []).append(method)
    without = groups.pop(("", ()), [])
    for (source, several), methods in sorted(groups.items() or [(("", ()), [])]):
        command = ["python", "-m", "benchmarks.suites", results.suite.name, "--seeds", *map(str, seeds)]
        command += ["--samples", *map(str, several), "--source", source] if source else []
        # Methods without calibration data are part of the first command.
        yield shlex.join([*command, "--split", results.split, *oracle, "--methods", *without, *methods])
        without, oracle = [], []
