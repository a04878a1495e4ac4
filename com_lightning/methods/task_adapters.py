"""Any rule for what tasks share, and a correction of low rank of every layer for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions, Distance
from com_lightning.core.chain.task_tensors import (
    compress_differences,
    task_tensors,
    warn_of_uncorrected,
    without_copies,
)
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.methods.base import MergeJob, MergingMethod

_SUFFIX = " (corrections)"


class TaskAdapters(MergingMethod):
    """A rule for the shared weights; then each task gets a correction of low rank of every linear layer, an adapter.

    The shared weights stay as the rule makes them. A second sweep solves the corrections, layer by layer, with the
    equations of :mod:`com_lightning.core.solve.task_adapters`, so that each layer of a task comes as close as it can to
    the expert's, on the activations of that task's model so far. Each task also gets its own biases and normalisations.
    ``ChainOfMerges(task_rank=...)`` instead solves shared weights and corrections for each other, in one sweep.

    Without data, each task gets the best approximation of rank r of the difference of its expert's weight to the shared
    one, from the singular value decomposition (Eckart and Young 1936), and its expert's biases and normalisations. With
    the base as the shared weights, ``TaskArithmetic(scale=0)``, that is how adapters are commonly extracted.

    Heads and other private layers stay the expert's. ``Refitted(TaskAdapters(...))`` fits them to the result.

    Args:
        method: the rule for what is shared.
        rank: of each task's correction of each weight.
        data: solve the corrections from calibration data. ``False``: from the weights alone.
        normalize: count each row by its direction, not by its size, as :class:`ChainOfMerges` does.
        ridge: of normalisations: pull towards the average, relative to the mean of the diagonal of the Gram matrix.
        residual: repair residual streams, as :class:`ChainOfMerges` does.
        sensitivity: weight errors by their effect on predictions, as :class:`ChainOfMerges` does.

    Example::

        TaskAdapters(TIES(), rank=4)
    """

    separable = False

    def __init__(
        self,
        method: MergingMethod,
        rank: int = 4,
        data: bool = True,
        normalize: bool = False,
        ridge: float = 0.01,
        residual: bool = True,
        sensitivity: Distance | None = None,
    ) -> None:
        super().__init__(method.importance)
        self.method, self.rank, self.data = method, rank, data
        self.normalize, self.ridge, self.residual, self.sensitivity = normalize, ridge, residual, sensitivity
        self.needs, self.starts_from_average = method.needs, method.starts_from_average
        self.options = method.options
        if data:
            self.needs = method.needs | {"data"}
            self.options = ChainOptions(
                normalize=normalize,
                ridge=ridge,
                residual=residual,
                sensitivity=sensitivity,
                task_rank=rank,
                keeps_shared=True,
            )

    @property
    def runs_calibration_forwards(self) -> bool:
        return self.data or self.method.runs_calibration_forwards

    @property
    def merges_layers(self) -> bool:
        return self.method.merges_layers

    @property
    def has_corrections(self) -> bool:
        return True

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        records = self.method.merge(job)
        own = task_tensors(job.tasks, job.merged, weights=True)
        if self.data:
            assert self.options is not None
            context = replace(job.context.with_suffix(_SUFFIX), warnings=[])
            tasks = [job.context.without_skipped(task) for task in job.tasks]
            importance = self.weights([task.name for task in job.tasks])
            solved = merge_layers(tasks, job.merged, importance, self.options, context, task_tensors=own)
            job.context.skipped += context.skipped
            job.warnings += [warning for warning in context.warnings if warning not in job.context.warnings]
        else:
            solved = compress_differences(job.tasks, job.merged, own, self.rank)
        job.task_tensors.clear()
        job.task_tensors.update(without_copies(own, solved))
        job.warnings += warn_of_uncorrected(job.tasks, job.merged, solved)
        return _joined(records, solved)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = [f"method: {problem}" for problem in self.method.problems(tasks)]
        if self.rank < 1:
            problems.append(f"rank: must be 1 or more, got {self.rank}")
        if not 0 <= self.ridge < math.inf:
            problems.append(f"ridge: must be 0 or more, and finite, got {self.ridge}")
        if self.method.has_corrections:
            problems.append(f"method: {type(self.method).__name__} gives each task corrections already")
        if self.method.refits_heads:
            problems.append(
                f"method: {type(self.method).__name__} fits private layers before the corrections are there; turn "
                "that off (refit_heads=False, no Refitted within), and write Refitted(method=TaskAdapters(...)) instead"
            )
        return problems


def _joined(records: Sequence[LayerRecord], solved: Sequence[LayerRecord]) -> list[LayerRecord]:
    """One record for each layer, which says what the task's models are in the end."""
    by_name = {record.name: record for record in records}
    result = [*records]
    for record in solved:
        if not record.of_tasks:
            continue
        record.name = record.name.removesuffix(_SUFFIX)
        earlier = by_name.get(record.name)
        if earlier is None or earlier.layer_type != record.layer_type:
            result.append(record)
            continue
        earlier.of_tasks, earlier.rank = record.of_tasks, record.rank
        earlier.seconds, earlier.solving = earlier.seconds + record.seconds, earlier.solving + record.solving
        if record.rows:
            earlier.distance, earlier.cosine, earlier.residual = record.distance, record.cosine, record.residual
    return result
