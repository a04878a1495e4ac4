"""Gathers the statistics of each layer from the forwards that wait there, in all processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from com_lightning.core.chain.inputs import LayerInputs, SeenInputs
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.pairing import are_permuted
from com_lightning.core.chain.reduce import reduce_sums
from com_lightning.core.chain.residual_stream import ResidualStreams
from com_lightning.core.chain.soundness import describe_bad_inputs, is_sound
from com_lightning.core.layers import Arguments, LayerCall
from com_lightning.core.solve.statistics import InputSums, Scratch
from com_lightning.core.sweep.layer import Layer, forward_id
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.sweep import Sweep
from com_lightning.core.sweep.task import BatchId, ForwardId, NonFiniteError, SkippedBatch, Task
from com_lightning.core.tensors.modules import all_finite

Permuted = set[tuple[BatchId, int]]
"""Batches whose rows come in another order in the expert, with the number of these rows."""

Pair = tuple[PausedCall, PausedCall | None]
"""A forward whose input the layer is solved for, and the expert's forward on the same batch, if its input is used."""


@dataclass
class Gathered:
    """What all processes know about a layer after its statistics are gathered.

    Attributes:
        refusal: why the layer cannot be solved; ``None`` if it can.
        solved_before: whether an earlier run has solved it. Then nothing is gathered.
        skipped: batches that are left out from this layer on.
    """

    refusal: str | None = None
    solved_before: bool = False
    skipped: list[SkippedBatch] = field(default_factory=list)


class Gatherer:
    """Gathers the statistics of layer after layer. Consecutive layers with the same inputs share them.

    Args:
        options: what is solved.
        streams: follows the residual streams that are repaired.

    Attributes:
        inputs: statistics of the present layer. At the owner, they include all processes. ``None``: no forward of this
            process has reached the layer, or an earlier run has solved it.
        permuted: the rows that come in another order in the expert, as far as earlier layers have shown.
        seen: the inputs that the statistics are computed from.
        owner: the process that solves the layer.
    """

    def __init__(self, options: ChainOptions, streams: ResidualStreams) -> None:
        self.options, self.streams = options, streams
        self.inputs: LayerInputs | None = None
        self.permuted: Permuted = set()
        self.seen: SeenInputs | None = None
        self.owner = 0
        self._complete = False
        """Whether the statistics of these inputs have been added up at the owner."""

    def gather(
        self, sweep: Sweep, layer: Layer | None, name: str, calls: Sequence[PausedCall], solved_before: bool = False
    ) -> Gathered:
        """Gather the statistics of a layer in all processes, and add them up at the owner.

        Args:
            sweep: the sweep.
            layer: the layer. ``None``: no forward of this process has reached it.
            name: the layer's name.
            calls: the calls of the layer at which forwards of this process are paused.
            solved_before: whether this process knows the solution from an earlier run.

        Returns:
            What all processes know about the layer.
        """
        peers = sweep.context.peers
        refusal = sweep.refusal(layer, calls) if layer else None
        same = layer is None or bool(not refusal and self.seen and self.seen.are_seen_again(layer, calls))
        everyone = peers.exchange((layer is not None, refusal, same, solved_before))
        for _, reason, _, _ in everyone:
            if reason:
                return Gathered(reason)
        reached = [rank for rank, (arrived, _, _, _) in enumerate(everyone) if arrived]
        if not reached:
            return Gathered("only batches that are skipped reach it")
        repeated = all(same for _, _, same, _ in everyone)
        if owners := [rank for rank, (_, _, _, knows_solution) in enumerate(everyone) if knows_solution]:
            self.owner = owners[0]
            if not repeated:
                self._start(layer, calls)
            return Gathered(solved_before=True)
        skipped: list[SkippedBatch] = []
        if not (repeated and self._complete):
            before = self.seen if repeated else None
            self._start(layer, calls)
            if before and self.seen:
                self.seen.layer, self.seen.exact = before.layer, before.exact
            if layer and self.seen:
                exact = self.seen.exact
                self.inputs = gather(
                    layer, calls, sweep.tasks, self.options, sweep.pager, exact, self.streams, self.permuted
                )
                self.seen.forget({batch.id for batch in self.inputs.bad})
            skipped = sweep.bad_batches.skip(self.inputs.bad if self.inputs else [], name)
            self.owner = reached[len(sweep.function_calls.solved) % len(reached)]  # processes take turns
            self._complete = True
            reduce_sums(self.inputs, peers, self.owner, sweep.models.device)
        return Gathered(skipped=skipped)

    def _start(self, layer: Layer | None, calls: Sequence[PausedCall]) -> None:
        """Start with other inputs. The last statistics are freed first, because two sets may not fit in memory."""
        self.inputs, self._complete = None, False
        self.seen = SeenInputs.of(layer, calls) if layer else None


