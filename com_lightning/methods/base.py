"""What every merging rule is given and gives back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.task import LayerRecord, Task


@dataclass
class MergeJob:
    """The experts to merge and the place for the result.

    Attributes:
        tasks: the experts and their calibration data (no batches where the method needs no data).
        merged: full name of each shared parameter or buffer -> tensor for its merged value, which holds the average of
            the experts, weighted by the method's task importance, when the method gets it (a parameter anything, if the
            method says that it does not need that).
        run: how it is carried out.
        base: the same names -> value in the model that the experts were fine-tuned from; ``None`` unless the method
            needs it.
        device: where to compute; ``None``: where the merged tensors are. Experts of a method that needs no data may be
            elsewhere, so that they need not fit there.
        own: name of what is shared by default -> its value for each task, where the method has found that it is better
            kept apart; filled by the method.
        refitted: task -> name of what is private to it -> its value, where the method has solved it for the merged
            model; filled by the method.
        used: task -> how many calibration samples were used, where the method has not used them all.
    """

    tasks: Sequence[Task]
    merged: Mapping[str, Tensor]
    run: Run = field(default_factory=Run)
    base: Mapping[str, Tensor] | None = None
    device: torch.device | None = None
    own: dict[str, list[Tensor]] = field(default_factory=dict)
    refitted: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    used: dict[str, int] = field(default_factory=dict)


@dataclass
class ParameterRecord(LayerRecord):
    """A parameter that a rule has merged as such, whatever layer it belongs to; ``kind`` is the rule's name."""


class MergingMethod(ABC):
    """A rule that merges experts into one set of shared parameters.

    Args:
        importance: task -> its weight, relative to the others; uniform by default.
    """

    needs_data: bool = True
    """Whether the method reads calibration batches."""
    needs_base: bool = False
    """Whether the method reads the weights that the experts were fine-tuned from."""
    needs_average: bool = True
    """Whether the merged parameters are to hold the average of the experts when the method gets them; if not, it writes
    all of them."""
    needs_loss: bool = False
    """Whether the method differentiates what the module's ``training_step`` returns, sample by sample."""
    solves_layers: bool = True
    """Whether a method that reads data merges layer by layer, as layers are met, and all that it can; otherwise it
    merges the parameters that it is given."""
    keeps_to_parts: bool = True
    """Whether the method can merge some of the parameters and leave the others alone."""

    def __init__(self, importance: dict[str, float] | None = None) -> None:
        self.importance = importance

    @abstractmethod
    def merge(self, job: MergeJob) -> list[LayerRecord]:
        """Write the merged values into ``job.merged``; return what happened at each layer, in order."""

    def weights(self, tasks: Sequence[str]) -> list[float]:
        """Task importance, in the order of ``tasks``, with a sum of one.

        Example::

            >>> from com_lightning import Average
            >>> Average(importance={"a": 3, "b": 1}).weights(["b", "a"])
            [0.25, 0.75]
        """
        if self.importance is None:
            return [1.0 / len(tasks)] * len(tasks)
        total = sum(self.importance[task] for task in tasks)
        return [self.importance[task] / total for task in tasks]

    def problems(self, tasks: Sequence[str]) -> list[str]:
        """What is wrong with the method's settings for these tasks, each as one sentence."""
        if self.importance is None:
            return []
        found = []
        if missing := [task for task in tasks if task not in self.importance]:
            found.append(f"importance: no weight for {', '.join(missing)}; give every task one, 0 leaves a task out")
        if unknown := [task for task in self.importance if task not in tasks]:
            found.append(f"importance: {', '.join(unknown)} is no task; the tasks are {', '.join(tasks)}")
        if not (all(0 <= w < math.inf for w in self.importance.values()) and sum(self.importance.values()) > 0):
            found.append(f"importance: weights must be finite, not negative, and not all 0; got {self.importance}")
        return found
