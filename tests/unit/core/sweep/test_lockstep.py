"""Forwards that run together: order, contexts, errors, and nothing left behind."""

from __future__ import annotations

import gc
import random
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from greenlet import greenlet
from torch import Tensor, nn

from com_lightning.core.sweep.lockstep import Forward, lockstep


class Net(nn.Module):
    """Three layers, with something to call between them."""

    def __init__(self, between: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.between()
        x = self.b(x)
        self.between()
        return self.c(x)  # type: ignore[no-any-return]


LAYERS = ["a", "b", "c"]


def passes(count: int, net: nn.Module | None = None) -> list[Forward]:
    nets = [net or Net() for _ in range(count)]
    return [Forward(n, lambda n=n: n(torch.ones(3, 2)), label=f"number {i}") for i, n in enumerate(nets)]  # type: ignore[misc]


def living() -> int:
    """Greenlets that are started and not finished."""
    gc.collect()
    return sum(issubclass(type(o), greenlet) and bool(o) and o.parent is not None for o in gc.get_objects())


def test_every_layer_is_yielded_once_with_all_that_arrive() -> None:
    seen = [(layer, len(calls)) for layer, calls in lockstep(passes(4), LAYERS)]
    assert seen == [("a", 4), ("b", 4), ("c", 4)]


def test_what_is_written_at_a_layer_is_what_the_forwards_compute_with() -> None:
    net, outputs = Net(), []
    forwards = [Forward(net, lambda: outputs.append(net(torch.ones(1, 2)))) for _ in range(2)]
    with torch.no_grad():
        for layer, _ in lockstep(forwards, LAYERS):
            module = net.get_submodule(layer)
            module.weight.copy_(2 * torch.eye(2))  # type: ignore[operator]
            module.bias.zero_()  # type: ignore[operator]
    assert torch.equal(torch.cat(outputs), torch.full((2, 2), 8.0))


def test_forwards_that_wait_at_different_layers_are_served_in_execution_order() -> None:
    class Skipping(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x))  # type: ignore[no-any-return]

    seen = [(layer, len(calls)) for layer, calls in lockstep([*passes(1, Skipping()), *passes(2)], LAYERS)]
    assert seen == [("a", 3), ("b", 2), ("c", 3)]


def test_a_layer_called_twice_pauses_at_its_first_call_only() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))  # type: ignore[no-any-return]

    assert [layer for layer, _ in lockstep(passes(2, Twice()), LAYERS)] == ["a", "b"]


def test_arguments_by_position_and_by_keyword() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2)})
    calls: list[Callable[[], Any]] = [lambda: net["a"](torch.ones(2)), lambda: net["a"](input=torch.ones(2))]
    (_, paused) = next(iter(lockstep([Forward(net, call) for call in calls], ["a"])))
    assert all(torch.equal(call.input, torch.ones(2)) for call in paused)


def test_outputs_are_reported_for_the_layers_paused_at() -> None:
    net, seen = Net(), []
    forward = Forward(net, lambda: net(torch.ones(1, 2)), on_output=lambda layer, output: seen.append(layer))
    list(lockstep([forward], ["a", "c"]))
    assert seen == ["a", "c"]


def contexts() -> dict[str, Any]:
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
        "dtype": torch.get_default_dtype(),
    }


