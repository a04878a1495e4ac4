"""The chain itself: layer by layer in lockstep, gather, solve, write the merged weight, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.chain.fit import Fit, fit
from com_lightning.core.chain.gather import CalibrationForward, Inputs, Layer, check_solution, where
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.output_error import OutputError
from com_lightning.core.chain.reduce import add_up
from com_lightning.core.chain.residual_stream import Corrections, Source
from com_lightning.core.solve.statistics import InputStatistics
from com_lightning.core.sweep.bad_batches import BadBatches
from com_lightning.core.sweep.context import Run, Solved
from com_lightning.core.sweep.function_calls import Uses
from com_lightning.core.sweep.lockstep import Arrival, Candidacy, Forward, Place, lockstep
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.task import LayerRecord, Stream, Task
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.allocator import kept_memory
from com_lightning.core.tensors.matmul import exact_products
from com_lightning.core.tensors.modules import copy_module
from com_lightning.core.tensors.placement import is_watchable
from com_lightning.core.tensors.tracked import Part, Watched, Writes, plain


def merge_layers(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    importance: Sequence[float],
    rule: ChainOptions,
    run: Run | None = None,
    base: Mapping[str, Tensor] | None = None,
    own: Mapping[str, Sequence[Tensor]] | None = None,
    fixed: Mapping[str, Tensor] | None = None,
) -> list[LayerRecord]:
    """Merge every layer that has a closed form, in execution order, in one pass over the data.

    Args:
        tasks: the experts and their calibration data.
        merged: full name of each shared parameter or buffer -> the tensor that holds its merged value. On entry it
            holds the average of the experts; solved parameters are written in place, the others are left as they are.
        importance: one weight per task, summing to one.
        rule: what is solved.
        run: how it is carried out. If there are other processes, all must be given the same experts. Statistics are
            added up, each layer is solved by one process, and all end with the same merged weights and records.
        base: the same names -> value in the model that the experts were fine-tuned from; needed where the rule's anchor
            is the base.
        own: name of what each task keeps for itself -> one tensor for each, written in place, see
            :func:`~com_lightning.core.solve.task_biases.own_tensors`.
        fixed: full name of what else the merged model has in place of what the experts have, and is not merged here ->
            tensor.

    Returns:
        The layers that were reached, in the order of merging, and then what was used but has no closed form. A tied
        weight is merged at the first layer that uses it; a layer that is called several times in one forward is merged
        from its first call.
    """
    from com_lightning.core.chain.find_residuals import find_writers  # these run chains too
    from com_lightning.core.chain.sensitivity import roots

    run = run or Run()
    with run.peers.told(), kept_memory():
        corrected = rule.residual and rule.streams == ("merged", "expert")
        writers = find_writers(tasks, merged, run) if corrected else {}
        chain = _Chain(tasks, merged, importance, rule, run, base, own, writers, fixed)
        if rule.sensitivity:
            chain.roots = roots(tasks, merged, rule.sensitivity, run.peers, run.quiet)
        return chain.run()


class _Chain:
    def __init__(
        self,
        tasks: Sequence[Task],
        merged: Mapping[str, Tensor],
        importance: Sequence[float],
        rule: ChainOptions,
        run: Run,
        base: Mapping[str, Tensor] | None = None,
        own: Mapping[str, Sequence[Tensor]] | None = None,
        writers: Mapping[str, Sequence[Source]] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.roots: Mapping[str, Sequence[Tensor | None]] = {}
        """Of the matrices by which errors in a layer's outputs count, for each task."""
        self.peers, self.journal, self.on_layer, self.owner = run.peers, run.journal, run.on_layer, 0
        self.tasks, self.importance, self.rule = tasks, importance, rule
        self.bad = BadBatches(tasks, run)
        self.models = Models(tasks, merged, rule.streams, base if rule.anchor == "base" else None, own, fixed)
        self.uses = Uses(self.models)
        self.pager = None if run.memory_budget is None else Pager(run.memory_budget, self.models.device)
        self.writes = {name: Writes() for name in self.models.merged}
        self.inputs: Inputs | None = None
        self.gathered = False
        """Whether the statistics of these inputs are known."""
        self.outputs = OutputError()
        self.corrections = Corrections(writers or {})

    def run(self) -> list[LayerRecord]:
        records: list[LayerRecord] = []
        last: LayerRecord | None = None
        places: dict[str, Place] = {name: (self.models.places.get(name, 0),) for name in self.models.candidates}
        together = lockstep if self.pager is None else partial(lockstep, pager=self.pager)
        # Version counters, by which a changed input is noticed, do not exist in inference mode.
        with torch.inference_mode(False), torch.no_grad(), _without_fast_path(), self.pager or nullcontext():
            for layer, arrivals in together(self._forwards(), places, elect=self._elect):
                self._finish(last)
                record = self._merge(layer, arrivals)
                last = None if record.note else record
                if last is None:  # what it consists of may still be solved within it
                    self.uses.notes[layer] = record
                else:
                    records.append(record)
            self._finish(last)
        for notes in self.peers.exchange(self.uses.notes):
            self.uses.notes = {**notes, **self.uses.notes}
        unsolved = [record for record in self.uses.notes.values() if not self._is_solved(record.name)]
        for record in unsolved:
            self.on_layer(record)
        return records + unsolved

    def _forwards(self) -> list[Forward]:
        forwards: list[Forward] = []
        for number, task in enumerate(self.tasks):
            models = [
                (stream, self.models.running[number, stream].module, self._watched(number, stream))
                for stream in self.rule.streams
            ]
            for batch, content in enumerate(task.batches):
                index = task.batch_numbers[batch]
                # Both models leave a layer with one batch before the next: one output at a time waits to be compared.
                for stream, running, tensors in models:
                    module = copy_module(running, tensors)
                    forwards.append(
                        CalibrationForward(
                            module=module,
                            call=partial(self.bad.ending, number, batch, _Call(task, module, content, index)),
                            label=f"task '{task.name}', batch {index}, {stream} model",
                            seed=100_003 * number + index,
                            on_output=self._on_output(number, batch, stream),
                            task=number,
                            batch=batch,
                            stream=stream,
                        )
                    )
        return forwards

    def _watched(self, task: int, stream: Stream) -> dict[int, Tensor]:
        """``id`` of a tensor of a model that runs -> what takes its place in a forward."""
        model, tensors = self.models.running[task, stream], dict[int, Tensor]()
        for name, tensor in model.tensors.items():
            first = name in self.models.merged and name not in self.models.buffers and self.models.tied[name] == name
            if first and name not in self.models.own and is_watchable(name, tensor):
                writes = self.writes[name] if stream == "merged" else Writes()
                tensors[id(tensor)] = Watched.of(
                    tensor, Part(name), self.uses.watch, writes, target=model.targets.get(name)
                )
        return tensors

    def _on_output(self, task: int, batch: int, stream: Stream) -> Callable[[str, Any], Any] | None:
        two_sided = len(self.rule.streams) == 2
        if not (two_sided or self.bad.skip):
            return None

        def receive(layer: str, output: Any) -> None:
            self.bad.check(task, batch)
            if not two_sided:
                return
            keep = self.tasks[task].keep(self.tasks[task].batches[batch])
            output = self.corrections.leave(layer, (task, batch, stream), plain(output))
            self.outputs.add((task, batch), output, keep, stream == "expert")

        return receive

    def _elect(self, mine: Candidacy | None) -> Candidacy | None:
        """Which layer is next among those that any process waits at. All forwards have left the last one by now."""
        met = self.peers.exchange((mine, self.uses.entered, self.outputs.sums()))
        for _, entered, _ in met:
            self.uses.used |= entered
        self.uses.entered = set()
        self.outputs = OutputError.total([sums for _, _, sums in met])
        return min((candidacy for candidacy, _, _ in met if candidacy), default=None)

    def _finish(self, record: LayerRecord | None) -> None:
        """Report a layer that all forwards have left by now."""
        if record is not None:
            if self.outputs.energy is not None:
                record.residual = self.outputs.relative()
            self.on_layer(record)
        self.outputs = OutputError()

    def _merge(self, name: str, arrivals: Sequence[Arrival]) -> LayerRecord:
        start = time.perf_counter()
        arrivals = self.bad.good(arrivals)
        # A function call is known only where a forward makes it.
        layer = self.models.layer(name, self.uses.layers.get(name)) if arrivals else None
        self.corrections.enter(name, {where(arrival): arrival.input for arrival in arrivals})
        if layer:
            layer.corrected = name in self.corrections.writers
        known = self.journal.get(name)
        # Under autocast the statistics would be gathered in half precision.
        with torch.autocast(self.models.device.type, enabled=False), exact_products():
            note = self._refusal(layer, arrivals) if layer else None
            same = layer is None or bool(not note and self.inputs and self.inputs.repeated_at(layer, arrivals))
            verdicts = self.peers.exchange((layer is not None, note, same, known is not None))
            for _, told, _, _ in verdicts:
                if told:
                    return LayerRecord(name, layer.kind.name if layer else "", note=told)
            if not any(arrived for arrived, _, _, _ in verdicts):
                return LayerRecord(name, "", note="only batches that are skipped get there")
            repeated = all(same for _, _, same, _ in verdicts)
            owners = [rank for rank, (_, _, _, knows) in enumerate(verdicts) if knows]
            skipped = []
            if owners:  # solved in an earlier run
                self.owner = owners[0]
                if not repeated:
                    self.inputs, self.gathered = Inputs.at(layer, arrivals) if layer else None, False
            elif not (repeated and self.gathered):
                first, exact = (self.inputs.layer, self.inputs.exact) if self.inputs and repeated else (name, False)
                self.inputs = None  # the statistics of two layers need not fit into memory
                if layer:
                    self.inputs = Inputs.gathered(
                        layer, arrivals, self.tasks, self.rule, first, self.pager, exact, self.corrections
                    )
                skipped = self.bad.leave_out(self.inputs.bad if self.inputs else [], name)
                reached = [rank for rank, (arrived, _, _, _) in enumerate(verdicts) if arrived]
                self.owner, self.gathered = reached[len(self.uses.solved) % len(reached)], True  # solves go round
                add_up(self.inputs, self.peers, self.owner, self.models.device)
            mine = None
            if known:
                mine = (*self._restore(known), known.skipped)
            elif layer and self.inputs and self.owner == self.peers.rank:
                mine = (*self._solve(layer, self.inputs), [])
            record, written, before = self.peers.exchange(mine)[self.owner] or (LayerRecord(name, ""), [], [])
            lost = self.bad.recall(before)
            if self.inputs:
                self.inputs.lose(lost)
        for own, extent in written:
            self.uses.solved.setdefault(self.models.tied[own], []).append(extent)
        for own in dict.fromkeys(own for own, _ in written):
            with private_torch.unversioned_write(self.models.merged[own]):
                self.peers.broadcast(self.models.merged[own], self.owner)
            self.models.refresh(own)
            self.writes[own].count += 1
        if not owners:
            record.seconds = time.perf_counter() - start
            values = [self.models.merged[own].detach().flatten()[first : last + 1] for own, (first, last) in written]
            self.journal.add(name, Solved(record, written, values, skipped))
        return record

    def _restore(self, known: Solved) -> tuple[LayerRecord, list[tuple[str, tuple[int, int]]]]:
        """Write what was solved in an earlier run."""
        for (own, (first, last)), values in zip(known.written, known.values):
            whole = self.models.merged[own]
            with private_torch.unversioned_write(whole):
                flat = whole.detach().flatten()
                flat[first : last + 1] = values.to(flat.device)
                whole.copy_(flat.view(whole.shape))
        return known.record, known.written

    def _refusal(self, layer: Layer, arrivals: Sequence[Arrival]) -> str | None:
        """Why a layer cannot be merged."""
        if late := [part.name for part in layer.parts.values() if not self.uses.is_unsolved(part)]:
            return f"{late[0]} was used before"
        if not all(isinstance(arrival.input, Tensor) for arrival in arrivals):
            return "it is called without a tensor"
        return layer.kind.refuses(layer.merged, arrivals[0].args, arrivals[0].kwargs)

    def _solve(self, layer: Layer, inputs: Inputs) -> tuple[LayerRecord, list[tuple[str, tuple[int, int]]]]:
        """Solve a layer and write the merged weights; name and extent of each part that is merged now."""
        start = time.perf_counter()
        apart = any(part.name in self.models.own for part in layer.parts.values())
        found = fit(layer, inputs, self.rule, self.importance, self.roots.get(layer.name, ()), apart)
        shifted = inputs.statistics if self.rule.inputs == "merged" else None
        values = layer.kind.finish(layer.merged, found.solution, layer.experts, shifted, found.importance)
        record = LayerRecord(layer.name, layer.kind.name)
        if isinstance(values, str):
            record.note = values
            return record, []
        check_solution(layer, values, self.models.merged)
        written = self._write_own(layer, found.each, shifted)  # first: how a layer is finished depends on what it was
        for own, part in layer.parts.items():
            whole = self.models.merged[part.name]
            size = part.of(whole).numel()
            if own in values:  # or else what is there is as good
                # A forward may be about to differentiate through what was computed with other parts of it.
                with private_torch.unversioned_write(whole):
                    part.write(whole, values[own])
            written.append((part.name, part.extent(whole)))
            name = self.models.whole.get(part.name, part.name)
            if part.name in self.models.buffers:
                record.buffers.append(name)
            else:
                record.parameters[name] = record.parameters.get(name, 0) + size
        self._describe(record, inputs, found)
        record.solving = time.perf_counter() - start
        return record, written

    def _describe(self, record: LayerRecord, inputs: Inputs, found: Fit) -> None:
        """Take down what was solved from what."""
        record.groups, record.idle = len(found.reached), int((found.reached == 0).sum())
        record.kept, record.steps, record.residual = found.kept, found.steps, found.residual
        record.ridge = found.ridge
        if inputs.factor is not None:
            record.condition, record.jitter = inputs.factor.condition, inputs.factor.jitter
        record.shared_with = inputs.layer if inputs.layer != record.name else None
        record.unpaired, record.uncorrected = inputs.unpaired, inputs.uncorrected
        record.corrected_for = list(map(str, self.corrections.writers.get(record.name, ())))
        record.masked = [task.name for task in self.tasks if task.name in inputs.masked]
        if self.rule.balance:
            record.importance = {task.name: share for task, share in zip(self.tasks, found.importance)}
        for task, entry in zip(self.tasks, inputs.statistics):
            record.rows[task.name] = entry.rows
            if entry.shift.rows:
                record.distance[task.name] = entry.shift.relative_distance
                record.cosine[task.name] = entry.shift.mean_cosine

    def _write_own(
        self, layer: Layer, solutions: Sequence[Tensor], statistics: Sequence[InputStatistics] | None
    ) -> list[tuple[str, tuple[int, int]]]:
        """Write what each task keeps of its own solution for itself."""
        written = []
        for number, solution in enumerate(solutions):
            seen = None if statistics is None else statistics[number : number + 1]
            values = layer.kind.finish(layer.merged, solution, layer.experts[number : number + 1], seen, [1.0])
            assert not isinstance(values, str), "what cannot be written is not merged"
            check_solution(layer, values, self.models.merged)
            for own, part in layer.parts.items():
                if keys := self.models.own.get(part.name):
                    tensor = self.models.merged[keys[number]]
                    with private_torch.unversioned_write(tensor):
                        tensor.copy_(values[own].view(tensor.shape))
                    written.append((keys[number], (0, tensor.numel() - 1)))
        return written

    def _is_solved(self, name: str) -> bool:
        """Whether the parameters of a layer, or the one of that name, were solved after all."""
        candidate = self.models.candidates.get(name)
        names = [name] if candidate is None else candidate.written(name).values()
        return all(self.models.tied.get(own) in self.uses.solved for own in names)


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
    """A calibration forward, without a reference to anything but its own batch."""

    task: Task
    module: nn.Module
    batch: Any
    index: int

    def __call__(self) -> None:
        self.task.call(self.module, self.batch, self.index)
