"""One pass of all calibration forwards over all layers, in lockstep and in execution order.

:class:`Sweep` walks; a :class:`Visitor` says what is done at each layer. Solving the chain, finding residual streams,
gathering gradients, measuring drift and the dry run are such visitors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.layers import LayerType
from com_lightning.core.sweep.bad_batches import BadBatches
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.function_calls import FunctionCalls
from com_lightning.core.sweep.layer import CalibrationForward, Layer
from com_lightning.core.sweep.lockstep import Forward, PausedCall, Position, WaitingLayer, lockstep
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.task import BatchId, ForwardId, LayerRecord, Stream, Task, batch_ids
from com_lightning.core.tensors.matmul import exact_products
from com_lightning.core.tensors.modules import copy_module
from com_lightning.core.tensors.placement import is_trackable
from com_lightning.core.tensors.tracked import Part, Tracked, WriteCount, untracked

Extent = tuple[str, tuple[int, int]]
"""Name of a parameter or buffer, and the first and last of its flattened elements that are meant."""


class Visitor(ABC):
    """What is done on a sweep."""

    watches_outputs: bool = False
    """Whether :meth:`on_output` is to be called."""

    def on_forward(self, forward: CalibrationForward) -> None:
        """A forward has been prepared. Its module is a copy of its own, and its ``call`` may be replaced."""

    @abstractmethod
    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        """All forwards that reach a layer wait at it. With several processes, all of them come here together.

        Args:
            sweep: that is under way.
            name: of the layer, see :meth:`Sweep.layer`.
            calls: the calls of the layer at which forwards of this process are paused; perhaps none.

        Returns:
            A record of the layer. If it has a note, the layer counts as not solved.
        """

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> Any:
        """A forward leaves the layer that it waited at. A result other than ``None`` replaces the output."""

    def shared_value(self) -> Any:
        """All forwards of this process have left the layer: what the other processes are to know of it."""

    def on_left(self, record: LayerRecord | None, values: Sequence[Any]) -> None:
        """All forwards of all processes have left the layer.

        Args:
            record: of the layer, to be completed; ``None`` if it was not solved.
            values: the :meth:`shared_value` of each process.
        """


class Sweep:
    """One pass over all layers.

    Args:
        tasks: the experts and their calibration data.
        models: of these tasks, with the streams that run.
        visitor: what is done at each layer.
        context: how the sweep is carried out.
        batches: those that run. ``None``: all.
        pager: keeps what paused forwards hold within a budget.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        models: Models,
        visitor: Visitor,
        context: Run | None = None,
        batches: Collection[BatchId] | None = None,
        pager: Pager | None = None,
    ) -> None:
        self.tasks, self.models, self.visitor, self.context = tasks, models, visitor, context or Run()
        self.batches = list(batch_ids(tasks)) if batches is None else batches
        self.pager = pager
        self.bad_batches = BadBatches(tasks, self.context)
        self.function_calls = FunctionCalls(models)
        self._writes = {name: WriteCount() for name in models.merged}
        self._record: LayerRecord | None = None
        """Of the layer that forwards are leaving."""

    def run(self) -> list[LayerRecord]:
        """Walk over all layers.

        Returns:
            Records of the layers that were reached, in order, then of what was used and could not be solved.
        """
        records: list[LayerRecord] = []
        places: dict[str, Position] = {name: (self.models.places.get(name, 0),) for name in self.models.candidates}
        layers = lockstep(self._forwards(), places, choose_next=self._choose_next, pager=self.pager)
        # Version counters, by which a changed input is noticed, do not exist in inference mode.
        with torch.inference_mode(False), torch.no_grad(), _without_fast_path(), self.pager or nullcontext():
            for name, calls in layers:
                record = self._visit(name, self.bad_batches.good(calls))
                if record.note:  # function calls within the layer may still be solved
                    self.function_calls.notes[name] = record
                else:
                    records.append(record)
                    self._record = record
        for notes in self.context.peers.exchange(self.function_calls.notes):
            self.function_calls.notes = {**notes, **self.function_calls.notes}
        unsolved = [record for record in self.function_calls.notes.values() if not self._is_solved(record.name)]
        for record in unsolved:
            self.context.on_layer(record)
        return records + unsolved

    def layer(self, name: str) -> Layer:
        """The layer that forwards of this process wait at."""
        return self.models.layer(name, self.function_calls.layers.get(name))

    def layer_type(self, name: str) -> LayerType:
        """Its type."""
        return (self.function_calls.layers.get(name) or self.models.candidates[name]).layer_type

    def refusal(self, layer: Layer, calls: Sequence[PausedCall]) -> str | None:
        """Why a layer cannot be solved; ``None`` if it can."""
        if late := [part.name for part in layer.parts.values() if not self.function_calls.is_unsolved(part)]:
            return f"{late[0]} was used before"
        if not all(isinstance(call.input, Tensor) for call in calls):
            return "it is called without a tensor"
        return layer.layer_type.refuses(layer.merged, calls[0].args, calls[0].kwargs)

    def extents(self, layer: Layer) -> list[Extent]:
        """All that a layer consists of."""
        return [(part.name, part.extent(self.models.merged[part.name])) for part in layer.parts.values()]

    def mark_solved(self, extents: Sequence[Extent]) -> None:
        """From now on these elements count as solved. Later layers that use them are refused."""
        for name, extent in extents:
            self.function_calls.solved.setdefault(self.models.tied[name], []).append(extent)

    def mark_written(self, name: str) -> None:
        """A merged tensor has been written to: forwards that go on compute with the new values."""
        self.models.refresh(name)
        self._writes[name].count += 1

    def _visit(self, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        # Under autocast, statistics would be gathered in half precision.
        with torch.autocast(self.models.device.type, enabled=False), exact_products():
            return self.visitor.on_layer(self, name, calls)

    def _choose_next(self, mine: WaitingLayer | None) -> WaitingLayer | None:
        """Which layer is next, among those that any process waits at. All forwards have left the last one by now."""
        everyone = self.context.peers.exchange((mine, self.function_calls.entered, self.visitor.shared_value()))
        for _, entered, _ in everyone:
            self.function_calls.used |= entered
        self.function_calls.entered = set()
        self.visitor.on_left(self._record, [value for _, _, value in everyone])
        if self._record is not None:
            self.context.on_layer(self._record)
            self._record = None
        return min((waiting_layer for waiting_layer, _, _ in everyone if waiting_layer), default=None)

    def _forwards(self) -> list[Forward]:
        tracked: dict[tuple[int, Stream], dict[int, Tensor]] = {}
        forwards: list[Forward] = []
        for batch in self.batches:
            task = self.tasks[batch.task]
            # Both models leave a layer with one batch before the next: one output at a time waits to be compared.
            for stream in self.models.streams:
                model = batch.task, stream
                if model not in tracked:
                    tracked[model] = self._tracked(batch.task, stream)
                module = copy_module(self.models.running[model].module, tracked[model])
                call = _Call(task, module, task.batches[batch.position], batch.number)
                forward = CalibrationForward(
                    module=module,
                    call=partial(self.bad_batches.run, batch, call),
                    label=f"task '{task.name}', batch {batch.number}, {stream} model",
                    seed=100_003 * batch.task + batch.number,
                    id=ForwardId(batch, stream),
                )
                if self.visitor.watches_outputs or self.bad_batches.is_skipping:
                    forward.on_output = partial(self._on_output, forward)
                self.visitor.on_forward(forward)
                forwards.append(forward)
        return forwards

    def _on_output(self, forward: CalibrationForward, layer: str, output: Any) -> Any:
        self.bad_batches.check(forward.id.batch)
        return self.visitor.on_output(forward, layer, untracked(output)) if self.visitor.watches_outputs else None

    def _tracked(self, task: int, stream: Stream) -> dict[int, Tensor]:
        """``id`` of a tensor of a model that runs -> the tracked tensor that takes its place in a forward."""
        models, tensors = self.models, dict[int, Tensor]()
        model = models.running[task, stream]
        for name, tensor in model.tensors.items():
            is_first = name in models.merged and name not in models.buffers and models.tied[name] == name
            if is_first and name not in models.task_tensors and is_trackable(name, tensor):
                writes = self._writes[name] if stream == "merged" else WriteCount()
                tensors[id(tensor)] = Tracked.of(
                    tensor, Part(name), self.function_calls.on_use, writes, target=model.targets.get(name)
                )
        return tensors

    def _is_solved(self, name: str) -> bool:
        """Whether the parameters of a layer, or the one of that name, were solved after all."""
        candidate = self.models.candidates.get(name)
        names = [name] if candidate is None else candidate.written(name).values()
        return all(self.models.tied.get(own) in self.function_calls.solved for own in names)


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """``nn.TransformerEncoderLayer`` may run as one fused function, in which nothing can pause."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Call:
    """A calibration forward. It refers to its own batch and to no other."""

    task: Task
    module: nn.Module
    batch: Any
    index: int

    def __call__(self) -> None:
        self.task.call(self.module, self.batch, self.index)
