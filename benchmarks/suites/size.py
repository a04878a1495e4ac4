"""Accuracy against size: rules that give each task a correction of low rank, grouped by everything but the rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suites.calls import Call
from benchmarks.suites.labels import short, with_rank
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.results import Row
from benchmarks.suites.rules import NAMES, canonical
from com_lightning.results.tables import table

_SIZES = ("task_rank", "rank", "task_share", "share")
"""Settings that say how large corrections are."""


def series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows with corrections, by rule: name -> rows, from small to large.

    A series begins with the same rule without corrections, if it was measured: as one model, and with private biases.
    """
    by_label = {row.label: row for row in rows}
    found: dict[str, list[Row]] = {}
    for row in rows:
        call = _call(row.label)
        if call is None or not _size_settings(call) or not row.per_task >= 0:
            continue
        rest = _without_size(call)
        name = short(str(rest), ranks=False)
        if name not in found:
            starts = [rest, Call(rest.rule, {**rest.options, "private_biases": True})] if rest.rule == "chain" else []
            known = [by_label.get(canonical(str(start))) for start in starts]
            found[name] = [start for start in known if start is not None and start.per_task >= 0]
        found[name].append(row)
    return {name: sorted(each, key=lambda row: row.per_task) for name, each in found.items()}


def lines(rows: Sequence[Row]) -> dict[str, Row]:
    """What the series are compared with, name -> row: joint training, and the chain as one model."""
    names = {JOINT: JOINT, canonical("chain"): "one model for all tasks (the default)"}
    return {names[row.label]: row for row in rows if row.label in names}


def has_corrections(row: Row) -> bool:
    """Whether a row is one of a rule that gives each task corrections of low rank."""
    call = _call(row.label)
    return call is not None and bool(_size_settings(call))


def size_table(found: Mapping[str, Sequence[Row]], compared: Mapping[str, Row]) -> str:
    """One line for each row of each series, from small to large, and for each row that they are compared with."""
    cells = [["rule", "values a task (% of the model)", "all tasks (% of the experts)", "mean normalised (%)", "seeds"]]
    in_series = [row for rows in found.values() for row in rows]
    for name, row in compared.items():
        if row not in in_series:
            size = ["-", "-"] if row.label == JOINT else _sizes(row)
            cells.append([name, *size, _mean(row), str(len(row.scores))])
    for name, rows in found.items():
        cells += [[_name(name, row), *_sizes(row), _mean(row), str(len(row.scores))] for row in rows]
    return table(cells)


def _call(label: str) -> Call | None:
    return Call.parse(label) if label.partition("(")[0] in NAMES and ", samples of " not in label else None


def _without_size(call: Call) -> Call:
    options = {n: _without_size(v) if isinstance(v, Call) else v for n, v in call.options.items() if n not in _SIZES}
    return Call(call.rule, options)


def _size_settings(call: Call) -> dict[str, Any]:
    """The settings of a rule, and of the rules within it, that say how large corrections are."""
    inner = [_size_settings(value) for value in call.options.values() if isinstance(value, Call)]
    settings = {name: value for each in inner for name, value in each.items()}
    return {**settings, **{name: value for name, value in with_rank(call).items() if name in _SIZES}}


def _name(series_name: str, row: Row) -> str:
    call = _call(row.label)
    settings = _size_settings(call) if call else {}
    sizes = [f"{name.removeprefix('task_')} {value}" for name, value in settings.items()]
    return ", ".join([series_name, *sizes]) if sizes else short(row.label)


def _sizes(row: Row) -> list[str]:
    per_task, tasks = row.per_task, len(row.entries[0].values)
    shared = sum(entry.share("shared") for entry in row.entries) / len(row.entries)
    return [f"{100 * per_task:.2f}", f"{100 * (shared / tasks + per_task):.1f}"]


def _mean(row: Row) -> str:
    return f"{100 * row.mean:.1f}" + (f" ± {100 * row.spread:.1f}" if len(row.scores) > 1 else "")
