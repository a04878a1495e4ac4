"""The chain itself: layer by layer in lockstep, gather, solve, write the merged weight, go on."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from com_lightning.core.attention import split_attention
from com_lightning.core.layers import LayerType, kept, layer_type, own_parameters
from com_lightning.core.lockstep import Arrival, Forward, lockstep
from com_lightning.core.sharing import copy_module, named_tensors, tied_names
from com_lightning.core.solver import Factor, factorize, residual, solve
from com_lightning.core.statistics import InputStatistics

Stream = Literal["merged", "expert"]


@dataclass
class Task:
    """One task: its expert, and the calibration data that speak for it.

    Args:
        name: of the task.
        expert: the fine-tuned module, in eval mode.
        batches: calibration batches.
        call: ``call(module, batch, index)`` runs the calibration forward of one batch on a copy of the expert.
        keep: boolean mask over a batch's positions, ``True`` where data is; ``None``: all of it.
    """

    name: str
    expert: nn.Module
    batches: Sequence[Any]
    call: Callable[[nn.Module, Any, int], object] = lambda module, batch, index: module(batch)
    keep: Callable[[Any], Tensor | None] = lambda batch: None


@dataclass(frozen=True)
class Rule:
    """What is solved at each layer.

    Args:
        inputs: where ``x̂`` comes from: the model merged so far (a chain), or the expert, so that every layer is
            merged on its own (RegMean).
        target: ``"expert"`` distils the expert's output on the expert's own input, which also corrects the drift of the
            merged model's inputs (two-sided); ``"merged"`` applies the expert's weight to the merged model's input.
        normalize: count each row by its direction, not its size (cosine normalisation), see
            :class:`~com_lightning.core.statistics.InputStatistics`.
        ridge: pull towards the average, relative to the mean of the diagonal of the Gram matrix.
    """

    inputs: Stream = "merged"
    target: Stream = "expert"
    normalize: bool = True
    ridge: float = 0.01

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The forwards that are needed for each batch."""
        if self.inputs == "expert":
            return ("expert",)
        return ("merged", "expert") if self.target == "expert" else ("merged",)


@dataclass
class LayerRecord:
    """What happened at one layer; sums and ratios are over the calibration rows.

    Attributes:
        name, kind, parameters: the layer, its type, the full names of the parameters that were solved.
        buffers: full names of the buffers that were re-estimated (running statistics).
        distance, cosine: per task, relative distance and mean cosine between the merged model's and the expert's input.
        residual: relative squared error of the layer's output after the merge (against the expert's output on its own
            input if the rule is two-sided, on the merged model's input otherwise).
        condition, jitter: of the factorisation, see :class:`~com_lightning.core.solver.Factor`.
        rows: number of rows per task.
        unpaired: calls whose expert rows could not be matched, and which were merged one-sided.
        shared_with: the earlier layer whose statistics were used, because both have the same input.
        seconds: for gathering and solving.
        note: why it was not solved, if it was not.
    """

    name: str
    kind: str
    parameters: list[str] = field(default_factory=list)
    buffers: list[str] = field(default_factory=list)
    distance: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    residual: float | None = None
    condition: float | None = None
    jitter: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    unpaired: int = 0
    shared_with: str | None = None
    seconds: float = 0.0
    note: str | None = None


class NonFiniteError(ValueError):
    """NaN or infinity in an expert's weights or in the inputs of a layer."""


def merge_layers(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    importance: Sequence[float],
    rule: Rule,
    on_layer: Callable[[LayerRecord], None] = lambda record: None,
) -> list[LayerRecord]:
    """Merge every layer that has a closed form, in execution order, in one pass over the data.

    Args:
        tasks: the experts and their calibration data.
        merged: full name of each shared parameter or buffer -> the tensor that holds its merged value. On entry it
            holds the average of the experts; solved parameters are written in place, the others are left as they are.
        importance: one weight per task, summing to one.
        rule: what is solved.
        on_layer: called with each finished layer.

    Returns:
        The layers that were reached, in the order of merging. A tied weight is merged at the first layer that uses it;
        a layer that is called several times in one forward is merged from its first call.
    """
    return _Chain(tasks, merged, importance, rule, on_layer).run()


