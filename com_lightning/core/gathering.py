"""The statistics of one layer's inputs, gathered from all the forwards that wait at it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from com_lightning.core.layers import LayerType, kept
from com_lightning.core.lockstep import Arrival, Forward
from com_lightning.core.paging import Pager
from com_lightning.core.peers import Peers
from com_lightning.core.rule import NonFiniteError, Rule, Stream, Task
from com_lightning.core.solver import Factor
from com_lightning.core.statistics import InputStatistics, Moments, Shift
from com_lightning.core.watch import Part

Where = tuple[int, int, Stream]
"""Task, batch and stream of a forward."""


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
    """

    name: str
    kind: LayerType
    merged: nn.Module
    experts: list[nn.Module]
    parts: dict[str, Part]

    @cached_property
    def weights(self) -> list[Tensor]:
        """Weight of each expert, ``(g, o, k)``."""
        return [self.kind.to_matrix(expert, self.merged) for expert in self.experts]

    @property
    def multiply(self) -> bool:
        """Whether the drift is gathered already multiplied by the weight."""
        return self.kind.multiply(self.weights[0])

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
        masked: names of tasks whose padding masks fit.
        factor: of the sum of the Gram matrices.
    """

    layer: str
    key: Hashable
    seen: Mapping[Where, tuple[weakref.ref[Tensor], int]]
    statistics: list[InputStatistics]
    unpaired: int = 0
    masked: set[str] = field(default_factory=set)
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
    def gathered(
        layer: Layer, arrivals: Sequence[Arrival], tasks: Sequence[Task], rule: Rule, pager: Pager | None = None
    ) -> Inputs:
        """Gather the statistics.

        Raises:
            NonFiniteError: naming the layer, and the expert or the batch.
        """
        kind, module, weights = layer.kind, layer.merged, layer.weights
        statistics = [InputStatistics(kind.has_bias(module), rule.normalize, layer.multiply) for _ in tasks]
        inputs = Inputs(layer.name, layer.key, _seen(arrivals), statistics)
        calls = {where(arrival): arrival for arrival in arrivals}
        two_sided = rule.streams == ("merged", "expert")
        traces: list[tuple[Arrival, Tensor]] = []
        for (task, batch, stream), arrival in calls.items():
            if stream != rule.streams[0]:
                continue
            other = calls.get((task, batch, "expert")) if two_sided else None
            if pager is not None:  # what the last ones were fetched for is done
                pager.settle()
                pager.fetch(*((a.args, a.kwargs) for a in (arrival, other) if a is not None))
            keep = tasks[task].keep(tasks[task].batches[batch])
            lead = arrival.input.shape[: arrival.input.dim() - arrival.input.is_floating_point()]
            inputs.masked |= {tasks[task].name} if kept(keep, lead) is not None else set()
            paired = kind.gather(
                module,
                statistics[task],
                (arrival.args, arrival.kwargs),
                None if other is None else (other.args, other.kwargs),
                weights[task],
                keep,
            )
            inputs.unpaired += int(two_sided and not paired)
            gram = statistics[task].gram
            assert gram is not None
            traces.append((arrival, gram.diagonal(dim1=-2, dim2=-1).sum()))
        if pager is not None:
            pager.settle()
        inputs._check_finite(layer, traces, tasks)
        return inputs

    def _check_finite(self, layer: Layer, traces: Sequence[tuple[Arrival, Tensor]], tasks: Sequence[Task]) -> None:
        name, told = layer.name, "NaN or infinity"
        for task, weight in zip(tasks, layer.weights):
            if not bool(torch.isfinite(weight).all()):
                raise NonFiniteError(f"layer '{name}' of expert '{task.name}' holds {told}")
        for arrival, trace in traces:
            if not bool(torch.isfinite(trace)):
                raise NonFiniteError(f"the inputs of layer '{name}' hold {told}: {arrival.forward.label}")
        for task, entry in zip(tasks, self.statistics):
            if entry.drift is not None and not bool(torch.isfinite(entry.drift).all()):
                raise NonFiniteError(f"the inputs of layer '{name}' in expert '{task.name}' hold {told}")


def add_up(inputs: Inputs | None, tasks: int, peers: Peers, owner: int, device: torch.device) -> None:
    """Add up the statistics of all processes at one of them. Those that have none pass ``None``."""
    if peers.size == 1:
        return
    met = peers.exchange(None if inputs is None else _Small.of(inputs))
    for number in range(tasks):
        entry = None if inputs is None else inputs.statistics[number]
        for which in ("gram", "drift"):
            known = [small.matrices[number][which] for small in met if small and which in small.matrices[number]]
            if known:
                tensor: Tensor | None = getattr(entry, which, None)
                shape, dtype = known[0]
                tensor = torch.zeros(shape, dtype=dtype, device=device) if tensor is None else tensor.contiguous()
                peers.add(tensor, owner)
                if entry is not None:
                    setattr(entry, which, tensor)
    if inputs is not None and peers.rank == owner:
        inputs.unpaired = sum(small.unpaired for small in met if small)
        inputs.masked = {name for small in met if small for name in small.masked}
        for number, entry in enumerate(inputs.statistics):
            parts = [small.sums[number] for small in met if small]
            entry.rows = sum(rows for rows, *_ in parts)
            entry.shift, entry.moments, entry.expert_moments = Shift(), Moments(), Moments()
            for _, shift, moments, expert_moments in parts:
                entry.shift.add(shift)
                entry.moments.add(moments.to(device))
                entry.expert_moments.add(expert_moments.to(device))


@dataclass
class _Small:
    """What processes tell each other of their statistics: all but the large matrices.

    Attributes:
        matrices: per task, name of each matrix -> its shape and precision.
        sums: per task, rows, shift and moments.
    """

    unpaired: int
    masked: set[str]
    matrices: list[dict[str, tuple[torch.Size, torch.dtype]]]
    sums: list[tuple[int, Shift, Moments, Moments]]

    @staticmethod
    def of(inputs: Inputs) -> _Small:
        matrices = [{"gram": entry.gram, "drift": entry.drift} for entry in inputs.statistics]
        return _Small(
            inputs.unpaired,
            inputs.masked,
            [{name: (m.shape, m.dtype) for name, m in own.items() if m is not None} for own in matrices],
            [(e.rows, e.shift.cpu(), e.moments.to("cpu"), e.expert_moments.to("cpu")) for e in inputs.statistics],
        )


def where(arrival: Arrival) -> Where:
    assert isinstance(arrival.forward, CalibrationForward)
    return arrival.forward.where


def _seen(arrivals: Sequence[Arrival]) -> dict[Where, tuple[weakref.ref[Tensor], int]]:
    return {
        where(arrival): (weakref.ref(arrival.input), arrival.input._version)
        for arrival in arrivals
        if isinstance(arrival.input, Tensor) and not arrival.input.is_inference()
    }
