"""What a report ends with: what was achieved, in one sentence, and what to try next."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from com_lightning.errors import some
from com_lightning.results.tables import number, percent

if TYPE_CHECKING:
    from com_lightning.results.report import MergeReport

ENOUGH_SAMPLES = 100
"""Samples of each task from which the chain and ``sensitivity`` are worth it on all benchmarks."""
AS_GOOD = 0.99
"""Share of the experts from which there is little left to gain."""
LOST = 0.7
"""A task is lost if it keeps less of its expert than this share of what the other tasks keep."""


def headline(report: MergeReport) -> str:
    """What a merge has achieved, in one sentence.

    Args:
        report: Report of the merge.

    Returns:
        The sentence; empty if nothing has been merged.
    """
    if not report.tasks:
        return ""
    count = len(report.tasks)
    model = "One model with corrections for each task" if report.sizes.get("correction") else "One model"
    model += f" of {report.size.merged.values:,} values" if report.size.merged.values else ""
    merged, average = report.mean("merged"), report.mean("average")
    if merged is None:
        return f"{model} was made of {count} experts, and nothing was validated."
    if report.method.get("class") == "Average":
        average = None  # it is the merged model
    share, share_of_average = report.mean_normalized("merged"), report.mean_normalized("average")
    if share is not None and math.isfinite(share) and not report.lower_is_better:
        beside = f"; the plain average keeps {percent(share_of_average)}" if average is not None else ""
        return f"{model} keeps {percent(share)} of the {report.monitor} of {count} experts{beside}."
    experts = report.mean("expert")
    sentence = f"{model} for {count} tasks has a mean {report.monitor} of {number(merged)}"
    sentence += f"; the experts have {number(experts)}" if experts is not None else ""
    sentence += f", and their plain average {number(average)}" if average is not None else ""
    return f"{sentence}{' (lower is better)' if report.lower_is_better else ''}."


def advice(report: MergeReport) -> str:
    """What to try next, from what is known of a merge: the first that applies.

    First comes what makes the figures wrong, then what is easily mended, then what is more accurate and costs more.

    Args:
        report: Report of the merge.

    Returns:
        The advice; empty if there is nothing to say, or if a warning of the report says it.
    """
    if not report.tasks or report.is_worse_than_average:
        return ""
    if "merged" not in report.metrics:
        return "validate the result: give each task's datamodule, or run com-lightning validate --merged FOLDER."
    share = report.mean_normalized("merged")
    more = "" if share is not None and share >= AS_GOOD else _more_accurate(report)
    return _of_data(report) or _of_heads(report) or _of_a_lost_task(report) or more


def _of_data(report: MergeReport) -> str:
    if any(report.overlap.values()):
        return (
            "measure on samples that the merge has not seen: give more validation samples or a lower num_samples, or "
            'set holdout=True, or split="train".'
        )
    return ""


def _of_heads(report: MergeReport) -> str:
    private = [name for name, outcome in report.parameters.items() if outcome.status == "private"]
    if not private or _refits(report.method):
        return ""
    how = "refit_heads=True" if "refit_heads" in report.method else f"Refitted(method={report.method.get('class')}())"
    return f"{some(private, most=2)} are as in the experts; {how} solves them for the merged model's features."


def _of_a_lost_task(report: MergeReport) -> str:
    shares = {task: share for task in report.tasks if (share := report.normalized("merged", task)) is not None}
    if len(shares) < 2:
        return ""
    task = min(shares, key=lambda task: shares[task])
    others = [share for other, share in shares.items() if other != task]
    rest = sum(others) / len(others)
    if not shares[task] < LOST * rest:
        return ""
    return (
        f"'{task}' keeps {percent(shares[task])} of its expert, the other tasks {percent(rest)}: give it more "
        "importance, or leave it out and keep its expert."
    )


def _more_accurate(report: MergeReport) -> str:
    method, samples = report.method, min(report.samples.values(), default=0)
    if method.get("class") != "ChainOfMerges":
        reads = "" if samples else ", which reads calibration data"
        return f"try ChainOfMerges{reads}; com-lightning compare shows rules side by side."
    if samples < ENOUGH_SAMPLES:
        return f"calibrate on more samples (num_samples, now {samples})."
    if rank := method.get("task_rank"):
        return f"a higher task_rank than {rank} keeps more, and takes more space."
    if method.get("task_share"):
        return f"a higher task_share than {method['task_share']} keeps more, and takes more space."
    own = "If the task is known in use, task_rank=4 (--config adapters) keeps most: a small adapter for each task."
    if method.get("sensitivity"):
        return own
    return (
        f'sensitivity="probabilities" and balance=True (--config accurate) are more accurate, and take more time. {own}'
    )


def _refits(method: Mapping[str, Any]) -> bool:
    """Whether a rule, or one within it, solves private layers for the merged model."""
    inner = [value for value in method.values() if isinstance(value, Mapping)]
    return method.get("class") == "Refitted" or bool(method.get("refit_heads")) or any(map(_refits, inner))