@dataclass(frozen=True)
class Candidate:
    """A layer that has a closed form.

    Attributes:
        kind: its type.
        module: the layer, of one expert.
        parameters: own name of each parameter -> its full name in the user's module.
        buffers: the same for the buffers that its type re-estimates.
    """

    kind: LayerType
    module: nn.Module
    parameters: dict[str, str]
    buffers: dict[str, str]

    def written(self, layer: str) -> dict[str, str]:
        """Own name of all that is written -> its name in a module where this is the layer of that name."""
        return {own: f"{layer}.{own}" if layer else own for own in (*self.parameters, *self.buffers)}


def candidates(module: nn.Module, shared: Collection[str]) -> dict[str, Candidate]:
    """Name of each layer of ``module`` that has a closed form and of which all that is written is shared.

    Layers of an ``nn.MultiheadAttention`` are named as :func:`~com_lightning.core.attention.split_attention` does.
    """
    module = copy_module(module)
    parts = split_attention(module)
    found = {}
    for name, layer in module.named_modules():
        kind = layer_type(layer)
        if kind is None or "parametrizations" in name.split("."):  # what is called there has weights for inputs
            continue
        own = {p: f"{name}.{p}" if name else p for p in own_parameters(layer)}
        own = {p: parts[full][0] if full in parts else full for p, full in own.items()}
        buffers = {b: f"{name}.{b}" if name else b for b in kind.buffers(layer)}
        if all(full in shared for full in (*own.values(), *buffers.values())):
            found[name] = Candidate(kind, layer, own, buffers)
    return found


@dataclass(eq=False)
class _CalibrationForward(Forward):
    task: int = 0
    batch: int = 0
    stream: Stream = "merged"


@dataclass
class _Inputs:
    """Statistics of one input tensor per forward, which several layers in a row may share."""

    layer: str
    key: Hashable
    seen: dict[tuple[int, int, Stream], tuple[weakref.ref[Tensor], int]]
    statistics: list[InputStatistics]
    unpaired: int = 0
    factor: Factor | None = None

    def same_inputs(self, seen: Mapping[tuple[int, int, Stream], tuple[weakref.ref[Tensor], int]]) -> bool:
        """Whether every forward arrives with the very tensor it arrived with before, unchanged."""
        return seen.keys() == self.seen.keys() and all(
            self.seen[place][0]() is tensor() and self.seen[place][1] == version
            for place, (tensor, version) in seen.items()
        )


