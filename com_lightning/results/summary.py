"""Data, cost and size of a merge, in a few lines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from com_lightning.errors import some
from com_lightning.results.model_size import size_sentence

if TYPE_CHECKING:
    from com_lightning.results.report import MergeReport


def summarize(report: MergeReport) -> str:
    """Data and cost in two lines, then lines for private layers, the padding of tasks, and skipped batches."""
    resumed = f"{report.resumed} layers from an interrupted merge, the rest in " if report.resumed else ""
    cost = f"{resumed}{report.seconds:.1f} s, peak memory {report.peak_memory / 2**30:.2f} GiB"
    phrases = {"private": f"private to their tasks{_private(report)}", "buffer": "in buffers that are left unchanged"}
    phrases["correction"] = "in corrections of low rank, one for each task and matrix"
    sizes = ", ".join(f"{count:,} {phrases.get(what, what)}" for what, count in report.sizes.items() if count)
    lines = [f"{report.method.get('class', 'merge')}: {_data(report)}; {cost}.", f"Values: {sizes}."]
    lines += [size_sentence(report.size)] * any(task.bytes for task in report.size.tasks.values())
    lines += [f"Private layers of {line}." for line in report.private]
    lines += [f"Padding of {line}." for line in report.padding]
    return "\n".join([*lines, *(f"Skipped: {batch}." for batch in report.skipped)])


def _data(report: MergeReport) -> str:
    counts = sorted(set(report.samples.values()))
    if not counts:
        return "no calibration data"
    everything = list(report.overlap)
    seen = [task for task, overlap in report.overlap.items() if overlap]
    unknown = [task for task, overlap in report.overlap.items() if overlap is None]
    words = []
    for tasks, what in (
        (seen, "validated on data that the merge has seen, use holdout"),
        (unknown, 'perhaps validated on data that the merge has seen, use split="train"'),
    ):
        words += [f"{'' if tasks == everything else f'{some(tasks)}: '}{what}"] * bool(tasks)
    if not words:
        words = [
            "held out of validation" if all(map(report.held_out.get, report.samples)) else "none of them is validated"
        ]
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{span} calibration samples per task ({'; '.join(words)})"


def _private(report: MergeReport) -> str:
    """The names of a few private parameters, in brackets, and how many biases and norms were solved for each task."""
    solved = [outcome.status for outcome in report.parameters.values()].count("private, solved for each task")
    private = ("private", "private, solved for the merged model")
    names = [name for name, outcome in report.parameters.items() if outcome.status in private]
    entries = [*names[:4], *["..."] * (len(names) > 4)]
    entries += [f"{solved} biases and norms solved for each task"] * bool(solved)
    return f" ({', '.join(entries)})" if entries else ""
