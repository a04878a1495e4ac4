"""Fisher merging: an average that weights each value by how much the loss of its task depends on it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from com_lightning.core.sweep.context import each
from com_lightning.core.sweep.task import LayerRecord, NonFiniteError, SkippedBatch, Task
from com_lightning.core.tensors.gradients import gradients_enabled, gradients_of, seeded
from com_lightning.core.tensors.modules import copy_module, copy_on_same_storage
from com_lightning.core.tensors.placement import Placement
from com_lightning.methods.base import MergeJob, MergingMethod, ParameterRecord
from com_lightning.methods.parameterwise import SharedParameter, finite, shared_parameters


class Fisher(MergingMethod):
    """Fisher merging: the average of the experts, weighted by the diagonals of their Fisher information.

    Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", arXiv 2111.09832, section 3.2:
    ``W = Σ_i a_i F_i W_i / Σ_i a_i F_i``, element by element. ``a_i`` is the importance of task i, and
    ``F_i = 1/N Σ_n g_n²``, of the shape of ``W_i``, comes from the gradients ``g_n`` of the samples' losses at expert
    i. A common factor of all losses cancels.

    The loss is what the module's ``training_step`` returns (a tensor, or a dictionary with ``"loss"``). It runs in eval
    mode on the calibration batches with their labels, and ``log`` is muted. So this is the *empirical* Fisher
    information. The paper takes the expectation over labels that the model predicts, for which a LightningModule has no
    hook. If an expert fits its calibration data, its gradients vanish, and so does its influence. Calibrate on data
    that it was not trained on, or set ``normalize``.

    The gradients of single samples are squared: use ``MergeDataModule(batch_size=1)``. A batch of ``B`` samples, whose
    loss should be their mean, counts as ``B`` samples of ``B ḡ²`` with the mean gradient ``ḡ``. This has no bias if the
    gradients' mean is zero, as at the optimum, but few batches make it noisy. The checks before the merge warn of it.

    Where all ``F_i`` are zero, the result is the average. The authors replace values below a floor of 1e-6 by this
    floor. We add a floor to the sum of the ``F_i``, relative to the mean of that sum. It pulls values that hardly
    matter to any task towards the average, and does not depend on the scale of the loss. Buffers are averaged.

    One expert at a time is on the device, with its gradients and their squares, beside numerator and denominator: about
    six models. Several processes add up their squares, and each holds a share of numerator and denominator.

    Args:
        importance: task -> its weight ``a_i``, relative to the others. The default is uniform.
        normalize: divide each ``F_i`` by its norm over all parameters, as the authors' code does.
        floor: weight of the average, relative to the mean of ``Σ a_i F_i``.

    Raises:
        MergeError: before the merge, if a module has no ``training_step``; during the merge, if that returns no loss.
        NonFiniteError: for NaN or infinity in a loss or a gradient, unless such batches are to be skipped. The message
            names task and batch.
    """

    needs = frozenset({"data", "loss"})

    def __init__(
        self, importance: dict[str, float] | None = None, normalize: bool = False, floor: float = 1e-6
    ) -> None:
        super().__init__(importance)
        self.normalize, self.floor = normalize, floor

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        weights = dict(zip((task.name for task in job.tasks), self.weights([task.name for task in job.tasks])))
        with job.context.peers.shares_failures():
            return self._merge(job, weights)

    @torch.no_grad()
    def _merge(self, job: MergeJob, weights: Mapping[str, float]) -> list[LayerRecord]:
        peers, start = job.context.peers, time.perf_counter()
        parameters = list(shared_parameters(job, weights))
        sums = _Sums()
        for number, task in enumerate(job.tasks):
            if weights[task.name] > 0:
                self._add(sums, job, number, task, parameters, weights[task.name])
        totals = peers.exchange((sums.total(), sum(parameter.target.numel() for parameter in parameters)))
        floor = self.floor * sum(total for total, _ in totals) / max(totals[0][1], 1)
        records: list[LayerRecord] = []
        for number, parameter in enumerate(parameters):
            owner, value = number % peers.size, None
            if owner == peers.rank:
                change = sums.change(parameter.name, floor)
                value = finite(change.add_(parameter.average()), parameter)
            peers.exchange(value is not None)  # returns if no process has failed
            value = torch.empty_like(parameter.target) if value is None else value.to(parameter.target.device)
            peers.broadcast(value, owner)
            parameter.target.copy_(value)
            record = ParameterRecord(parameter.name, type(self).__name__, {parameter.name: parameter.target.numel()})
            record.seconds, start = time.perf_counter() - start, time.perf_counter()
            job.context.on_layer(record)
            records.append(record)
        return records

    def _add(
        self,
        sums: _Sums,
        job: MergeJob,
        number: int,
        task: Task,
        parameters: Sequence[SharedParameter],
        weight: float,
    ) -> None:
        """Add an expert's part. Each parameter is added in the process that it belongs to."""
        peers = job.context.peers
        squares, samples, skipped = squared_gradients(job, number, task, parameters)
        everyone = peers.exchange((samples, skipped))
        job.context.skipped += [batch for _, batches in everyone for batch in batches]
        total = sum(count for count, _ in everyone)
        if not total:
            raise NonFiniteError(f"task '{task.name}': no calibration batch is left")
        mine = []
        for place, parameter in enumerate(parameters):
            peers.add(squares[parameter.name], place % peers.size)
            if place % peers.size == peers.rank:
                mine.append(parameter)
                squares[parameter.name] /= total
            else:
                del squares[parameter.name]
        if self.normalize:
            energy = sum(float(square.double().square().sum()) for square in squares.values())
            norm = math.sqrt(sum(peers.exchange(energy)))
            weight /= norm or 1.0
        for parameter in mine:
            sums.add(parameter, task.name, squares.pop(parameter.name), weight)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if not 0 <= self.floor < math.inf:
            problems.append(f"floor: must be 0 or more, and finite, got {self.floor}")
        return problems


