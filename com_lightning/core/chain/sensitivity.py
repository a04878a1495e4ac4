"""How much the predictions of each expert react to the outputs of each layer.

A rule that fits a layer's outputs by least squares takes an error in any direction for as bad as in any other. What an
expert makes of its outputs tells them apart. For task i let ``f`` be the outputs of the last layer that has parameters
(logits, as a rule), ``y`` those of the layer in question, and

    H_i = E[ (∂f/∂y)ᵀ F (∂f/∂y) ],    F = 1    or    F = diag(p) - p pᵀ,  p = softmax(f / 2)

the Gauss-Newton matrix of a distance between predictions: of their numbers, or of the probabilities that they stand
for. ``|| H_i^½ (W x̂ - W_i x) ||²`` is then, to second order and with rows and gradients taken for independent, what an
error at this layer does to the predictions; see :func:`~com_lightning.core.solve.weighted_ridge.solve_in_metrics`.

No labels are needed. Each batch is run forward and backward once: for random numbers ``v`` with ``E[v vᵀ] = F``, the
gradients of ``v · f`` by ``y`` are rows ``g`` with ``E[g gᵀ] = H_i``. That is the output side of K-FAC (Martens and
Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671, section 3).
Experts were matched in such metrics by Tam et al., "Merging by Matching Models in Task Parameter Subspaces", arXiv
2312.04339; what is new here is that it is done in a chain, on the merged model's inputs. It goes beyond Chain of
Merges.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from com_lightning.core.chain.chain import _Call, _Chain
from com_lightning.core.chain.gather import CalibrationForward
from com_lightning.core.chain.options import ChainOptions, Distance
from com_lightning.core.layers import kept
from com_lightning.core.layers.convolution import Convolution
from com_lightning.core.layers.linear import Linear
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.function_calls import Uses
from com_lightning.core.sweep.lockstep import Arrival, Forward
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.gradients import differentiated
from com_lightning.core.tensors.matmul import exact_products
from com_lightning.core.tensors.modules import copy_module
from com_lightning.core.tensors.tracked import plain

RANK = 64
"""A layer's matrix is kept as a sketch of at most this many columns: all of it would be as large as the model."""
TEMPERATURE = 2.0
"""Of the probabilities: experts that are sure of everything would have nothing to say."""


@dataclass
class Sensitivity:
    """The matrix ``H`` of one layer for one task, sketched, with sums rather than means.

    Attributes:
        sketch: ``H Ω``, ``(o, r)``, where ``Ω`` is :func:`omega_of`.
        trace: of ``H``.
    """

    sketch: Tensor
    trace: Tensor

    @staticmethod
    def empty(outputs: int, device: torch.device) -> Sensitivity:
        """Of no row yet."""
        columns = min(outputs, RANK)
        return Sensitivity(torch.zeros(outputs, columns, device=device), torch.zeros((), device=device))

    def add(self, gradients: Tensor, omega: Tensor) -> None:
        """Add rows ``g``, ``(n, o)``."""
        self.sketch.addmm_(gradients.T, gradients @ omega)
        self.trace += gradients.square().sum()

    def root(self, omega: Tensor) -> Tensor | None:
        """``U``, ``(o, r)`` in float64: ``U Uᵀ`` is the Nyström approximation of ``H``, scaled to a mean diagonal of 1.
        ``None`` if there is nothing that the predictions react to."""
        sketch, trace = self.sketch.double(), float(self.trace)
        if not 0 < trace < float("inf") or not bool(sketch.isfinite().all()):
            return None
        sketch = sketch * (len(sketch) / trace)
        core = omega.double().T @ sketch
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        known = values > 1e-6 * values[-1]  # of the others float32 sums tell nothing
        root = sketch @ (vectors[:, known] / values[known].sqrt())
        scaled: Tensor = root * (len(root) / root.square().sum()).sqrt()
        return scaled


def omega_of(layer: str, outputs: int, device: torch.device) -> Tensor:
    """``Ω``, ``(o, r)``: random numbers, the same for all tasks and processes; ``1`` where nothing need be left out."""
    if outputs <= RANK:
        return torch.eye(outputs, device=device)
    generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
    return torch.randn(outputs, RANK, generator=generator).to(device)


def roots(
    tasks: Sequence[Task], merged: Mapping[str, Tensor], distance: Distance, peers: Peers, quiet: bool = True
) -> dict[str, list[Tensor | None]]:
    """For each layer that has any, by name, the ``U`` of each task (see :meth:`Sensitivity.root`).

    Args:
        tasks: the experts and their calibration data. Every batch is run forward and backward once, one at a time.
        merged: as for :func:`~com_lightning.core.chain.chain.merge_layers`; not changed.
        distance: between predictions: ``"probabilities"``, if they are logits over their last dimension (of images: the
            channels), or ``"numbers"``.
        peers: other processes, with batches of their own.
        quiet: whether no progress is shown.
    """
    sensing = _Sensing(tasks, merged, distance)
    total = sum(len(task.batches) for task in tasks)
    found: list[dict[str, Sensitivity]] = []
    hidden = quiet or peers.rank > 0
    with peers.told(), tqdm(total=total, desc="Sensitivity", leave=False, disable=hidden) as bar:
        for number, task in enumerate(tasks):
            sensing.found = {}
            for batch in range(len(task.batches)):
                sensing.sense(number, batch)
                bar.update()
            found.append(_added_up(sensing.found, peers, sensing.models.device))
    names = dict.fromkeys(name for own in found for name in own)
    result: dict[str, list[Tensor | None]] = {}
    for name in names:
        outputs = next(len(own[name].sketch) for own in found if name in own)
        omega = omega_of(name, outputs, sensing.models.device)
        result[name] = [own[name].root(omega) if name in own else None for own in found]
    return result


