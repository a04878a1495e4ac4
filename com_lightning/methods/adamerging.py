"""AdaMerging: coefficients of task vectors that are learned without labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.sweep.context import each
from com_lightning.core.sweep.task import LayerRecord, NonFiniteError, Task
from com_lightning.core.tensors.gradients import gradients_enabled, gradients_of, seeded
from com_lightning.core.tensors.modules import copy_module
from com_lightning.core.tensors.placement import Placement
from com_lightning.methods.base import MergeJob, MergingMethod, ParameterRecord
from com_lightning.methods.parameterwise import SharedParameter, finite, shared_parameters
from com_lightning.methods.task_vectors import TIES, trimmed


@dataclass
class CoefficientRecord(ParameterRecord):
    """A parameter that AdaMerging has merged. ``coefficients``: task -> coefficient of its task vector."""

    coefficients: dict[str, float] | None = None


class AdaMerging(MergingMethod):
    """AdaMerging, layer-wise: task arithmetic with a coefficient for each parameter and task, learned without labels.

    Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", arXiv 2310.02575, section 3.2:
    ``W_l = W_l,base + Σ_i λ_l,i τ_l,i``. The ``λ`` are 0.3 at first. Adam trains them to lower the mean entropy of the
    merged model's predictions, summed over tasks. Each task has its own private parameters. As in the authors' code, a
    "layer" ``l`` is one parameter, and coefficients stay between 0 and 1.

    Predictions are logits, ``(n, classes)``. They come from the module's ``predict_step`` if it overrides that, else
    from its ``forward`` for the first element of the batch (or for the batch, if it is a tensor). Entropy is that of a
    classifier, so AdaMerging does not suit other modules.

    We take the calibration data in random order, one batch of each task for a step. The batch size is that of the
    MergeDataModule or of the loader. The authors take two batches of 16 from the shuffled test data. Labels are not
    read. The default runs ``500 × tasks`` batches forward and backward, and holds all task vectors on the device. This
    takes the memory of about ``tasks + 4`` models. Importance weights a task's entropy. Buffers are averaged. Several
    processes share the batches, and take the same steps as one process. A batch that holds NaN or infinity is an error,
    also if ``on_bad_batch`` is ``"skip"``.

    Args:
        steps: number of Adam's steps, 500 in the authors' code. 0 gives task arithmetic with the scale ``start``.
        learning_rate: Adam's learning rate.
        start: the coefficients at first.
        plus_plus: AdaMerging++: keep of each task vector what TIES keeps, the largest values that agree with the
            elected sign.
        density: share of each task vector that ``plus_plus`` keeps.
        seed: seed of the order of batches.
        importance: task -> its weight, relative to the others. The default is uniform.

    Raises:
        MergeError: during the merge, if predictions are not logits, or do not depend on the shared parameters.
        NonFiniteError: for NaN or infinity in a task's entropy. The message names task and batch.
    """

    needs = frozenset({"data", "base"})
    separable = False

    def __init__(
        self,
        steps: int = 500,
        learning_rate: float = 1e-3,
        start: float = 0.3,
        plus_plus: bool = False,
        density: float = 0.2,
        seed: int = 0,
        importance: dict[str, float] | None = None,
    ) -> None:
        super().__init__(importance)
        self.steps, self.learning_rate, self.start = steps, learning_rate, start
        self.plus_plus, self.density, self.seed = plus_plus, density, seed

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        weights = dict(zip((task.name for task in job.tasks), self.weights([task.name for task in job.tasks])))
        with job.context.peers.shares_failures():
            return self._merge(job, weights)

    @torch.no_grad()
    def _merge(self, job: MergeJob, weights: Mapping[str, float]) -> list[LayerRecord]:
        start = time.perf_counter()
        parameters = list(shared_parameters(job, weights))
        if not parameters:
            return []
        vectors = self._vectors(parameters)
        tasks = [(number, task) for number, task in enumerate(job.tasks) if weights[task.name] > 0]
        # In float64 and on the host: the same in all processes, whatever computes the gradients.
        raw = torch.full((len(parameters), len(tasks)), self.start, dtype=torch.float64)
        if self.steps:
            self._learn(job, tasks, weights, parameters, vectors, raw)
        records: list[LayerRecord] = []
        for parameter, coefficients, vector in zip(parameters, raw.clamp(0, 1), vectors):
            value = finite(_merged(parameter, vector, coefficients), parameter)
            assert value is not None
            parameter.target.copy_(value)
            by_task = {task.name: float(c) for (_, task), c in zip(tasks, coefficients)}
            name, count = parameter.name, {parameter.name: parameter.target.numel()}
            record = CoefficientRecord(name, type(self).__name__, count, coefficients=by_task)
            record.seconds, start = time.perf_counter() - start, time.perf_counter()
            job.context.on_layer(record)
            records.append(record)
        return records

    def _learn(
        self,
        job: MergeJob,
        tasks: Sequence[tuple[int, Task]],
        weights: Mapping[str, float],
        parameters: Sequence[SharedParameter],
        vectors: Sequence[Tensor],
        raw: Tensor,
    ) -> None:
        """Train the coefficients, in place. All processes take the same steps, each on the batches that it has."""
        peers = job.context.peers
        models = [_Model(job, task, parameters) for _, task in tasks]
        orders = [_order(job, task, self.seed + number) for number, task in tasks]
        adam = torch.optim.Adam([raw], lr=self.learning_rate)
        for step in each(range(self.steps), job.context.progress, "learning coefficients"):
            coefficients = raw.clamp(0, 1)
            merged = [_merged(p, vector, row) for p, vector, row in zip(parameters, vectors, coefficients)]
            gradient = torch.zeros_like(raw)
            for (number, task), model, order in zip(tasks, models, orders):
                index = order(step)
                mine = list(task.batch_numbers)
                if index in mine:
                    share = weights[task.name] * len(tasks)
                    slopes = model.slopes(merged, task.batches[mine.index(index)], index, 100_003 * number + step)
                    for place, (slope, vector) in enumerate(zip(slopes, vectors)):
                        if slope is not None:
                            dot = vector.reshape(len(vector), -1) @ slope.to(vector).flatten()
                            gradient[place] += share * dot.cpu()
            # A coefficient that has been cut off has no slope.
            total = torch.stack(peers.exchange(gradient)).sum(0)
            raw.grad = total.mul_((raw >= 0) & (raw <= 1))
            adam.step()

    def _vectors(self, parameters: Sequence[SharedParameter]) -> list[Tensor]:
        """The task vectors of each parameter, ``(tasks, *shape)``."""
        if not self.plus_plus:
            return [torch.stack([p.vector(task) for task in p.tasks]) for p in parameters]
        limits = TIES(self.density).limits(parameters)
        vectors = []
        for parameter in parameters:
            least = limits(parameter)
            largest = torch.stack([trimmed(parameter.vector(task), least[task]) for task in parameter.tasks])
            sign = sum(largest[n] * parameter.share(task) for n, task in enumerate(parameter.tasks))
            assert isinstance(sign, Tensor)
            vectors.append(largest.mul_(largest.sign() * sign.sign() > 0))
        return vectors

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if self.steps < 0:
            problems.append(f"steps: must be 0 or more, got {self.steps}")
        for name, value in {"learning_rate": self.learning_rate, "density": self.density}.items():
            if not 0 < value <= 1:
                problems.append(f"{name}: must be above 0 and at most 1, got {value}")
        if not 0 <= self.start <= 1:
            problems.append(f"start: must be between 0 and 1, got {self.start}")
        return problems


def _merged(parameter: SharedParameter, vectors: Tensor, coefficients: Tensor) -> Tensor:
    """``base + Σ_i λ_i τ_i``, where ``vectors`` are the ``τ_i``, ``(tasks, *shape)``."""
    change = coefficients.to(vectors) @ vectors.reshape(len(vectors), -1)
    return change.view(parameter.target.shape).add_(parameter.base())


class _Model:
    """A task's model with merged parameters to differentiate by. Buffers are the average."""

    def __init__(self, job: MergeJob, task: Task, parameters: Sequence[SharedParameter]) -> None:
        assert task.predict is not None, "a job for a rule that reads predictions says how to get them"
        self.task, self.predict = task, task.predict
        placement = Placement(task.expert, task.move)
        shared = {name: tensor for name, tensor in job.merged.items() if name in placement.stored}
        leaves: dict[int, Tensor] = {}
        for parameter in parameters:
            device, dtype = placement.target(parameter.name)
            leaves[id(parameter.target)] = nn.Parameter(torch.empty(parameter.target.shape, dtype=dtype, device=device))
        # A tied parameter is here under all of its names.
        tensors = {n: leaves[id(t)] if id(t) in leaves else placement.place(n, t) for n, t in shared.items()}
        self.module = placement.module(tensors)
        self.leaves = [leaves[id(parameter.target)] for parameter in parameters]

    def slopes(self, merged: Sequence[Tensor], batch: Any, index: int, seed: int) -> Sequence[Tensor | None]:
        """Gradients of the mean entropy on a batch by the merged parameters."""
        for leaf, value in zip(self.leaves, merged):
            leaf.copy_(value)
        with gradients_enabled(self.module), seeded(seed, self.leaves):
            logits = self.predict(copy_module(self.module), batch, index)
            loss = entropy(logits)
            if not bool(loss.isfinite()):
                raise NonFiniteError(f"task '{self.task.name}', batch {index}: the predictions hold NaN or infinity")
            return gradients_of(loss, self.leaves)


def entropy(logits: Tensor) -> Tensor:
    """Return the mean entropy of predictions, from logits ``(n, classes)``.

    Example::

        >>> round(entropy(torch.zeros(3, 4)).item(), 4)  # log 4
        1.3863
    """
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    return -(logs.exp() * logs).sum(1).mean()


def _order(job: MergeJob, task: Task, seed: int) -> Callable[[int], int]:
    """Step -> number of the batch among those of all processes. Each round takes each batch once, in random order."""
    numbers = sorted(number for share in job.context.peers.exchange(list(task.batch_numbers)) for number in share)
    if not numbers:
        raise ValueError(f"task '{task.name}': there is no calibration batch")
    rounds: dict[int, list[int]] = {}

    def batch(step: int) -> int:
        turn = step // len(numbers)
        if turn not in rounds:
            rounds.clear()
            generator = torch.Generator().manual_seed(1_000_003 * seed + turn)
            rounds[turn] = torch.randperm(len(numbers), generator=generator).tolist()
        return numbers[rounds[turn][step % len(numbers)]]

    return batch
