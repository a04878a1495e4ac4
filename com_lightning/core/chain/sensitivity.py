"""How much the predictions of each expert depend on the outputs of each layer.

A rule that fits a layer's outputs by least squares weighs errors in all directions equally. Their effects on the
expert's predictions differ. For task i let ``f`` be the outputs of the last layer with parameters (usually logits),
``y`` the outputs of another layer, and

    H_i = E[ (∂f/∂y)ᵀ F (∂f/∂y) ],    F = 1    or    F = diag(p) - p pᵀ,  p = softmax(f / 2)

the Gauss-Newton matrix of a distance between predictions, taken as numbers or as probabilities. Then
``|| H_i^½ (W x̂ - W_i x) ||²`` is the effect of an error at this layer on the predictions, to second order and if rows
and gradients are independent; see :func:`~com_lightning.core.solve.weighted_ridge.solve_weighted`.

No labels are needed. Each batch runs forward and backward once. For random numbers ``v`` with ``E[v vᵀ] = F``, the
gradients of ``v · f`` with respect to ``y`` are rows ``g`` with ``E[g gᵀ] = H_i``. This is the output side of K-FAC
(Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", arXiv 1503.05671,
section 3). Tam et al. match experts in such metrics ("Merging by Matching Models in Task Parameter Subspaces", arXiv
2312.04339). To use them in a chain, on the merged model's inputs, is new here and goes beyond Chain of Merges.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.chain.options import Distance
from com_lightning.core.layers import LayerType, RowMask, rows_with_data
from com_lightning.core.layers.convolution import Convolution
from com_lightning.core.layers.linear import Linear
from com_lightning.core.sweep.context import Context, each
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
"""A layer's matrix is kept as a sketch with at most this many columns. All full matrices would be as large as the
model."""
TEMPERATURE = 2.0
"""Temperature of the softmax. Without it, experts that are very confident would have almost no gradients."""


@dataclass
class Sensitivity:
    """A sketch of the matrix ``H`` of one layer for one task. It has sums instead of means.

    Attributes:
        sketch: ``H Ω``, ``(o, r)``, where ``Ω`` is :func:`omega_of`.
        trace: the trace of ``H``.
    """

    sketch: Tensor
    trace: Tensor

    @staticmethod
    def empty(outputs: int, device: torch.device) -> Sensitivity:
        """A sketch without rows."""
        columns = min(outputs, RANK)
        return Sensitivity(_zeros((outputs, columns), device), _zeros((), device))

    def add(self, gradients: Tensor, omega: Tensor) -> None:
        """Add rows ``g``, ``(n, o)``."""
        self.sketch.addmm_(gradients.T, gradients @ omega)
        self.trace += gradients.square().sum()

    def root(self, omega: Tensor) -> Tensor | None:
        """Return ``U``, ``(o, r)`` in float64, or ``None`` if predictions do not depend on the layer.

        ``U Uᵀ`` is the Nyström approximation of ``H``, with its trace.
        """
        sketch, trace = self.sketch.double(), float(self.trace)
        if not 0 < trace < float("inf") or not bool(sketch.isfinite().all()):
            return None
        sketch = sketch * (len(sketch) / trace)
        core = omega.double().T @ sketch
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        is_reliable = values > 1e-6 * values[-1]  # the others are below the rounding errors of float32 sums
        root = sketch @ (vectors[:, is_reliable] / values[is_reliable].sqrt())
        scaled: Tensor = root * (trace / root.square().sum()).sqrt()
        return scaled


def omega_of(layer: str, outputs: int, device: torch.device) -> Tensor:
    """``Ω``, ``(o, r)``: random numbers, the same for all tasks and processes. The identity for a small ``H``."""
    if outputs <= RANK:
        return torch.eye(outputs, device=device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
    return torch.randn(outputs, RANK, generator=generator, dtype=torch.float32).to(device)


def _zeros(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.zeros(shape, device=device, dtype=torch.float32)  # whatever the default precision is


def roots(
    tasks: Sequence[Task], merged: Mapping[str, Tensor], distance: Distance, context: Context
) -> dict[str, list[Tensor | None]]:
    """Return layer -> the ``U`` of each task (see :meth:`Sensitivity.root`).

    Args:
        tasks: the experts and their calibration data. Each batch runs forward and backward once, one at a time.
        merged: as for :func:`~com_lightning.core.chain.chain.merge_layers`. It is not changed.
        distance: the distance between predictions: ``"probabilities"``, if they are logits over their last dimension
            (for images: the channels), or ``"numbers"``.
        context: how the merge is carried out. Each of its processes has its own batches.
    """
    peers = context.peers
    models = Models(tasks, merged, ("expert",))
    by_task: list[dict[str, Sensitivity]] = [{} for _ in tasks]
    with peers.shares_failures():
        for batch in each(list(batch_ids(tasks)), context.progress, "measuring sensitivity"):
            task = tasks[batch.task]
            gradients = gather_gradients(tasks, models, batch, distance)
            with exact_products():
                for layer, gradient in gradients.items():
                    mask = task.row_mask(task.batches[batch.position], layer)
                    _add_gradient(by_task[batch.task], layer, gradient, mask)
        by_task = [_sum_over_processes(by_layer, peers, models.device) for by_layer in by_task]
    result: dict[str, list[Tensor | None]] = {}
    for name in dict.fromkeys(name for by_layer in by_task for name in by_layer):
        outputs = next(len(by_layer[name].sketch) for by_layer in by_task if name in by_layer)
        omega = omega_of(name, outputs, models.device)
        result[name] = [by_layer[name].root(omega) if name in by_layer else None for by_layer in by_task]
    return result


def gather_gradients(tasks: Sequence[Task], models: Models, batch: BatchId, distance: Distance) -> dict[str, Tensor]:
    """Run one batch through its expert forward and backward.

    Args:
        tasks: the experts and their calibration data.
        models: the models of these tasks, in which the experts run.
        batch: the batch.
        distance: the distance between predictions.

    Returns:
        Layer -> gradient of ``v · f`` with respect to the layer's output, channels last.
    """
    visitor = GradientGatherer(distance, models)
    Sweep(tasks, models, visitor, batches=[batch]).run()
    return visitor.gradients


def _add_gradient(by_layer: dict[str, Sensitivity], layer: str, gradient: Tensor, mask: RowMask | None) -> None:
    rows_index = rows_with_data(mask, gradient.shape[:-1])
    rows = gradient.flatten(0, -2).float()
    rows = rows if rows_index is None else rows[rows_index]
    if bool(rows.isfinite().all()):  # the merge itself reports bad batches
        entry = by_layer.setdefault(layer, Sensitivity.empty(rows.shape[1], rows.device))
        entry.add(rows, omega_of(layer, rows.shape[1], rows.device))


def _sum_over_processes(by_layer: dict[str, Sensitivity], peers: Peers, device: torch.device) -> dict[str, Sensitivity]:
    """Add up the sums of all processes. All of them get the result."""
    if peers.size == 1:
        return by_layer
    sizes: dict[str, int] = {}
    for sizes_of_peer in peers.exchange({name: len(entry.sketch) for name, entry in by_layer.items()}):
        sizes.update(sizes_of_peer)
    for name, outputs in sizes.items():
        entry = by_layer.setdefault(name, Sensitivity.empty(outputs, device))
        for tensor in (entry.sketch, entry.trace):
            peers.add(tensor, 0)
            peers.broadcast(tensor, 0)
    return {name: by_layer[name] for name in sizes}


class GradientGatherer(Visitor):
    """Differentiates the predictions of one forward with respect to the output of each layer.

    Args:
        distance: the distance between predictions.
        models: the models of the sweep.

    Attributes:
        gradients: layer -> gradient, channels last.
    """

    watches_outputs = True

    def __init__(self, distance: Distance, models: Models) -> None:
        self.distance, self.models = distance, models
        self.gradients: dict[str, Tensor] = {}
        self._last_output: Tensor | None = None
        """Output of the last module with parameters that has run. When the forward ends, these are the predictions."""
        self._start = _zeros((), models.device).requires_grad_()
        """Zero, added to the first output so that autograd records the forward from there on."""
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
        """Have autograd store the gradient with respect to a layer's output. Replace the first output."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or not torch.is_grad_enabled():
            return None
        is_first = not output.requires_grad
        if is_first:
            output = output + self._start
        layer_type = self._layer_types[layer]
        dim = -1 if isinstance(layer_type, Linear) else 1 if isinstance(layer_type, Convolution) else None
        if dim is not None:

            def store(gradient: Tensor) -> None:
                self.gradients[layer] = gradient.detach().movedim(dim, -1)

            output.register_hook(store)
        return output if is_first else None

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
    """``v · f`` for random numbers ``v`` with ``E[v vᵀ] = F``, see the top of this module."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(outputs.shape, generator=generator, dtype=torch.float32).to(outputs.device)
    values = outputs.float()
    dim = 1 if values.dim() > 3 else -1  # (batch, classes, height, width)
    if distance == "probabilities" and values.shape[dim] > 1:
        logs = (values / TEMPERATURE).log_softmax(dim)
        return (logs * logs.detach().exp().sqrt() * random).sum()
    return (values * random).sum()
