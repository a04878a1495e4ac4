"""The chain itself: layer by layer in lockstep, gather, solve, write the merged weight, go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from com_lightning.core.attention import split_attention
from com_lightning.core.bad_batches import BadBatches
from com_lightning.core.candidates import Candidate, candidates
from com_lightning.core.functions import Use, recognise
from com_lightning.core.gathering import CalibrationForward, Inputs, Layer, add_up, check_solution
from com_lightning.core.lockstep import Arrival, Candidacy, Forward, Place, lockstep, pause, running
from com_lightning.core.paging import Pager
from com_lightning.core.placement import Placement, Running, is_watchable
from com_lightning.core.residual import OutputError
from com_lightning.core.rule import LayerRecord, Rule, Stream, Task
from com_lightning.core.run import Run, Solved
from com_lightning.core.sharing import copy_module, named_tensors, tied_names
from com_lightning.core.solver import factorize, residual, solve_or_average
from com_lightning.core.statistics import exact_products
from com_lightning.core.watch import Part, Watched, Writes, brought, name_of, plain, tensors_in, watched_in


def merge_layers(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    importance: Sequence[float],
    rule: Rule,
    run: Run | None = None,
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

    Returns:
        The layers that were reached, in the order of merging, and then what was used but has no closed form. A tied
        weight is merged at the first layer that uses it; a layer that is called several times in one forward is merged
        from its first call.
    """
    chain = _Chain(tasks, merged, importance, rule, run or Run())
    try:
        return chain.run()
    except BaseException as error:
        chain.peers.fail(error)
        raise


