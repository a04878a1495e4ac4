"""One pass of all calibration forwards over all layers, in lockstep and in execution order.

A :class:`Sweep` runs the forwards. Its :class:`Visitor` does the work at each layer. There are visitors that solve the
chain of merges, find residual streams, gather gradients, measure drift, and count memory in a dry run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.layers import LayerType
from com_lightning.core.sweep.bad_batches import BadBatches
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.function_calls import FunctionCalls
from com_lightning.core.sweep.layer import CalibrationForward, Layer
from com_lightning.core.sweep.lockstep import Forward, PausedCall, Position, WaitingLayer, lockstep
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.task import SEEDS_OF_TASK, BatchId, ForwardId, LayerRecord, Stream, Task, batch_ids
from com_lightning.core.tensors.matmul import exact_products
from com_lightning.core.tensors.modules import copy_module
from com_lightning.core.tensors.placement import is_trackable
from com_lightning.core.tensors.tracked import Part, Tracked, WriteCount, untracked

Extent = tuple[str, tuple[int, int]]
"""Name of a parameter or buffer, and the first and the last position of a part of it when flattened."""


class Visitor(ABC):
    """Does the work of a sweep at each layer."""

    watches_outputs: bool = False
    """Whether the sweep calls :meth:`on_output`."""
    activity: str = "merging layers"
    """What it does, for the progress bar."""

    def on_forward(self, forward: CalibrationForward) -> None:
        """Called with each forward before it runs. It has its own copy of the module. Its ``call`` may be replaced."""

    @abstractmethod
    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        """Called when all forwards that reach a layer wait at it. All processes call this for the same layer.

        Args:
            sweep: the sweep.
            name: name of the layer, see :meth:`Sweep.layer`.
            calls: the calls of the layer at which forwards of this process are paused; perhaps none.

        Returns:
            A record of the layer. If it has a note, the layer counts as not solved.
        """

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> Any:
        """Called when a forward leaves the layer that it waited at. If a value is returned, it replaces the output."""

    def shared_value(self) -> Any:
        """Called when all forwards of this process have left the layer. All processes get the returned value."""

    def on_left(self, record: LayerRecord | None, values: Sequence[Any]) -> None:
        """Called when all forwards of all processes have left the layer.

        Args:
            record: the record of the layer, which may still be changed. ``None`` if the layer was not solved.
            values: the :meth:`shared_value` of each process.
        """


class Sweep:
    """One pass over all layers.

    Args:
        tasks: the experts and their calibration data.
        models: the models of these tasks, with the streams that run.
        visitor: does the work at each layer.
        context: how the sweep is carried out.
        batches: the batches that run. ``None``: all.
        pager: keeps the memory of paused forwards within a budget.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        models: Models,
        visitor: Visitor,
        context: Context | None = None,
        batches: Collection[BatchId] | None = None,
        pager: Pager | None = None,
    ) -> None:
        self.tasks, self.models, self.visitor, self.context = tasks, models, visitor, context or Context()
        self.batches = list(batch_ids(tasks)) if batches is None else batches
        self.pager = pager
        self.bad_batches = BadBatches(tasks, self.context)
        self.function_calls = FunctionCalls(models)
        self._writes = {name: WriteCount() for name in models.merged}
        self._calls: list[tuple[Counter[str], set[str]]] = []
        """For each forward, how often it has called each layer, and at which layers it has paused."""
        self._record: LayerRecord | None = None
        """Record of the layer that forwards are leaving."""

    def run(self) -> list[LayerRecord]:
        """Visit all layers.

        Returns:
            Records of the layers that were reached, in order, then of the parameters that could not be solved.
        """
        solved: dict[str, LayerRecord] = {}
        positions: dict[str, Position] = {
            name: (self.models.positions.get(name, 0),) for name in self.models.candidates
        }
        layers = lockstep(self._forwards(), positions, choose_next=self._choose_next, pager=self.pager)
        # Changed inputs are noticed by their version counters, which do not exist in inference mode.
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            without_fast_path(),
            self.pager or nullcontext(),
            self.context.progress(self.visitor.activity, self._steps()) as advance,
        ):
            for name, calls in layers:
                record = self._visit(name, self.bad_batches.good(calls))
                if record.note:  # function calls within the layer may still be solved
                    self.function_calls.notes[name] = record
                else:
                    solved[name] = record
                    self._record = record
                advance(name)
        self._count_calls(solved)
        for notes in self.context.peers.exchange(self.function_calls.notes):
            self.function_calls.notes = {**notes, **self.function_calls.notes}
        unsolved = [record for record in self.function_calls.notes.values() if not self._is_solved(record.name)]
        for record in unsolved:
            self.context.on_layer(record)
        return [*solved.values(), *unsolved]

    def layer(self, name: str) -> Layer:
        """The layer of that name. Some forwards of this process must wait at it."""
        return self.models.layer(name, self.function_calls.layers.get(name))

    def layer_type(self, name: str) -> LayerType:
        """The type of a layer."""
        return (self.function_calls.layers.get(name) or self.models.candidates[name]).layer_type

    def refusal(self, layer: Layer, calls: Sequence[PausedCall]) -> str | None:
        """The reason why a layer cannot be solved, or ``None`` if it can."""
        if used_before := [part.name for part in layer.parts.values() if not self.function_calls.is_unsolved(part)]:
            return f"{used_before[0]} was used before"
        if not all(isinstance(call.input, Tensor) for call in calls):
            return "it is called without a tensor"
        return layer.layer_type.refuses(layer.merged, calls[0].args, calls[0].kwargs)

    def extents(self, layer: Layer) -> list[Extent]:
        """The extents of all parameters and buffers of a layer that are written."""
        return [(part.name, part.extent(self.models.merged[part.name])) for part in layer.parts.values()]

    def mark_solved(self, extents: Sequence[Extent]) -> None:
        """Mark elements as solved. Later layers that use them are not solved."""
        for name, extent in extents:
            self.function_calls.solved.setdefault(self.models.tied[name], []).append(extent)

    def mark_written(self, name: str) -> None:
        """Let the forwards compute with the new values of a merged tensor that has been written to."""
        self.models.refresh(name)
        self._writes[name].count += 1

    def _steps(self) -> int:
        """Number of layers, and of parameters outside of them: functions may use these as layers."""
        models = self.models
        written = {n for name, layer in models.candidates.items() for n in layer.written(name).values()}
        inside = {models.tied[name] for name in written if name in models.tied}
        outside = {models.tied[name] for name in models.order if name in models.merged and name not in models.buffers}
        return len(models.candidates) + len(outside - inside)

    def _visit(self, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        self.models.moved.clear()  # all forwards have left the layer that these weights belong to
        # Under autocast, statistics would be gathered in half precision.
        with torch.autocast(self.models.device.type, enabled=False), exact_products():
            return self.visitor.on_layer(self, name, calls)

    def _choose_next(self, own_layer: WaitingLayer | None) -> WaitingLayer | None:
        """Choose the first layer that forwards of any process wait at. All forwards have left the last one by now."""
        everyone = self.context.peers.exchange((own_layer, self.function_calls.newly_used, self.visitor.shared_value()))
        for _, newly_used, _ in everyone:
            self.function_calls.used |= newly_used
        self.function_calls.newly_used = set()
        self.visitor.on_left(self._record, [value for _, _, value in everyone])
        if self._record is not None:
            self.context.on_layer(self._record)
            self._record = None
        return min((layer for layer, _, _ in everyone if layer), default=None)

    def _count_calls(self, records: Mapping[str, LayerRecord]) -> None:
        """Record how often layers were called, and how many forwards of all processes came too late."""
        calls, late = Counter[str](), Counter[str]()
        for counts, paused_at in self._calls:
            calls |= counts  # the larger of both
            late.update(name for name in counts if name not in paused_at)
        everyone = self.context.peers.exchange((calls, late))
        for name, record in records.items():
            record.calls = max(1, *(their_calls[name] for their_calls, _ in everyone))
            record.late = sum(their_late[name] for _, their_late in everyone)

    def _forwards(self) -> list[Forward]:
        tracked: dict[tuple[int, Stream], dict[int, Tensor]] = {}
        forwards: list[Forward] = []
        for batch in self.batches:
            task = self.tasks[batch.task]
            # With each batch, both models run one after the other, so that one output at a time waits for its pair.
            for stream in self.models.streams:
                model = batch.task, stream
                if model not in tracked:
                    tracked[model] = self._tracked(batch.task, stream)
                module = copy_module(self.models.prepared(*model), tracked[model])
                call = _Call(task, module, task.batches[batch.position], batch.number)
                forward = CalibrationForward(
                    module=module,
                    call=partial(self.bad_batches.run, batch, call),
                    label=f"task '{task.name}', batch {batch.number}, {stream} model",
                    seed=SEEDS_OF_TASK * batch.task + batch.number,
                    id=ForwardId(batch, stream),
                )
                if self.visitor.watches_outputs or self.bad_batches.is_skipping:
                    forward.on_output = partial(self._on_output, forward)
                self.visitor.on_forward(forward)
                forwards.append(forward)
                self._calls.append((forward.calls, forward.paused_at))
        return forwards

    def _on_output(self, forward: CalibrationForward, layer: str, output: Any) -> Any:
        self.bad_batches.check(forward.id.batch)
        return self.visitor.on_output(forward, layer, untracked(output)) if self.visitor.watches_outputs else None

    def _tracked(self, task: int, stream: Stream) -> dict[int, Tensor]:
        """``id`` of a tensor of a running model -> the tracked tensor that replaces it in a forward."""
        models, tensors = self.models, dict[int, Tensor]()
        model = models.running[task, stream]
        for name, tensor in model.tensors.items():
            is_first = name in models.merged and name not in models.buffers and models.tied[name] == name
            if is_first and is_trackable(name, tensor):
                writes = self._writes[models.merged_name(name, task)] if stream == "merged" else WriteCount()
                tensors[id(tensor)] = Tracked.of(
                    tensor, Part(name), self.function_calls.on_use, writes, target=model.targets.get(name)
                )
        return tensors

    def _is_solved(self, name: str) -> bool:
        """Whether all parameters of a layer, or the parameter of that name, were solved after all."""
        candidate = self.models.candidates.get(name)
        names = [name] if candidate is None else candidate.written(name).values()
        return all(self.models.tied.get(parameter_name) in self.function_calls.solved for parameter_name in names)


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep ``nn.TransformerEncoderLayer`` from running as one fused function, in which a forward cannot pause."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@dataclass
class _Call:
    """Runs a calibration forward. It refers to its own batch only, so that other batches can be freed."""

    task: Task
    module: nn.Module
    batch: Any
    index: int

    def __call__(self) -> None:
        self.task.call(self.module, self.batch, self.index)