def gather(
    layer: Layer,
    calls: Sequence[PausedCall],
    tasks: Sequence[Task],
    options: ChainOptions,
    pager: Pager | None = None,
    exact: bool = False,
    streams: ResidualStreams | None = None,
    permuted: Permuted | None = None,
) -> LayerInputs:
    """Gather the statistics of one layer in this process, without batches whose sums are not finite.

    Usually the sums of all batches are finite, and each input is read once. Otherwise each batch is gathered again,
    alone and in float64, and added only if its sums are finite.

    Args:
        layer: the layer, with the weights of all experts.
        calls: the calls of the layer at which forwards are paused.
        tasks: the experts and their data.
        options: what is solved.
        pager: fetches inputs that were paged out.
        exact: gather each batch alone from the start.
        streams: the residual streams, for a layer that repairs one.
        permuted: the rows that come in another order in the expert. Those of this layer are added.

    Returns:
        The statistics of all tasks.

    Raises:
        NonFiniteError: if an expert's weights hold NaN or infinity. The message names the layer and the expert.
    """
    for task, weight in zip(tasks, layer.weights):
        if not all_finite(weight):
            raise NonFiniteError(f"layer '{layer.name}' of expert '{task.name}' holds NaN or infinity")
    scratch, permuted = Scratch(), set() if permuted is None else permuted
    pairs = list(_pairs(calls, options))
    inputs = LayerInputs([_empty(layer, options, scratch) for _ in tasks])
    for pair in () if exact else _fetched(pairs, pager):
        _add(inputs, inputs.sums[forward_id(pair[0]).batch.task], layer, pair, tasks, streams, permuted)
    if exact or not all(is_sound(sums, _SMALLEST) for sums in inputs.sums):
        inputs = LayerInputs([_empty(layer, options, scratch) for _ in tasks])
        for pair in _fetched(pairs, pager):
            batch = forward_id(pair[0]).batch
            alone = _empty(layer, options, scratch)
            _add(inputs, alone, layer, pair, tasks, streams, permuted, exact=True)
            if is_sound(alone):
                inputs.sums[batch.task].join(alone)
            else:
                drift = streams.drift(layer.name, batch) if streams and layer.repairs_stream else None
                inputs.bad.append(describe_bad_inputs(batch, pair, drift))
    scratch.clear()
    return inputs


# Sums of squares in float32 that are smaller than this have lost digits.
_SMALLEST = 1e-25


def _add(
    inputs: LayerInputs,
    sums: InputSums,
    layer: Layer,
    pair: Pair,
    tasks: Sequence[Task],
    streams: ResidualStreams | None,
    permuted: Permuted,
    exact: bool = False,
) -> None:
    """Add one batch to ``sums``, in float64 if ``exact`` is set, and to the counts of ``inputs``."""
    merged, expert = pair
    batch = forward_id(merged).batch
    task, module, weight = tasks[batch.task], layer.merged, layer.weights[batch.task]
    mask = task.row_mask(task.batches[batch.position], layer.name)
    ours = Arguments(merged.args, merged.kwargs)
    theirs = None if expert is None else Arguments(expert.args, expert.kwargs)
    if exact:
        ours, theirs = ours.to(torch.float64), None if theirs is None else theirs.to(torch.float64)
    drift = None
    if theirs is not None and _comes_in_another_order(batch, ours, theirs, permuted):
        theirs, inputs.permuted = None, inputs.permuted + 1
    if (
        layer.repairs_stream
        and streams
        and theirs is not None
        and expert is not None
        and expert.input.shape == merged.input.shape
    ):
        drift = streams.drift(layer.name, batch, exact)
    if drift is not None:
        drift = layer.layer_type.offset(module, ours.args, ours.kwargs, weight, drift)
    paired = layer.layer_type.gather(module, sums, LayerCall(ours, theirs, weight, mask, drift))
    inputs.uncorrected += int(layer.repairs_stream and drift is None)
    inputs.masked |= {task.name} if mask and mask.has_applied else set()
    inputs.doubtful |= {task.name} if mask and mask.was_doubtful else set()
    inputs.unpaired += int(expert is not None and not paired)


def _comes_in_another_order(batch: BatchId, ours: Arguments, theirs: Arguments, permuted: Permuted) -> bool:
    """Whether the expert has the rows in another order. If it has before one layer, it has before the next one."""
    one, other = ours.input, theirs.input
    if one.shape != other.shape or not one.is_floating_point() or one.dim() < 2 or not one.numel():
        return False
    # Tokens or proposals; of images, the images of proposals
    rows, others = (x.flatten(0, -2) if x.dim() < 4 else x.flatten(1) for x in (one, other))
    if (batch, len(rows)) not in permuted and are_permuted(rows, others):
        permuted.add((batch, len(rows)))
    return (batch, len(rows)) in permuted


def _empty(layer: Layer, options: ChainOptions, scratch: Scratch) -> InputSums:
    has_bias = layer.layer_type.has_bias(layer.merged)
    sums = InputSums(has_bias, options.normalize, layer.multiplies_drift, scratch=scratch)
    sums.measures_similarity = options.by_similarity
    return sums


def _pairs(calls: Sequence[PausedCall], options: ChainOptions) -> Iterator[Pair]:
    """Each paused call whose input the layer is solved for, with the expert's call if the merge is two-sided."""
    by_id = {forward_id(call): call for call in calls}
    for (batch, stream), call in by_id.items():
        if stream == options.streams[0]:
            yield call, by_id.get(ForwardId(batch, "expert")) if options.two_sided else None


def _fetched(pairs: Sequence[Pair], pager: Pager | None) -> Iterator[Pair]:
    """Each pair in turn, brought back to memory if it was paged out."""
    for pair in pairs:
        if pager is not None:  # the last pair may be paged out again
            pager.enforce_budget()
            pager.fetch(*((call.args, call.kwargs) for call in pair if call is not None))
        yield pair
    if pager is not None:
        pager.enforce_budget()
