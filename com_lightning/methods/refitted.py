"""Any rule for what tasks share, and their private layers solved for the result."""

from __future__ import annotations

import math
from collections.abc import Sequence

from com_lightning.core.chain.heads import refit
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.methods.base import MergeJob, MergingMethod


class Refitted(MergingMethod):
    """A rule for the shared parameters; then each task's private layers, such as heads, are fitted to the result.

    :class:`ChainOfMerges` does this by itself; here it is for any other rule. A head was trained on the features of its
    expert, but gets those of the merged model. The equation is in :mod:`com_lightning.core.chain.heads`. The rules'
    papers leave private layers as they are. Refitting reads calibration data, also if the rule needs none, but no
    labels. It adds no parameters. If nothing is private, it changes nothing.

    Args:
        method: the rule for what is shared. Its importance counts.
        normalize: count each row by its direction, not by its size.
        ridge: pull towards the expert's own layer, relative to the mean of the diagonal of the Gram matrix.

    Example::

        Refitted(TIES(density=0.2))
    """

    separable = False

    def __init__(self, method: MergingMethod, normalize: bool = False, ridge: float = 0.01) -> None:
        super().__init__(method.importance)
        self.method, self.normalize, self.ridge = method, normalize, ridge
        self.needs, self.options = method.needs | {"data"}, method.options
        self.starts_from_average = method.starts_from_average

    @property
    def runs_calibration_forwards(self) -> bool:
        return True

    @property
    def merges_layers(self) -> bool:
        return self.method.merges_layers

    @property
    def has_corrections(self) -> bool:
        return self.method.has_corrections

    @property
    def refits_heads(self) -> bool:
        return True

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        records = self.method.merge(job)
        rule = ChainOptions(normalize=self.normalize, ridge=self.ridge, residual=True)
        head_records, heads = refit(job.tasks, job.merged, job.task_tensors, rule, job.context)
        job.heads.update(heads)
        return records + head_records

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = [f"method: {problem}" for problem in self.method.problems(tasks)]
        if not 0 <= self.ridge < math.inf:
            problems.append(f"ridge: must be 0 or more, and finite, got {self.ridge}")
        if self.method.refits_heads:
            problems.append(
                f"method: {type(self.method).__name__} solves private layers by itself; use it without Refitted"
            )
        return problems