class _Chain:
    def __init__(
        self,
        tasks: Sequence[Task],
        merged: Mapping[str, Tensor],
        importance: Sequence[float],
        rule: Rule,
        run: Run,
    ) -> None:
        self.peers, self.journal, self.on_layer, self.owner = run.peers, run.journal, run.on_layer, 0
        self.tasks, self.importance, self.rule = tasks, importance, rule
        self.bad = BadBatches(tasks, run)
        self.candidates: dict[str, Candidate] = {}
        self.merged = dict(merged)
        self.whole: dict[str, str] = {}
        self.experts: list[nn.Module] = []
        """The experts as they are stored, with attention taken apart."""
        for task in tasks:
            self.candidates.update(candidates(task.expert, merged))
            expert = copy_module(task.expert)
            for name, (whole, rows) in split_attention(expert).items():
                if whole in merged:  # a view, so that what is written here is written there
                    self.merged.setdefault(name, nn.Parameter(merged[whole].detach()[rows], requires_grad=False))
                    self.whole[name] = whole
            self.experts.append(expert)
        self.tensors = [{n: t for n, t, _ in named_tensors(expert) if n in self.merged} for expert in self.experts]
        shared = {id(tensor): self.merged[name] for name, tensor in self.tensors[0].items()}
        self.reference = copy_module(self.experts[0], shared)
        placements = [Placement(task.expert, task.move) for task in tasks]
        converted: dict[int, Tensor] = {}
        self.running = {
            (number, stream): Running.of(placement, stream, merged, tasks[number].stays, converted)
            for number, placement in enumerate(placements)
            for stream in rule.streams
        }
        merging = [model for (_, stream), model in self.running.items() if stream == "merged"]
        self.computed = {name: tensor for model in merging for name, tensor in model.tensors.items()}
        """What merged models compute with: the merged tensors, or copies on another device, in another precision."""
        self.device = placements[0].target(next(iter(merged)))[0] if merged else torch.device("cpu")
        self.pager = None if run.memory_budget is None else Pager(run.memory_budget, self.device)
        self.tied = tied_names(self.reference)
        self.places: dict[str, int] = {}
        """Place of each module among all; of one that has others within it, after the last of them."""
        for number, (name, _) in enumerate(self.reference.named_modules()):
            while True:
                self.places[name] = number
                if not name:
                    break
                name = name.rpartition(".")[0]
        self.buffers = {name for name, _, is_parameter in named_tensors(self.reference) if not is_parameter}
        self.writes = {name: Writes() for name in self.merged}
        self.order = {name: number for number, name in enumerate(self.tied)}
        self.uses: dict[str, Use] = {}
        self.used: set[str] = set()
        """First name of each parameter that went into a function that is no layer: too late for one that is."""
        self.entered: set[str] = set()
        """Those of them that have come to be used since the processes last met."""
        self.solved: dict[str, list[tuple[int, int]]] = {}
        """First name of a parameter -> extents of the parts of it that are solved."""
        self.notes: dict[str, LayerRecord] = {}
        self.inputs: Inputs | None = None
        self.gathered = False
        """Whether the statistics of these inputs are known."""
        self.outputs = OutputError()

    def run(self) -> list[LayerRecord]:
        records: list[LayerRecord] = []
        last: LayerRecord | None = None
        places: dict[str, Place] = {name: (self.places.get(name, 0),) for name in self.candidates}
        together = lockstep if self.pager is None else partial(lockstep, pager=self.pager)
        # Version counters, by which a changed input is noticed, do not exist in inference mode.
        with torch.inference_mode(False), torch.no_grad(), _without_fast_path(), self.pager or nullcontext():
            for layer, arrivals in together(self._forwards(), places, elect=self._elect):
                self._finish(last)
                record = self._merge(layer, arrivals)
                last = None if record.note else record
                if last is None:  # what it consists of may still be solved within it
                    self.notes[layer] = record
                else:
                    records.append(record)
            self._finish(last)
        for notes in self.peers.exchange(self.notes):
            self.notes = {**notes, **self.notes}
        unsolved = [record for record in self.notes.values() if not self._is_solved(record.name)]
        for record in unsolved:
            self.on_layer(record)
        return records + unsolved

    def _forwards(self) -> list[Forward]:
        forwards: list[Forward] = []
        for number, task in enumerate(self.tasks):
            for stream in self.rule.streams:
                running, tensors = self.running[number, stream].module, self._watched(number, stream)
                for batch, content in enumerate(task.batches):
                    index = batch if task.numbers is None else task.numbers[batch]
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
        model, tensors = self.running[task, stream], dict[int, Tensor]()
        for name, tensor in model.tensors.items():
            first = name in self.merged and name not in self.buffers and self.tied[name] == name
            if first and is_watchable(name, tensor):
                writes = self.writes[name] if stream == "merged" else Writes()
                tensors[id(tensor)] = Watched.of(
                    tensor, Part(name), self._using, writes, target=model.targets.get(name)
                )
        return tensors

    def _on_output(self, task: int, batch: int, stream: Stream) -> Callable[[str, Any], None] | None:
        two_sided = len(self.rule.streams) == 2
        if not (two_sided or self.bad.skip):
            return None

        def receive(layer: str, output: Any) -> None:
            self.bad.check(task, batch)
            if not two_sided:
                return
            keep = self.tasks[task].keep(self.tasks[task].batches[batch])
            self.outputs.add((task, batch), plain(output), keep, stream == "expert")

        return receive

    def _elect(self, mine: Candidacy | None) -> Candidacy | None:
        """Which layer is next among those that any process waits at. All forwards have left the last one by now."""
        met = self.peers.exchange((mine, self.entered, self.outputs.sums()))
        for _, entered, _ in met:
            self.used |= entered
        self.entered = set()
        self.outputs = OutputError.total([sums for _, _, sums in met])
        return min((candidacy for candidacy, _, _ in met if candidacy), default=None)

    def _finish(self, record: LayerRecord | None) -> None:
        """Report a layer that all forwards have left by now."""
        if record is not None:
            if self.outputs.energy is not None:
                record.residual = self.outputs.relative()
            self.on_layer(record)
        self.outputs = OutputError()

    def _using(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[Any], None] | None:
        """A watched parameter is about to enter a function: pause there if it is a layer that is not solved yet.

        Returns what to call with the function's result.
        """
        forward = running()
        if not isinstance(forward, CalibrationForward):
            return None
        watched = list(watched_in(args, kwargs))
        if forward.stream == "merged":
            for entry in watched:
                entry.refresh(self.computed[entry.part.name])
        if not any(self._is_free(entry.part) for entry in watched):
            return None
        if use := recognise(function, args, kwargs, self._is_free) if self._is_intact(forward, watched) else None:
            label, place = self._placed(use)
            self.uses.setdefault(label, replace(use, args=()))
            if pause(label, place, tuple(map(brought, use.args)), {}):
                for entry in watched if forward.stream == "merged" else ():
                    entry.refresh(self.computed[entry.part.name])
                return lambda result: forward.on_output(label, result) if forward.on_output else None

        def leaving(result: Any) -> None:
            if function is Tensor.__setitem__ or any(True for _ in tensors_in(result)):
                for part in [entry.part for entry in watched if self._is_free(entry.part)]:
                    first = self.tied[part.name]
                    self.used.add(first)
                    self.entered.add(first)
                    note = f"goes into {name_of(function).strip('_')}, where it has no closed form"
                    self.notes.setdefault(first, LayerRecord(first, "parameter", note=note))

        return None if use is not None else leaving

    def _is_free(self, part: Part) -> bool:
        """Whether a function of a part of a parameter may be solved: no forward has computed with it yet."""
        return self.tied[part.name] not in self.used and self._is_unsolved(part)

    def _is_unsolved(self, part: Part) -> bool:
        solved = self.solved.get(self.tied[part.name])
        if not solved:
            return True
        whole = self.merged[part.name]
        if solved[0] == (0, whole.numel() - 1):
            return False
        start, end = part.extent(whole)
        return all(end < a or b < start for a, b in solved)

    def _is_intact(self, forward: CalibrationForward, watched: Sequence[Watched]) -> bool:
        """Whether the tensors hold what they were picked from; a forward may have written into a copy."""
        own = self.running[forward.task, forward.stream].tensors
        entries = [entry for entry in watched if entry.part.steps]
        return all(torch.equal(plain(entry), entry.part.of(own[entry.part.name], casts=True)) for entry in entries)

    def _placed(self, use: Use) -> tuple[str, Place]:
        """Name of a function call by the parameter that it uses, and its place among all layers."""
        part = next(iter(use.parts.values()))
        name, whole = part.name, self.merged[part.name]
        start, end = part.extent(whole)
        row = max(whole[0].numel(), 1) if whole.dim() else 1
        place = (self.places.get(name.rpartition(".")[0], 0), start // row, self.order[name])
        if end - start + 1 == whole.numel():
            return name, place
        if start % row or (end + 1) % row:
            return f"{name}[{start}:{end + 1} of the elements]", place
        first, last = start // row, (end + 1) // row
        return f"{name}[{first}]" if last - first == 1 else f"{name}[{first}:{last}]", place

    def _layer(self, name: str) -> Layer:
        if name not in self.uses:
            candidate = self.candidates[name]
            parts = {own: Part(full) for own, full in candidate.written(name).items()}
            merged, *experts = [self._here(model.get_submodule(name)) for model in (self.reference, *self.experts)]
            return Layer(name, candidate.kind, merged, experts, parts)
        use = self.uses[name]
        everyone = [self.merged, *self.tensors]
        chosen = [{own: p.of(t[p.name]).to(self.device) for own, p in use.parts.items()} for t in everyone]
        merged, *experts = [use.module(values) for values in chosen]
        return Layer(name, use.kind, merged, experts, dict(use.parts))

    def _here(self, layer: nn.Module) -> nn.Module:
        """A layer on the device where statistics are gathered."""
        away = [tensor for _, tensor, _ in named_tensors(layer) if tensor.device != self.device]
        return copy_module(layer, {id(t): _like(t, t.to(self.device)) for t in away}) if away else layer

    def _merge(self, name: str, arrivals: Sequence[Arrival]) -> LayerRecord:
        start = time.perf_counter()
        arrivals = self.bad.good(arrivals)
        layer = self._layer(name) if arrivals else None  # a function call is known only where a forward makes it
        known = self.journal.get(name)
        # Under autocast the statistics would be gathered in half precision.
        with torch.autocast(self.device.type, enabled=False), exact_products():
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
                first = self.inputs.layer if self.inputs and repeated else name
                self.inputs = (
                    Inputs.gathered(layer, arrivals, self.tasks, self.rule, first, self.pager) if layer else None
                )
                skipped = self.bad.leave_out(self.inputs.bad if self.inputs else [], name)
                reached = [rank for rank, (arrived, _, _, _) in enumerate(verdicts) if arrived]
                self.owner, self.gathered = reached[len(self.solved) % len(reached)], True  # solves go round
                add_up(self.inputs, len(self.tasks), self.peers, self.owner, self.device)
            mine = None
            if known:
                mine = (*self._restore(known), known.skipped)
            elif layer and self.inputs and self.owner == self.peers.rank:
                mine = (*self._solve(layer, self.inputs), [])
            record, written, before = self.peers.exchange(mine)[self.owner] or (LayerRecord(name, ""), [], [])
            self.bad.recall(before)
        for own, extent in written:
            self.solved.setdefault(self.tied[own], []).append(extent)
        for own in dict.fromkeys(own for own, _ in written):
            with _unsafe_preserve_version_counter(self.merged[own]):
                self.peers.broadcast(self.merged[own], self.owner)
            computed = self.computed.get(own, self.merged[own])
            if computed.data_ptr() != self.merged[own].data_ptr():
                with _unsafe_preserve_version_counter(computed):
                    computed.copy_(self.merged[own])
            self.writes[own].count += 1
        if not owners:
            record.seconds = time.perf_counter() - start
            values = [self.merged[own].detach().flatten()[first : last + 1] for own, (first, last) in written]
            self.journal.add(name, Solved(record, written, values, skipped))
        return record

    def _restore(self, known: Solved) -> tuple[LayerRecord, list[tuple[str, tuple[int, int]]]]:
        """Write what was solved in an earlier run."""
        for (own, (first, last)), values in zip(known.written, known.values):
            whole = self.merged[own]
            with _unsafe_preserve_version_counter(whole):
                flat = whole.detach().flatten()
                flat[first : last + 1] = values.to(flat.device)
                whole.copy_(flat.view(whole.shape))
        return known.record, known.written

    def _refusal(self, layer: Layer, arrivals: Sequence[Arrival]) -> str | None:
        """Why a layer cannot be merged."""
        if late := [part.name for part in layer.parts.values() if not self._is_unsolved(part)]:
            return f"{late[0]} was used before"
        if not all(isinstance(arrival.input, Tensor) for arrival in arrivals):
            return "it is called without a tensor"
        return layer.kind.refuses(layer.merged, arrivals[0].args, arrivals[0].kwargs)

    def _solve(self, layer: Layer, inputs: Inputs) -> tuple[LayerRecord, list[tuple[str, tuple[int, int]]]]:
        """Solve a layer and write the merged weights; name and extent of each part that is merged now."""
        start = time.perf_counter()
        kind, module, weights = layer.kind, layer.merged, layer.weights
        for entry in inputs.statistics:
            if entry.gram is None:  # no forward of this task got here
                entry.gram = weights[0].new_zeros(weights[0].shape[0], weights[0].shape[2], weights[0].shape[2])
        grams = [s.mean_gram() for s in inputs.statistics]
        if inputs.factor is None:
            inputs.factor = factorize(grams, self.importance, self.rule.ridge)
        drifts = [s.mean_drift(w) for s, w in zip(inputs.statistics, weights)]
        solution, kept = solve_or_average(inputs.factor, grams, drifts, weights, self.importance)
        shifted = inputs.statistics if self.rule.inputs == "merged" else None
        values = kind.finish(module, solution, layer.experts, shifted, self.importance)
        record = LayerRecord(layer.name, kind.name)
        if isinstance(values, str):
            record.note = values
            return record, []
        check_solution(layer, values, self.merged)
        written = []
        for own, part in layer.parts.items():
            whole = self.merged[part.name]
            size = part.of(whole).numel()
            if own in values:  # or else what is there is as good
                # A forward may be about to differentiate through what was computed with other parts of it.
                with _unsafe_preserve_version_counter(whole):
                    part.write(whole, values[own])
            written.append((part.name, part.extent(whole)))
            name = self.whole.get(part.name, part.name)
            if part.name in self.buffers:
                record.buffers.append(name)
            else:
                record.parameters[name] = record.parameters.get(name, 0) + size
        reached = torch.stack([gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in grams]).sum(0)
        record.groups, record.idle = len(reached), int((reached == 0).sum())
        record.kept = kept
        record.condition, record.jitter = inputs.factor.condition, inputs.factor.jitter
        record.shared_with = inputs.layer if inputs.layer != layer.name else None
        record.unpaired = inputs.unpaired
        record.masked = [task.name for task in self.tasks if task.name in inputs.masked]
        for task, statistics in zip(self.tasks, inputs.statistics):
            record.rows[task.name] = statistics.rows
            if statistics.shift.rows:
                record.distance[task.name] = statistics.shift.relative_distance
                record.cosine[task.name] = statistics.shift.mean_cosine
        if len(self.rule.streams) < 2:
            record.residual = residual(grams, weights, solution, self.importance)
        record.solving = time.perf_counter() - start
        return record, written

    def _is_solved(self, name: str) -> bool:
        """Whether the parameters of a layer, or the one of that name, were solved after all."""
        candidate = self.candidates.get(name)
        names = [name] if candidate is None else candidate.written(name).values()
        return all(self.tied.get(own) in self.solved for own in names)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value


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
