"""The naive chain of merges: the merged model runs again from its start up to each layer.

What the lockstep replaces, for tests and benchmarks. It hands out the same arrivals, so that the same statistics and
solver are used, but each layer costs one (partial) run of the merged model on every batch: time grows with the square
of the depth. The experts do not change as the merge goes on, so they run once here too, and pause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from com_lightning.core import chain
from com_lightning.core.lockstep import Arrival, Forward, lockstep


def naive_chain(
    tasks: Sequence[chain.Task], merged: Mapping[str, Tensor], importance: Sequence[float], rule: chain.Rule
) -> list[chain.LayerRecord]:
    """:func:`~com_lightning.core.chain.merge_layers` with :func:`rerun` in place of the lockstep."""
    with patch.object(chain, "lockstep", rerun):
        return chain.merge_layers(tasks, merged, importance, rule)


def rerun(forwards: Sequence[Forward], layers: Sequence[str]) -> Iterator[tuple[str, list[Arrival]]]:
    """What ``lockstep`` yields, by running the merged model's forwards (or all, where there are none) for every layer.

    The layers' outputs are not reported (``Forward.on_output``): the weights do not depend on them, the residual in the
    records does.
    """
    order = {name: position for position, name in enumerate(layers)}
    again = [forward for forward in forwards if getattr(forward, "stream", "merged") == "merged"] or list(forwards)
    paused = lockstep([forward for forward in forwards if forward not in again], layers)
    waiting, served = next(paused, None), set[str]()
    while len(served) < len(order):
        arrivals = [*filter(None, (_next_arrival(forward, order.keys() - served) for forward in again))]
        if not arrivals:  # no forward reaches any of the layers that are left
            return
        layer = min((arrival.layer for arrival in arrivals), key=order.__getitem__)
        served.add(layer)
        arrivals = [arrival for arrival in arrivals if arrival.layer == layer]
        if waiting is not None and waiting[0] == layer:
            yield layer, [*arrivals, *waiting[1]]
            waiting = next(paused, None)
        else:
            yield layer, arrivals


class _Stop(BaseException):
    """Ends a forward at a layer; no ``Exception``, which a forward may catch."""


def _next_arrival(forward: Forward, layers: set[str]) -> Arrival | None:
    """Run ``forward`` from its start until it enters one of ``layers``."""
    arrivals: list[Arrival] = []

    def entering(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arrivals.append(Arrival(forward, name, args, kwargs))
            raise _Stop

        return hook

    watched = [(name, module) for name, module in forward.module.named_modules() if name in layers]
    hooks = [module.register_forward_pre_hook(entering(name), with_kwargs=True) for name, module in watched]
    try:
        with torch.random.fork_rng():
            torch.manual_seed(forward.seed)
            forward.call()
    except _Stop:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return arrivals[0] if arrivals else None
