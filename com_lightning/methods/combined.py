"""Two rules in one merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import average, named_tensors
from com_lightning.methods.base import MergeJob, MergingMethod


class Combined(MergingMethod):
    """One rule for the weight matrices, another for the rest: biases, normalisations, embedding tables.

    Matrices are parameters of two or more dimensions, such as convolutions, but not an embedding's table. If
    ``matrices`` merges layer by layer (ChainOfMerges, RegMean, LOT), it merges everything that it can solve, including
    biases and normalisations. ``rest`` then merges what has no closed form. AdaMerging merges a model as a whole, and
    cannot be part of another rule. Each rule has its own importance; buffers are averaged with that of ``rest``.

    Args:
        matrices: the rule for the weight matrices.
        rest: the rule for the rest. It must merge each parameter on its own, or be Average.

    Example::

        Combined(matrices=TSVM(), rest=TIES(density=0.5))
    """

    def __init__(self, matrices: MergingMethod, rest: MergingMethod) -> None:
        super().__init__(rest.importance)
        self.matrices, self.rest = matrices, rest
        self.needs, self.options = matrices.needs | rest.needs, matrices.options

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        if self.options:
            records = self.rest.merge(job)
            return self.matrices.merge(job) + records
        tables = _tables(job)
        matrices, rest = dict[str, Tensor](), dict[str, Tensor]()
        for name, tensor in job.merged.items():
            is_matrix = tensor.dim() >= 2 and isinstance(tensor, nn.Parameter) and id(tensor) not in tables
            (matrices if is_matrix else rest)[name] = tensor
        if self.matrices.importance != self.importance:
            start_from_average(job, matrices, self.matrices)
        return self.matrices.merge(replace(job, merged=matrices)) + self.rest.merge(replace(job, merged=rest))

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = [f"matrices: {problem}" for problem in self.matrices.problems(tasks)]
        problems += [f"rest: {problem}" for problem in self.rest.problems(tasks)]
        for name, rule in {"matrices": self.matrices, "rest": self.rest}.items():
            if not rule.separable:
                problems.append(f"{name}: {type(rule).__name__} merges the model as a whole, not a part of it")
        if self.rest.options:
            problems.append(
                f"rest: {type(self.rest).__name__} merges whole layers, including their matrices; give a rule that "
                "needs no data"
            )
        return problems


def _tables(job: MergeJob) -> set[int]:
    """The ``id`` of each merged tensor that is an embedding's table under one of its names."""
    expert = job.tasks[0].expert
    tables = {id(part.weight) for part in expert.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))}
    return {id(job.merged[n]) for n, tensor, _ in named_tensors(expert) if n in job.merged and id(tensor) in tables}


@torch.no_grad()
def start_from_average(job: MergeJob, merged: Mapping[str, Tensor], rule: MergingMethod) -> None:
    """Start a rule from the average that its own importance gives.

    Args:
        job: the merge that it is part of.
        merged: name -> tensor to write the average into.
        rule: the rule.
    """
    weights = rule.weights([task.name for task in job.tasks])
    states = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in job.tasks]
    for name, tensor in merged.items():
        tensor.copy_(average([state[name] for state in states], weights))
