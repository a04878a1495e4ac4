"""The statistics of one layer's inputs, gathered from all the forwards that wait at it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.residual_stream import Corrections, Where
from com_lightning.core.layers import LayerType, kept
from com_lightning.core.layers.base import Call
from com_lightning.core.solve.ridge import Factor
from com_lightning.core.solve.statistics import InputStatistics, Scratch
from com_lightning.core.sweep.bad_batches import BadBatch
from com_lightning.core.sweep.lockstep import Arrival, Forward
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.task import NonFiniteError, Stream, Task
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.modules import all_finite
from com_lightning.core.tensors.tracked import Part


@dataclass(eq=False)
class CalibrationForward(Forward):
    task: int = 0
    batch: int = 0
    stream: Stream = "merged"

    @property
    def where(self) -> Where:
        return (self.task, self.batch, self.stream)


@dataclass
class Layer:
    """A layer, be it a module or a function call, in the merged model and in every expert.

    Attributes:
        parts: own name of each parameter and buffer that is written -> what it is of the whole model's.
        base: the layer in the model that the experts were fine-tuned from, for rules that need it.
        corrected: whether its targets make up for what the stream lacks that its output is added to.
    """

    name: str
    kind: LayerType
    merged: nn.Module
    experts: list[nn.Module]
    parts: dict[str, Part]
    base: nn.Module | None = None
    corrected: bool = False

    @cached_property
    def weights(self) -> list[Tensor]:
        """Weight of each expert, ``(g, o, k)``."""
        return [self.kind.to_matrix(expert, self.merged) for expert in self.experts]

    @property
    def multiply(self) -> bool:
        """Whether the drift is gathered already multiplied by the weight."""
        return self.corrected or self.kind.multiply(self.weights[0])

    @property
    def key(self) -> Hashable:
        """Layers with one key may share the statistics of an input; ``None``: not to be shared."""
        return None if self.multiply else self.kind.key(self.merged)


@dataclass
class Inputs:
    """Statistics of one input tensor per forward, which several layers in a row may share.

    Attributes:
        layer: the first of them.
        key: what their types must agree on; ``None``: not to be shared.
        seen: each input and its version.
        statistics: per task.
        unpaired: calls whose expert rows could not be matched.
        uncorrected: calls for which what the stream lacks was not known, where it is to be made up for.
        masked: names of tasks whose padding masks fit.
        bad: batches that are not in the statistics because they cannot be counted.
        exact: whether batches had to be left out here, so that each of the others is gathered in float64.
        factor: of the sum of the Gram matrices.
    """

    layer: str
    key: Hashable
    seen: Mapping[Where, tuple[weakref.ref[Tensor], int]]
    statistics: list[InputStatistics]
    unpaired: int = 0
    uncorrected: int = 0
    masked: set[str] = field(default_factory=set)
    bad: list[BadBatch] = field(default_factory=list)
    exact: bool = False
    factor: Factor | None = None

    def repeated_at(self, layer: Layer, arrivals: Sequence[Arrival]) -> bool:
        """Whether a layer makes the same rows, and every forward arrives with the very tensor as before, unchanged."""
        if self.key is None or self.key != layer.key:
            return False
        seen = _seen(arrivals)
        return (
            len(seen) == len(arrivals)
            and seen.keys() == self.seen.keys()
            and all(self.seen[at][0]() is now() for at, (now, _) in seen.items())
            and all(self.seen[at][1] == version for at, (_, version) in seen.items())
        )

    @staticmethod
    def at(layer: Layer, arrivals: Sequence[Arrival]) -> Inputs:
        """What arrives at a layer, without statistics."""
        return Inputs(layer.name, layer.key, _seen(arrivals), [])

    def lose(self, lost: Set[tuple[int, int]]) -> None:
        """Forget the batches, by task and number, that were left out here."""
        if lost:
            self.seen = {place: seen for place, seen in self.seen.items() if place[:2] not in lost}
            self.exact = True

    @staticmethod
    def gathered(
        layer: Layer,
        arrivals: Sequence[Arrival],
        tasks: Sequence[Task],
        rule: ChainOptions,
        first: str | None = None,
        pager: Pager | None = None,
        exact: bool = False,
        corrections: Corrections | None = None,
    ) -> Inputs:
        """Gather the statistics, without what is not finite. ``first``: the layer that had these inputs first, and
        ``exact``: what was found there, in an earlier run. ``corrections``: needed for a layer that is corrected.

        Nothing is looked at twice where all is well: the sums tell. Where they do not, each batch is gathered anew, on
        its own and in float64, and added only if it is finite.

        Raises:
            NonFiniteError: naming the layer and the expert whose weights hold NaN or infinity.
        """
        for task, weight in zip(tasks, layer.weights):
            if not all_finite(weight):
                raise NonFiniteError(f"layer '{layer.name}' of expert '{task.name}' holds NaN or infinity")
        first = first or layer.name
        inputs = Inputs.empty(first, layer, rule, _seen(arrivals), tasks)
        pairs = list(_paired(arrivals, rule))
        for merged, expert in () if exact else _fetched(pairs, pager):
            inputs._add(layer, inputs._entry(merged, tasks), merged, expert, tasks, corrections)
        if exact or not all(_is_sound(entry, _SMALLEST) for entry in inputs.statistics):
            inputs = Inputs.empty(first, layer, rule, inputs.seen, tasks)
            for merged, expert in _fetched(pairs, pager):
                inputs._add_if_finite(layer, merged, expert, tasks, rule, corrections)
            inputs.lose({(batch.task, batch.batch) for batch in inputs.bad})
        inputs.statistics[0].scratch.clear()  # all have one
        return inputs

    @staticmethod
    def empty(first: str, layer: Layer, rule: ChainOptions, seen: Mapping[Where, Any], tasks: Sequence[Task]) -> Inputs:
        """Of no row yet."""
        scratch = Scratch()
        inputs = Inputs(first, layer.key, seen, [_empty(layer, rule, scratch) for _ in tasks])
        return inputs

    def _entry(self, arrival: Arrival, tasks: Sequence[Task]) -> InputStatistics:
        """What the rows of a forward are added to."""
        return self.statistics[where(arrival)[0]]

    def _add(
        self,
        layer: Layer,
        statistics: InputStatistics,
        merged: Arrival,
        expert: Arrival | None,
        tasks: Sequence[Task],
        corrections: Corrections | None,
        exact: bool = False,
    ) -> None:
        """Add a batch, in float64 if it is to be exact."""
        number, batch, _ = where(merged)
        task = tasks[number]
        keep = task.keep(task.batches[batch])
        lead = merged.input.shape[: merged.input.dim() - merged.input.is_floating_point()]
        calls = [None if a is None else _in_float64(a) if exact else (a.args, a.kwargs) for a in (merged, expert)]
        assert calls[0] is not None
        gap = None
        if layer.corrected and corrections and expert is not None and expert.input.shape == merged.input.shape:
            gap = corrections.gap(layer.name, number, batch, exact)
        if gap is not None:
            gap = layer.kind.offset(layer.merged, *calls[0], layer.weights[number], gap)
        paired = layer.kind.gather(layer.merged, statistics, calls[0], calls[1], layer.weights[number], keep, gap)
        self.uncorrected += int(layer.corrected and gap is None)
        self.masked |= {task.name} if kept(keep, lead) is not None else set()
        self.unpaired += int(expert is not None and not paired)

    def _add_if_finite(
        self,
        layer: Layer,
        merged: Arrival,
        expert: Arrival | None,
        tasks: Sequence[Task],
        rule: ChainOptions,
        corrections: Corrections | None,
    ) -> None:
        number, batch, _ = where(merged)
        part = _empty(layer, rule, self._entry(merged, tasks).scratch)
        self._add(layer, part, merged, expert, tasks, corrections, exact=True)
        if _is_sound(part):
            self._entry(merged, tasks).join(part)
            return
        label, why = merged.forward.label, "hold NaN or infinity"
        tensors = {a.forward.label: _floating(a) for a in (merged, expert) if a is not None}
        broken = [name for name, own in tensors.items() if not all(bool(t.isfinite().all()) for t in own)]
        if not broken:
            largest = max((float(t.abs().amax()) for own in tensors.values() for t in own if t.numel()), default=0.0)
            why = f"are finite, but what is computed from them is not (they are {largest:.3g} at most)"
        gap = corrections.gap(layer.name, number, batch) if layer.corrected and corrections and not broken else None
        if gap is not None and not bool(gap.isfinite().all()):
            why = "are finite, but what its output is added to is not"
        self.bad.append(BadBatch(number, batch, broken[0] if broken else label, why))


def _empty(layer: Layer, rule: ChainOptions, scratch: Scratch) -> InputStatistics:
    return InputStatistics(layer.kind.has_bias(layer.merged), rule.normalize, layer.multiply, scratch=scratch)


def _paired(arrivals: Sequence[Arrival], rule: ChainOptions) -> Iterator[tuple[Arrival, Arrival | None]]:
    """Each arrival whose input is regressed on, and that of its batch in the expert where the rule is two-sided."""
    calls = {where(arrival): arrival for arrival in arrivals}
    two_sided = rule.streams == ("merged", "expert")
    for (task, batch, stream), arrival in calls.items():
        if stream == rule.streams[0]:
            yield arrival, calls.get((task, batch, "expert")) if two_sided else None


def _fetched(
    pairs: Sequence[tuple[Arrival, Arrival | None]], pager: Pager | None
) -> Iterator[tuple[Arrival, Arrival | None]]:
    """Each pair while it is in memory, if others have been paged out."""
    for pair in pairs:
        if pager is not None:  # what the last ones were fetched for is done
            pager.settle()
            pager.fetch(*((a.args, a.kwargs) for a in pair if a is not None))
        yield pair
    if pager is not None:
        pager.settle()


# Below it, sums of squares in float32 are made of numbers that have lost digits.
_SMALLEST = 1e-25


def _is_sound(statistics: InputStatistics, smallest: float = 0.0) -> bool:
    """Whether all sums are finite, and not so small that they are inexact."""
    if statistics.gram is None:
        return True
    trace = statistics.gram.diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64)
    sums: list[Tensor | float] = [trace, statistics.shift.distance, statistics.shift.energy, statistics.shift.cosine]
    if statistics.drift is not None:
        sums.append(statistics.drift.sum(dtype=torch.float64))
    for moments in (statistics.moments, statistics.expert_moments):
        sums += [torch.as_tensor(moments.square).sum()]
    told = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=trace.device) for value in sums])
    total, small = torch.stack([told.sum(), trace]).tolist()  # one wait for the device
    return math.isfinite(total) and not 0.0 < small < smallest


def _floating(arrival: Arrival) -> list[Tensor]:
    values = (*arrival.args, *arrival.kwargs.values())
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _in_float64(arrival: Arrival) -> Call:
    def cast(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(map(cast, arrival.args)), {name: cast(value) for name, value in arrival.kwargs.items()}


def check_solution(layer: Layer, values: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
    """Make sure that a solution can be written.

    Raises:
        NonFiniteError: naming the layer, and what to do.
    """
    for own, value in values.items():
        dtype = merged[layer.parts[own].name].dtype
        if not all_finite(value.to(dtype)):
            largest = float(value.nan_to_num(0.0).abs().amax())
            raise NonFiniteError(
                f"the solution of layer '{layer.name}' holds NaN or infinity: {own}, with values up to {largest:.3g}, "
                f"is stored in {dtype}. Merge in a wider precision (the trainer's), or raise the ridge"
            )


def where(arrival: Arrival) -> Where:
    assert isinstance(arrival.forward, CalibrationForward)
    return arrival.forward.where


def _seen(arrivals: Sequence[Arrival]) -> dict[Where, tuple[weakref.ref[Tensor], int]]:
    return {
        where(arrival): (weakref.ref(arrival.input), private_torch.version(arrival.input))
        for arrival in arrivals
        if isinstance(arrival.input, Tensor) and not arrival.input.is_inference()
    }