def _added_up(own: dict[str, Sensitivity], peers: Peers, device: torch.device) -> dict[str, Sensitivity]:
    """The sums of all processes, in all of them."""
    if peers.size == 1:
        return own
    sizes: dict[str, int] = {}
    for told in peers.exchange({name: len(entry.sketch) for name, entry in own.items()}):
        sizes.update(told)
    for name, outputs in sizes.items():
        entry = own.setdefault(name, Sensitivity.empty(outputs, device))
        for tensor in (entry.sketch, entry.trace):
            peers.add(tensor, 0)
            peers.broadcast(tensor, 0)
    return {name: own[name] for name in sizes}


class _Sensing(_Chain):
    """One expert's forward at a time, with gradients; nothing is solved."""

    def __init__(self, tasks: Sequence[Task], merged: Mapping[str, Tensor], distance: Distance) -> None:
        rule = ChainOptions("expert", "merged")
        super().__init__(tasks, merged, [1 / len(tasks)] * len(tasks), rule, Run())
        self.distance, self.place = distance, (0, 0)
        self.found: dict[str, Sensitivity] = {}
        self.last: Tensor | None = None
        self.gradients: dict[str, Tensor] = {}

    def sense(self, task: int, batch: int) -> None:
        """Add what one batch tells to :attr:`found`."""
        self.place, self.uses, self.last, self.gradients = (task, batch), Uses(self.models), None, {}
        self.run()
        keep = self.tasks[task].keep(self.tasks[task].batches[batch])
        with exact_products():
            for layer, gradient in self.gradients.items():
                index = kept(keep, gradient.shape[:-1])
                rows = gradient.flatten(0, -2).float()
                rows = rows if index is None else rows[index]
                if bool(rows.isfinite().all()):  # the merge itself tells what is wrong with a batch
                    entry = self.found.setdefault(layer, Sensitivity.empty(rows.shape[1], rows.device))
                    entry.add(rows, omega_of(layer, rows.shape[1], rows.device))
        self.last, self.gradients = None, {}

    def _merge(self, name: str, arrivals: Sequence[Arrival]) -> LayerRecord:
        return LayerRecord(name, "", note="not solved while gradients are gathered")

    def _forwards(self) -> list[Forward]:
        number, batch = self.place
        task = self.tasks[number]
        index = task.batch_numbers[batch]
        module = copy_module(self.models.running[number, "expert"].module, self._watched(number, "expert"))
        for part in module.modules():
            if any(parameter is not None for parameter in part._parameters.values()):
                part.register_forward_hook(self._remember)
        label, seed = f"task '{task.name}', batch {index}, gradients", 100_003 * number + index
        start = torch.zeros((), device=self.models.device, requires_grad=True)
        call = partial(self._differentiate, _Call(task, module, task.batches[batch], index), start, seed)
        return [
            CalibrationForward(module, call, label, seed, partial(self._receive, start), number, batch, "expert"),
        ]

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self.last = plain(output)

    def _receive(self, start: Tensor, layer: str, output: Any) -> Tensor | None:
        """Take down the gradient by a layer's output. Returns what takes the output's place where none has begun."""
        output, dim = plain(output), self._channels(layer)
        if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
            return None
        begins = not output.requires_grad
        if begins:
            output = output + start
        if dim is not None:
            output.register_hook(lambda gradient: self.gradients.__setitem__(layer, gradient.detach().movedim(dim, -1)))
        return output if begins else None

    def _channels(self, layer: str) -> int | None:
        """The dimension of a layer's outputs that a matrix maps to, if there is one."""
        use = self.uses.layers.get(layer)
        kind = use.kind if use else self.models.candidates[layer].kind
        return -1 if isinstance(kind, Linear) else 1 if isinstance(kind, Convolution) else None

    def _differentiate(self, call: _Call, start: Tensor, seed: int) -> None:
        with differentiated(call.module):
            call()
            if self.last is not None and self.last.requires_grad:
                torch.autograd.backward(_probe(self.last, self.distance, seed), inputs=[start])


def _probe(outputs: Tensor, distance: Distance, seed: int) -> Tensor:
    """``v · f`` with random numbers ``v`` of second moment ``F`` (see the top of this module)."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(outputs.shape, generator=generator).to(outputs.device)
    values = outputs.float()
    dim = 1 if values.dim() > 3 else -1  # (batch, classes, height, width)
    if distance == "probabilities" and values.shape[dim] > 1:
        logs = (values / TEMPERATURE).log_softmax(dim)
        return (logs * logs.detach().exp().sqrt() * random).sum()
    return (values * random).sum()