class _Chain:
    def __init__(
        self,
        tasks: Sequence[Task],
        merged: Mapping[str, Tensor],
        importance: Sequence[float],
        rule: Rule,
        on_layer: Callable[[LayerRecord], None],
    ) -> None:
        self.tasks, self.importance, self.rule, self.on_layer = tasks, importance, rule, on_layer
        self.candidates: dict[str, Candidate] = {}
        self.merged = dict(merged)
        self.experts: list[nn.Module] = []
        for task in tasks:
            self.candidates.update(candidates(task.expert, merged))
            expert = copy_module(task.expert)
            for name, (whole, rows) in split_attention(expert).items():
                if whole in merged:  # a view, so that what is written here is written there
                    self.merged.setdefault(name, nn.Parameter(merged[whole].detach()[rows], requires_grad=False))
            self.experts.append(expert)
        self.reference = self._copy(0, "merged")
        self.tied = tied_names(self.reference)
        # A tied tensor may be solved where it is first used, and only there: what was computed with it is not undone.
        solvable = {own for name, layer in self.candidates.items() for own in layer.written(name).values()}
        self.used = {first for name, first in self.tied.items() if name not in solvable}
        self.inputs: _Inputs | None = None
        self.outputs = _OutputError()

    def run(self) -> list[LayerRecord]:
        records: list[LayerRecord] = []
        # Version counters, by which a changed input is noticed, do not exist in inference mode.
        with torch.inference_mode(False), torch.no_grad(), _without_fast_path():
            for layer, arrivals in lockstep(self._forwards(), list(self.candidates)):
                self._finish(records)
                start = time.perf_counter()
                records.append(self._merge(layer, arrivals))
                records[-1].seconds = time.perf_counter() - start
            self._finish(records)
        return records

    def _copy(self, task: int, stream: Stream) -> nn.Module:
        """The model that a task's forward runs, with module objects of its own."""
        expert = self.experts[task]
        ours = {id(t): self.merged[n] for n, t, _ in named_tensors(expert) if n in self.merged}
        return copy_module(expert, ours if stream == "merged" else None)

    def _forwards(self) -> list[Forward]:
        forwards: list[Forward] = []
        for number, task in enumerate(self.tasks):
            for index, batch in enumerate(task.batches):
                for stream in self.rule.streams:
                    module = self._copy(number, stream)
                    forwards.append(
                        _CalibrationForward(
                            module=module,
                            call=_Call(task, module, batch, index),
                            label=f"task '{task.name}', batch {index}, {stream} model",
                            seed=100_003 * number + index,
                            on_output=self._on_output(number, index, stream),
                            task=number,
                            batch=index,
                            stream=stream,
                        )
                    )
        return forwards

    def _on_output(self, task: int, batch: int, stream: Stream) -> Callable[[str, Any], None] | None:
        if len(self.rule.streams) < 2:
            return None

        def receive(layer: str, output: Any) -> None:
            keep = self.tasks[task].keep(self.tasks[task].batches[batch])
            self.outputs.add((task, batch), output, keep, stream == "expert")

        return receive

    def _finish(self, records: list[LayerRecord]) -> None:
        """Report the layer whose forwards have all left it by now."""
        if records:
            if self.outputs.energy is not None:
                records[-1].residual = self.outputs.relative()
            self.on_layer(records[-1])
        self.outputs = _OutputError()

    def _merge(self, layer: str, arrivals: Sequence[Arrival]) -> LayerRecord:
        candidate, module = self.candidates[layer], self.reference.get_submodule(layer)
        kind = candidate.kind
        names = candidate.written(layer)
        record = LayerRecord(layer, kind.name)
        tied = [p for p in names.values() if self.tied[p] in self.used]
        self.used.update(self.tied[p] for p in names.values())
        if tied:
            twins = [n for n, first in self.tied.items() if first == self.tied[tied[0]] and n != tied[0]]
            record.note = f"{tied[0]} is tied to {', '.join(twins)}, which is used before or has no closed form"
            return record
        if not all(isinstance(arrival.input, Tensor) for arrival in arrivals):
            record.note = "it is called without a tensor"
            return record
        with torch.autocast(arrivals[0].input.device.type, enabled=False):
            record.note = kind.refuses(module, arrivals[0].args, arrivals[0].kwargs)
            if record.note:
                return record
            experts = [expert.get_submodule(layer) for expert in self.experts]
            weights = [kind.to_matrix(expert, module) for expert in experts]
            inputs = self._statistics(layer, kind, module, arrivals, weights)
            grams = [s.mean_gram() for s in inputs.statistics]
            if inputs.factor is None:
                inputs.factor = factorize(grams, self.importance, self.rule.ridge)
            drifts = [s.mean_drift(w) for s, w in zip(inputs.statistics, weights)]
            solution = solve(inputs.factor, grams, drifts, weights, self.importance)
            shifted = inputs.statistics if self.rule.inputs == "merged" else None
            values = kind.finish(module, solution, experts, shifted, self.importance)
        if isinstance(values, str):
            record.note = values
            return record
        for own, value in values.items():
            self.merged[names[own]].copy_(value)
        record.parameters, record.buffers = list(candidate.parameters.values()), list(candidate.buffers.values())
        record.condition, record.jitter = inputs.factor.condition, inputs.factor.jitter
        record.shared_with = inputs.layer if inputs.layer != layer else None
        record.unpaired = inputs.unpaired
        for task, statistics in zip(self.tasks, inputs.statistics):
            record.rows[task.name] = statistics.rows
            if statistics.shift.rows:
                record.distance[task.name] = statistics.shift.relative_distance
                record.cosine[task.name] = statistics.shift.mean_cosine
        if len(self.rule.streams) < 2:
            record.residual = residual(grams, weights, solution, self.importance)
        return record

    def _statistics(
        self, layer: str, kind: LayerType, module: nn.Module, arrivals: Sequence[Arrival], weights: Sequence[Tensor]
    ) -> _Inputs:
        seen: dict[tuple[int, int, Stream], tuple[weakref.ref[Tensor], int]] = {}
        calls: dict[tuple[int, int, Stream], Arrival] = {}
        for arrival in arrivals:
            forward = arrival.forward
            assert isinstance(forward, _CalibrationForward)
            place = (forward.task, forward.batch, forward.stream)
            calls[place] = arrival
            if isinstance(arrival.input, Tensor) and not arrival.input.is_inference():
                seen[place] = (weakref.ref(arrival.input), arrival.input._version)
        multiply = kind.multiply(weights[0])
        previous = self.inputs
        if previous and previous.key == kind.key(module) and len(seen) == len(calls) and previous.same_inputs(seen):
            return previous
        bias = kind.has_bias(module)
        statistics = [InputStatistics(bias, self.rule.normalize, multiply) for _ in self.tasks]
        inputs = _Inputs(layer, None if multiply else kind.key(module), seen, statistics)
        finite: list[tuple[Arrival, Tensor]] = []
        for (task, batch, stream), arrival in calls.items():
            if stream != self.rule.streams[0]:
                continue
            other = calls.get((task, batch, "expert")) if self.rule.streams == ("merged", "expert") else None
            keep = self.tasks[task].keep(self.tasks[task].batches[batch])
            paired = kind.gather(
                module,
                statistics[task],
                (arrival.args, arrival.kwargs),
                None if other is None else (other.args, other.kwargs),
                weights[task],
                keep,
            )
            inputs.unpaired += int(self.rule.streams == ("merged", "expert") and not paired)
            gram = statistics[task].gram
            assert gram is not None
            finite.append((arrival, gram.diagonal(dim1=-2, dim2=-1).sum()))
        self._check_finite(layer, finite, statistics, weights)
        width = weights[0].shape[2]
        for entry in statistics:
            if entry.gram is None:  # no forward of this task got here
                entry.gram = torch.zeros(weights[0].shape[0], width, width, device=weights[0].device)
        self.inputs = inputs
        return inputs

    def _check_finite(
        self,
        layer: str,
        traces: Sequence[tuple[Arrival, Tensor]],
        statistics: Sequence[InputStatistics],
        weights: Sequence[Tensor],
    ) -> None:
        for task, weight in zip(self.tasks, weights):
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteError(f"layer '{layer}' of expert '{task.name}' holds NaN or infinity")
        for arrival, trace in traces:
            if not bool(torch.isfinite(trace)):
                raise NonFiniteError(f"the inputs of layer '{layer}' hold NaN or infinity: {arrival.forward.label}")
        for task, entry in zip(self.tasks, statistics):
            if entry.drift is not None and not bool(torch.isfinite(entry.drift).all()):
                raise NonFiniteError(f"the inputs of layer '{layer}' in expert '{task.name}' hold NaN or infinity")


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


@dataclass
class _OutputError:
    """Squared distance between the outputs of merged model and expert at one layer, summed as they come in."""

    waiting: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    error: Tensor | None = None
    energy: Tensor | None = None

    def add(self, place: tuple[int, int], output: Any, keep: Tensor | None, from_expert: bool) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        other = self.waiting.pop(place, None)
        if other is None:
            self.waiting[place] = output.clone()  # an activation may change it in place
            return
        expert, merged = (output, other) if from_expert else (other, output)
        if expert.shape != merged.shape:
            return
        index = kept(keep, expert.shape[:-1])
        if index is not None:
            expert, merged = expert.flatten(0, -2)[index], merged.flatten(0, -2)[index]
        expert, merged = expert.float(), merged.float()
        error, energy = (merged - expert).square().sum(), expert.square().sum()
        self.error = error if self.error is None else self.error + error
        self.energy = energy if self.energy is None else self.energy + energy

    def relative(self) -> float:
        return 0.0 if self.error is None else float(self.error) / max(float(self.energy or 0.0), 1e-30)
