"""The naive chain of merges: the merged model runs again from its start up to each layer.

Tests and benchmarks compare the lockstep with it. It yields the same paused calls, so that the same statistics and
solver are used, but each layer costs one partial run of the merged model on every batch: time grows with the square of
the depth. The experts do not change during the merge, so that they run only once here too, and pause.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping, Sequence
from unittest.mock import patch

from torch import Tensor

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep import sweep
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import ChooseNext, Forward, PausedCall, Position, lockstep
from com_lightning.core.sweep.task import LayerRecord, Task


def naive_chain(
    tasks: Sequence[Task], merged: Mapping[str, Tensor], importance: Sequence[float], options: ChainOptions
) -> list[LayerRecord]:
    """:func:`~com_lightning.core.chain.chain.merge_layers` with :func:`rerun` in place of the lockstep."""
    with patch.object(sweep, "lockstep", rerun):
        return merge_layers(tasks, merged, importance, options)


def rerun(
    forwards: Sequence[Forward],
    layers: Mapping[str, Position],
    visited: Collection[str] = (),
    choose_next: ChooseNext = lambda waiting: waiting,
    pager: None = None,
) -> Generator[tuple[str, list[PausedCall]], None, None]:
    """What ``lockstep`` yields, by running the merged model's forwards (or all, where there are none) for every layer.

    The layers' outputs are not reported (``Forward.on_output``): the weights do not depend on them, the residual in the
    records does.
    """
    again = [f for f in forwards if not isinstance(f, CalibrationForward) or f.id.stream == "merged"] or list(forwards)
    paused = lockstep([forward for forward in forwards if forward not in again], layers, visited)
    waiting, done = next(paused, None), set(visited)
    while calls := [*filter(None, (_next_call(forward, layers, done) for forward in again))]:
        first = min(calls, key=lambda call: call.position)
        layer = first.layer
        choose_next((first.position, layer))
        done.add(layer)
        calls = [call for call in calls if call.layer == layer]
        if waiting is not None and waiting[0] == layer:
            yield layer, [*calls, *waiting[1]]
            waiting = next(paused, None)
        else:
            yield layer, calls


def _next_call(forward: Forward, layers: Mapping[str, Position], done: Collection[str]) -> PausedCall | None:
    """Run ``forward`` from its start until it enters a layer that is not done."""
    steps = lockstep([forward], layers, done)
    try:
        return next(steps, (None, [None]))[1][0]
    finally:
        steps.close()