class DefaultDtype:
    """As Lightning's half precision plugin sets it around a forward."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.enable_grad(),
        lambda: torch.inference_mode(),
        lambda: DefaultDtype(torch.float64),
    ],
    ids=["autocast", "grad", "inference", "dtype"],
)
def test_contexts_belong_to_the_forward_that_entered_them(make: Callable[[], Any]) -> None:
    """Forwards with and without a context, paused inside it, with the scheduler outside of all."""
    inside: list[tuple[str, dict[str, Any]]] = []
    plain, special = (Net(lambda kind=kind: inside.append((kind, contexts()))) for kind in ("plain", "special"))  # type: ignore[misc]

    def enclosed() -> None:
        with make():
            special(torch.ones(1, 2, dtype=torch.float32))

    with torch.no_grad():
        outside = contexts()
        with make():
            expected = contexts()
        forwards = [Forward(special, enclosed), *passes(1, plain), Forward(special, enclosed)]
        for _ in lockstep(forwards, LAYERS):
            assert contexts() == outside
        assert contexts() == outside
    assert {kind for kind, _ in inside} == {"plain", "special"}
    assert all(state == (expected if kind == "special" else outside) for kind, state in inside)


def test_forwards_with_one_seed_draw_the_same_and_leave_the_global_state_alone() -> None:
    drawn: dict[int, list[float]] = {0: [], 1: [], 2: []}
    nets = {number: Net(lambda number=number: drawn[number].append(torch.rand(()).item())) for number in drawn}  # type: ignore[misc]
    seeds = {0: 5, 1: 5, 2: 6}
    forwards = [Forward(n, lambda n=n: n(torch.ones(1, 2)), seed=seeds[i]) for i, n in nets.items()]  # type: ignore[misc]
    before = torch.get_rng_state()
    list(lockstep(forwards, LAYERS))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2]


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Broken("no"), KeyboardInterrupt()])
def test_an_exception_ends_all_and_surfaces_as_itself(error: BaseException) -> None:
    calls = iter(range(100))

    def between() -> None:
        if next(calls) == 1:
            raise error

    closed: list[bool] = []
    net, other = Net(between), Net()

    def guarded() -> None:
        try:
            other(torch.ones(1, 2))
        finally:
            closed.append(True)

    forwards = [*passes(2, net), Forward(other, guarded)]
    threads = threading.active_count()
    with pytest.raises(type(error)) as caught:
        list(lockstep(forwards, LAYERS))
    assert caught.value is error
    if hasattr(error, "__notes__"):
        assert "number 1, after layer 'a'" in error.__notes__[0]
    del caught, forwards
    assert closed == [True]
    assert threading.active_count() == threads
    assert living() == 0
    assert not net.a._forward_pre_hooks


def test_ctrl_c_in_the_middle_of_a_forward() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which Python sets only if none was set before
    net = Net(lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        list(lockstep(passes(3, net), LAYERS))
    assert living() == 0
    signal.signal(signal.SIGINT, before)


def test_an_exception_in_the_consumer_ends_the_forwards() -> None:
    net = Net()
    steps = lockstep(passes(3, net), LAYERS)

    def consume() -> None:
        for _ in steps:
            raise Broken

    with pytest.raises(Broken):
        consume()
    steps.close()
    assert living() == 0
    assert not net.a._forward_pre_hooks


def test_a_forward_that_swallows_everything_is_ended_all_the_same() -> None:
    class Stubborn(Net):
        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.a, self.b, self.c):
                try:
                    x = layer(x)
                except BaseException:
                    continue
            return x

    next(steps := lockstep(passes(2, Stubborn()), LAYERS))
    steps.close()
    assert living() == 0


def test_a_layer_never_called_is_never_yielded_and_no_layers_is_a_plain_run() -> None:
    done: list[int] = []
    net = Net(lambda: done.append(1))
    assert [layer for layer, _ in lockstep(passes(1, net), ["nowhere"])] == []
    assert len(done) == 2


def test_each_forward_draws_its_own_numbers_wherever_they_come_from() -> None:
    """Two forwards with one seed draw the same, though they take turns, and the caller's state is left alone."""
    drawn: dict[str, list[Any]] = {"a": [], "b": []}

    def forward(name: str, net: nn.Module) -> Forward:
        def call() -> None:
            x = torch.ones(1, 2)
            for layer in net.children():
                x = layer(x)
                drawn[name].append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))

        return Forward(net, call, name, seed=7)

    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    expected = random.random(), float(numpy.random.rand()), float(torch.rand(()))
    random.seed(1), numpy.random.seed(1), torch.manual_seed(1)
    for _ in lockstep([forward("a", net), forward("b", net)], ["0", "1"]):
        pass
    assert drawn["a"] == drawn["b"]
    assert drawn["a"][0] != drawn["a"][1]
    assert (random.random(), float(numpy.random.rand()), float(torch.rand(()))) == expected
