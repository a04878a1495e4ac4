"""How much the predictions of each expert react to the outputs of each layer.

A rule that fits a layer's outputs by least squares takes an error in any direction for as bad as in any other. What an
expert makes of its outputs tells them apart. For task i let ``f`` be the outputs of the last layer that has parameters
(logits, as a rule), ``y`` those of the layer in question, and

    H_i = E[ (∂f/∂y)ᵀ F (∂f/∂y) ],    F = 1    or    F = diag(p) - p pᵀ,  p = softmax(f / 2)

the Gauss-Newton matrix of a distance between predictions: of their numbers, or of the probabilities that they stand
for. ``|| H_i^½ (W x̂ - W_i x) ||²`` is then, to second order and with rows and gradients taken for independent, what an
error at this layer does to the predictions; see :func:`~com_lightning.core.solve.weighted_ridge.solve_weighted`.

No labels are needed. Each batch is run forward and backward once: for random numbers ``v`` with ``E[v vᵀ] = F``, the
gradients of ``v · f`` by ``y`` are rows ``g`` with ``E[g gᵀ] = H_i``. That is the output side of K-FAC (Martens and
Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671, section 3).
Experts were matched in such metrics by Tam et al., "Merging by Matching Models in Task Parameter Subspaces", arXiv
2312.04339; what is new here is that it is done in a chain, on the merged model's inputs. It goes beyond Chain of
Merges.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from com_lightning.core.chain.options import Distance
from com_lightning.core.layers import LayerType, rows_with_data
from com_lightning.core.layers.convolution import Convolution
from com_lightning.core.layers.linear import Linear
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import BatchId, LayerRecord, Task, batch_ids
from com_lightning.core.tensors.gradients import gradients_enabled
from com_lightning.core.tensors.matmul import exact_products
from com_lightning.core.tensors.tracked import untracked

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
        """Return ``U``, ``(o, r)`` in float64, or ``None`` if predictions do not react to the layer.

        ``U Uᵀ`` is the Nyström approximation of ``H``, scaled to a mean diagonal of 1.
        """
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
    """Return the ``U`` of each task (see :meth:`Sensitivity.root`), by name of the layer.

    Args:
        tasks: the experts and their calibration data. Every batch is run forward and backward once, one at a time.
        merged: as for :func:`~com_lightning.core.chain.chain.merge_layers`; not changed.
        distance: between predictions: ``"probabilities"``, if they are logits over their last dimension (of images: the
            channels), or ``"numbers"``.
        peers: other processes, with batches of their own.
        quiet: whether no progress is shown.
    """
    models = Models(tasks, merged, ("expert",))
    of_tasks: list[dict[str, Sensitivity]] = [{} for _ in tasks]
    batches = list(batch_ids(tasks))
    hidden = quiet or peers.rank > 0
    with peers.shares_failures(), tqdm(batches, desc="Sensitivity", leave=False, disable=hidden) as bar:
        for batch in bar:
            mask = tasks[batch.task].mask(tasks[batch.task].batches[batch.position])
            gradients = gather_gradients(tasks, models, batch, distance)
            with exact_products():
                for layer, gradient in gradients.items():
                    _add_gradient(of_tasks[batch.task], layer, gradient, mask)
        of_tasks = [_added_up(of_task, peers, models.device) for of_task in of_tasks]
    result: dict[str, list[Tensor | None]] = {}
    for name in dict.fromkeys(name for of_task in of_tasks for name in of_task):
        outputs = next(len(of_task[name].sketch) for of_task in of_tasks if name in of_task)
        omega = omega_of(name, outputs, models.device)
        result[name] = [of_task[name].root(omega) if name in of_task else None for of_task in of_tasks]
    return result


def gather_gradients(tasks: Sequence[Task], models: Models, batch: BatchId, distance: Distance) -> dict[str, Tensor]:
    """Run one batch through its expert forward and backward.

    Args:
        tasks: the experts and their calibration data.
        models: of these tasks, with the experts running.
        batch: which one.
        distance: between predictions.

    Returns:
        Layer -> gradient of a random probe of the predictions by the layer's output, channels last.
    """
    visitor = GradientGatherer(distance, models)
    Sweep(tasks, models, visitor, batches=[batch]).run()
    return visitor.gradients


def _add_gradient(of_task: dict[str, Sensitivity], layer: str, gradient: Tensor, mask: Tensor | None) -> None:
    index = rows_with_data(mask, gradient.shape[:-1])
    rows = gradient.flatten(0, -2).float()
    rows = rows if index is None else rows[index]
    if bool(rows.isfinite().all()):  # the merge itself says what is wrong with a batch
        entry = of_task.setdefault(layer, Sensitivity.empty(rows.shape[1], rows.device))
        entry.add(rows, omega_of(layer, rows.shape[1], rows.device))


def _added_up(of_task: dict[str, Sensitivity], peers: Peers, device: torch.device) -> dict[str, Sensitivity]:
    """The sums of all processes, in all of them."""
    if peers.size == 1:
        return of_task
    sizes: dict[str, int] = {}
    for theirs in peers.exchange({name: len(entry.sketch) for name, entry in of_task.items()}):
        sizes.update(theirs)
    for name, outputs in sizes.items():
        entry = of_task.setdefault(name, Sensitivity.empty(outputs, device))
        for tensor in (entry.sketch, entry.trace):
            peers.add(tensor, 0)
            peers.broadcast(tensor, 0)
    return {name: of_task[name] for name in sizes}


class GradientGatherer(Visitor):
    """Differentiates the predictions of one forward by the output of each layer.

    Args:
        distance: between predictions.
        models: of the sweep.
    """

    watches_outputs = True

    def __init__(self, distance: Distance, models: Models) -> None:
        self.distance, self.models = distance, models
        self.gradients: dict[str, Tensor] = {}
        self._last_output: Tensor | None = None
        """Of the last layer with parameters that has run: the predictions, in the end."""
        self._start = torch.zeros((), device=models.device, requires_grad=True)
        """Added to the first output, so that there is something to differentiate by."""
        self._layer_types: dict[str, LayerType] = {}

    def on_forward(self, forward: CalibrationForward) -> None:
        for part in forward.module.modules():
            if any(parameter is not None for parameter in part._parameters.values()):
                part.register_forward_hook(self._remember)
        forward.call = partial(self._differentiate, forward.module, forward.call, forward.seed)

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        self._layer_types[name] = sweep.layer_type(name)
        return LayerRecord(name, "", note="not solved while gradients are gathered")

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> Tensor | None:
        """Note the gradient by a layer's output. Returns what replaces the output where none has begun."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
            return None
        begins = not output.requires_grad
        if begins:
            output = output + self._start
        layer_type = self._layer_types[layer]
        dim = -1 if isinstance(layer_type, Linear) else 1 if isinstance(layer_type, Convolution) else None
        if dim is not None:

            def note(gradient: Tensor) -> None:
                self.gradients[layer] = gradient.detach().movedim(dim, -1)

            output.register_hook(note)
        return output if begins else None

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self._last_output = untracked(output)

    def _differentiate(self, module: nn.Module, call: Callable[[], object], seed: int) -> None:
        with gradients_enabled(module):
            call()
            if self._last_output is not None and self._last_output.requires_grad:
                torch.autograd.backward(_probe(self._last_output, self.distance, seed), inputs=[self._start])
        self._last_output = None


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