@dataclass
class _Sums:
    """``Σ a_i F_i (W_i − W̄)`` and ``Σ a_i F_i`` of each parameter, with the average ``W̄``.

    Differences from the average lose no digits if experts are close, and give identical experts back.
    """

    above: dict[str, Tensor] = field(default_factory=dict)
    below: dict[str, Tensor] = field(default_factory=dict)

    def add(self, parameter: SharedParameter, task: str, square: Tensor, weight: float) -> None:
        name, square = parameter.name, square.mul_(weight)
        change = parameter.expert(task) - parameter.average()
        self.above[name] = change.mul_(square) if name not in self.above else self.above[name].addcmul_(change, square)
        self.below[name] = square if name not in self.below else self.below[name].add_(square)

    def total(self) -> float:
        return sum(float(tensor.sum(dtype=torch.float64)) for tensor in self.below.values())

    def change(self, name: str, floor: float) -> Tensor:
        below = self.below.pop(name).add_(floor)
        return self.above.pop(name).div_(below.masked_fill_(below == 0, 1.0))


def squared_gradients(
    job: MergeJob, number: int, task: Task, parameters: Sequence[SharedParameter]
) -> tuple[dict[str, Tensor], int, list[SkippedBatch]]:
    """Sum the squared gradients of an expert's samples over this process's batches.

    Args:
        job: the merge.
        number: number of the task.
        task: the task, with its expert and batches.
        parameters: the parameters to differentiate by.

    Returns:
        The sums by name, the number of samples, and the batches that were left out.

    Raises:
        NonFiniteError: if the loss or a gradient is NaN or infinite, and such batches are not skipped.
    """
    assert task.loss is not None, "a rule that asks for the loss says so in `needs`"
    module = copy_on_same_storage(Placement(task.expert, task.move).module())
    named = dict(module.named_parameters(remove_duplicate=False))
    leaves = [named[parameter.name].requires_grad_(True) for parameter in parameters]
    squares = {p.name: torch.zeros(p.target.shape, dtype=p.dtype, device=p.device) for p in parameters}
    samples, skipped = 0, list[SkippedBatch]()
    batches = list(zip(task.batch_numbers, task.batches))
    for index, batch in each(batches, job.context.progress, f"gradients of {task.name}"):
        with gradients_enabled(module), seeded(100_003 * number + index, leaves):
            # A copy for each batch: tensors that a module stores (losses, for instance) would keep the graph in memory.
            loss = task.loss(copy_module(module), batch, index)
            gradients = gradients_of(loss, leaves)
        if not all(bool(g.isfinite().all()) for g in (loss.detach(), *gradients) if g is not None):
            reason = "hold or give NaN or infinity: its loss, or the gradients of that"
            if job.context.on_bad_batch == "raise":
                raise NonFiniteError(f"task '{task.name}', batch {index}: NaN or infinity in the loss or its gradients")
            skipped.append(SkippedBatch(task.name, index, "training_step", reason))
            continue
        size = task.size(batch)
        samples += size
        for parameter, gradient in zip(parameters, gradients):
            if gradient is not None:
                mean = gradient.to(squares[parameter.name])
                squares[parameter.name].addcmul_(mean, mean, value=size**2)
    return squares, samples, skipped
