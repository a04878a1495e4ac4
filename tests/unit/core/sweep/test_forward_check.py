"""Forwards that are not those of the user's module are found before a merge, and others pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.forward_check import ForwardCheck, check_forwards
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.errors import MergeError
from tests.helpers import perturb
from tests.helpers.zoo import make_experts, run


class Net(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor] = lambda self, x: x) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(4, 4), nn.Linear(4, 2), between
        self.other = [torch.full_like(p, 0.5) for p in (self.first.weight, self.last.weight)]

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x).relu()))  # type: ignore[no-any-return]


def tasks(make: Callable[[], nn.Module], **settings: Any) -> list[Task]:
    torch.manual_seed(0)
    experts = [perturb(make(), seed=number).eval().requires_grad_(False) for number in range(2)]
    batches = [[torch.randn(6, 4) for _ in range(3)] for _ in experts]
    return [Task(f"task{n}", e, b, **settings) for n, (e, b) in enumerate(zip(experts, batches))]


def check(tasks: list[Task], shortened: Callable[[Any], Any] = lambda batch: batch[:2]) -> ForwardCheck:
    merged = {name: tensor for name, tensor, _ in named_tensors(tasks[0].expert) if tensor.is_floating_point()}
    return check_forwards(tasks, merged, Context(), shortened)


def problems(tasks: list[Task]) -> list[str]:
    before = [{name: tensor.clone() for name, tensor, _ in named_tensors(task.expert)} for task in tasks]
    with pytest.raises(MergeError) as caught:
        check(tasks)
    for task, values in zip(tasks, before):
        assert all(torch.equal(tensor, values[name]) for name, tensor, _ in named_tensors(task.expert))
    return caught.value.problems


def test_ordinary_forwards_pass() -> None:
    made, state = tasks(Net), torch.get_rng_state()
    result = check(made)
    assert (result.layers, result.tasks, result.unchecked, result.warnings) == (2, ["task0", "task1"], {}, [])
    assert str(result) == "compared with plain forwards of all 2 tasks, at 2 layers"
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["resnet18", "Mixtral", "LSTM", "TransformerEncoder"])
def test_architectures_pass(name: str) -> None:
    experts, batches = make_experts(name)
    values = {name: tensor for name, tensor, _ in named_tensors(experts[0]) if tensor.is_floating_point()}
    zoo = [Task(f"task{n}", e, b, run) for n, (e, b) in enumerate(zip(experts, batches))]
    result = check_forwards(zoo, values, Context())
    assert result.tasks == ["task0", "task1"]
    assert not result.warnings


def dropout(self: Net, x: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True) * float(numpy.random.rand())


def by_content(self: Net, x: Tensor) -> Tensor:
    return self.first(x) if float(x.sum()) > 3 else x


def idempotent(self: Net, x: Tensor) -> Tensor:
    self.last.weight.data.clamp_(-100, 100)
    return x


def with_own_weights(self: Net, x: Tensor) -> Tensor:
    weights = {name: tensor.detach().clone() for name, tensor in self.first.named_parameters()}
    return torch.func.functional_call(self.first, weights, (x,))  # type: ignore[no-any-return]


@pytest.mark.parametrize("between", [dropout, by_content, idempotent, with_own_weights])
def test_what_is_unusual_but_right_passes(between: Callable[[Any, Tensor], Tensor]) -> None:
    assert check(tasks(lambda: Net(between))).tasks == ["task0", "task1"]


KEPT: list[Tensor] = []


class Global(Net):
    """Keeps the output of its first layer in a global variable."""

    def forward(self, x: Tensor) -> Tensor:
        KEPT[:] = [self.first(x)]
        middle = self.last(KEPT[0])
        return self.last(KEPT[0]) + middle  # type: ignore[no-any-return]


class Mixed(Global):
    def __init__(self) -> None:
        super().__init__()
        self.third = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        return self.third(KEPT[0])  # type: ignore[no-any-return]


def test_forwards_that_share_something_are_an_error() -> None:
    first, *_ = problems(tasks(Mixed))
    assert first.startswith("task 'task0': layer 'third' of Mixed gets the inputs of another calibration batch")
    assert "calibration_step(batch)" in first


SHAPES: list[int] = []


class Fragile(Net):
    """Fails only if other forwards run in between."""

    def forward(self, x: Tensor) -> Tensor:
        SHAPES.append(1)
        try:
            x = self.first(x)
            if len(SHAPES) > 1:
                raise KeyError("taken")
        finally:
            SHAPES.pop()
        return self.last(x)  # type: ignore[no-any-return]


def test_forwards_that_fail_in_lockstep_alone_are_an_error() -> None:
    (problem,) = problems(tasks(Fragile))
    assert problem.startswith("calibration forwards disturb each other: by itself, none of them fails")
    assert "KeyError" in problem
    assert "task 'task" in problem


def unseeded(self: Net, x: Tensor) -> Tensor:
    return x + torch.from_numpy(numpy.random.default_rng().normal(size=x.shape)).float()


def test_random_numbers_that_nobody_seeds_are_an_error() -> None:
    found = problems(tasks(lambda: Net(unseeded)))
    assert all("gets other inputs when a calibration batch runs a second time" in problem for problem in found)
    assert len(found) == 2


@contextmanager
def swapped(self: Net) -> Iterator[None]:
    weights = (self.first.weight, self.last.weight)
    kept = [weight.clone() for weight in weights]
    for weight, value in zip(weights, self.other):
        weight.data.copy_(value)
    try:
        yield
    finally:
        for weight, value in zip(weights, kept):
            weight.data.copy_(value)


def swap(self: Net) -> None:
    torch._foreach_copy_([self.first.weight, self.last.weight], self.other)


def replaced_data(self: Net) -> None:
    self.first.weight.data, self.last.weight.data = self.other


def replaced_parameters(self: Net) -> None:
    self.last.weight = nn.Parameter(self.other[1])


class Swapping(Net):
    def forward(self, x: Tensor) -> Tensor:
        with swapped(self):
            return super().forward(x)


@pytest.mark.parametrize("way", [swap, replaced_data, replaced_parameters])
@pytest.mark.parametrize("where", ["before its calibration forwards", "in its calibration forward"])
def test_other_weights_are_an_error_and_the_experts_stay_as_they_were(way: Callable[[Net], None], where: str) -> None:
    def call(module: Any, batch: Any, index: int) -> None:
        way(module)
        module(batch)

    before = where.startswith("before")
    found = problems(tasks(Net, prepare=way) if before else tasks(Net, call=call))
    assert [problem.partition(":")[0] for problem in found] == ["task 'task0'", "task 'task1'"]
    assert "Net computes with other weights than the expert's" in found[0]
    if way is swap:
        assert f"is changed {where}" in found[0]


def test_weights_that_are_swapped_for_a_while_are_an_error() -> None:
    assert "'first.weight' is changed in its calibration forward" in problems(tasks(Swapping))[0]


def test_what_comes_before_the_forwards_does_not_count_as_a_call() -> None:
    def prepare(module: Any) -> None:
        module.bank = module.first(torch.full((1, 4), 7.0))

    def call(module: Any, batch: Any, index: int) -> None:
        assert module.bank.shape == (1, 4)
        module(batch)

    assert check(tasks(Net, prepare=prepare, call=call)).layers == 2


def test_what_cannot_be_copied_is_told() -> None:
    made = tasks(Net)
    made[1].expert.lock = threading.Lock()  # type: ignore[assignment]
    (warning,) = check(made).warnings
    assert warning.startswith("task 'task1': all calibration forwards share what is not copied: lock (a lock): ")


def count(self: Any, x: Tensor) -> Tensor:
    self.seen += len(x)
    return x


def test_buffers_that_are_written_are_told() -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__(count)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    made = tasks(Counting)
    first, _ = check(made).warnings
    assert first.startswith("task 'task0': calibration forwards write to the buffers seen, which all forwards")


def test_a_batch_that_cannot_be_shortened_is_taken_whole() -> None:
    def call(module: Any, batch: Any, index: int) -> None:
        module(batch.view(6, 4))

    assert check(tasks(Net, call=call)).tasks == ["task0", "task1"]


def test_a_task_whose_forward_fails_is_left_to_the_merge() -> None:
    def call(module: Any, batch: Any, index: int) -> None:
        raise RuntimeError("my own bug")

    first, second = tasks(Net)
    first.call = call
    result = check([first, second])
    assert result.tasks == ["task1"]
    assert result.unchecked == {"task0": "batch 0 raises RuntimeError"}
    assert str(result).endswith("of 1 of 2 tasks, at 2 layers; not of 'task0', batch 0 raises RuntimeError")


def test_a_second_batch_that_fails_is_no_problem() -> None:
    def call(module: Any, batch: Any, index: int) -> None:
        if index:
            raise RuntimeError("a bad batch")
        module(batch)

    assert check(tasks(Net, call=call)).tasks == ["task0", "task1"]
