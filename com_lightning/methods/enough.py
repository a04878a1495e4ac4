"""Calibrating with no more samples than help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from com_lightning.core.chain.drift import measure_shift
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.methods.base import MergeJob

PARTS = (8, 4, 2, 1)
"""What part of the batches a round takes: one in so many."""


def merge_with_enough(job: MergeJob, merge: Callable[[MergeJob], list[LayerRecord]], least: float) -> list[LayerRecord]:
    """Merge with an eighth of the batches, with a quarter, with half, and with all, for as long as it helps.

    After a round the outputs of the last layer that was merged are compared with those of the experts, on as many
    batches that it was not calibrated with. Once twice as many batches have lowered their relative squared error by
    less than the share ``least``, what there is is kept. All rounds together cost less than twice the last.

    Args:
        job: filled as ``merge`` fills it, and told how many samples were used. Layers are reported once it is known
            that they are kept; none is taken from an earlier run.
        merge: merges a job, from the average on.
        least: share of the error, between 0 and 1.
    """
    run, numbers = job.run, [task.batch_numbers for task in job.tasks]
    totals = [sum(map(len, run.peers.exchange(own))) for own in numbers]
    start = {name: tensor.detach().clone() for name, tensor in job.merged.items()}
    records: list[LayerRecord] = []
    before = float("inf")
    parts = [part for part in PARTS if part <= min(totals)]
    for part in tqdm(parts, "Rounds", leave=False, disable=run.quiet or run.peers.rank > 0):
        own = Run(peers=run.peers, memory_budget=run.memory_budget, on_bad_batch=run.on_bad_batch, quiet=run.quiet)
        ends = [-(-total // part) for total in totals]
        with torch.no_grad():
            for name, tensor in start.items():
                job.merged[name].copy_(tensor)
        job.own.clear()
        job.refitted.clear()
        tasks = [_between(task, 0, end) for task, end in zip(job.tasks, ends)]
        records = merge(replace(job, tasks=tasks, run=own))
        job.used.update({task.name: sum(run.peers.exchange(_samples(task))) for task in tasks})
        if part == 1:
            break
        fresh = [_between(task, end, 2 * end) for task, end in zip(job.tasks, ends)]
        judge = Run(peers=run.peers, memory_budget=run.memory_budget, on_bad_batch=run.on_bad_batch)
        errors = [record.residual for record in measure_shift(fresh, job.merged, judge, job.own)]
        error = next((error for error in reversed(errors) if error is not None), 0.0)
        if error > (1 - least) * before or not error:
            break
        before = error
    run.skipped += own.skipped
    for record in records:
        run.on_layer(record)
    return records


def _between(task: Task, first: int, last: int) -> Task:
    """A task with those of its batches that have these numbers among those of all processes."""
    return task.with_batches([number for number in task.batch_numbers if first <= number < last])


def _samples(task: Task) -> int:
    return sum(map(task.size, task.batches))
