"""The plain average."""

from __future__ import annotations

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.methods.base import MergeJob, MergingMethod


class Average(MergingMethod):
    """The (weighted) average of the experts' parameters: model soups without selection (arXiv 2203.05482, section 2).

    Args:
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    needs = frozenset()

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        return []  # a job starts from the average
