"""What a merge makes sure of before its first layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from com_lightning import Average, ChainOfMerges, MergeDataModule, MergeError, TaskLoaders, merge
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import Task
from com_lightning.data.sampling import CalibrationSample
from com_lightning.execution import _require_agreement
from com_lightning.options import MergeOptions
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer
from tests.helpers.zoo import averages

SAMPLES = {name: CalibrationSample([], [], 1, 40, 0) for name in "ab"}


class Two(Peers):
    """This process, and another one that says what it is told to."""

    size = 2

    def __init__(self, change: dict[str, str]) -> None:
        self.change = change

    def exchange(self, value: Any) -> list[Any]:
        return [value, {**value, **self.change}]


def agree(change: dict[str, str]) -> None:
    tasks = [Task(name, expert, []) for name, expert in zip("ab", make_experts())]
    _require_agreement(tasks, SAMPLES, {"method": Average().describe(), "version of torch": "2.14"}, None, Two(change))


@pytest.mark.parametrize(
    "name", ["order of tasks", "number of samples of 'a'", "method", "version of torch", "expert 'b'", "only there"]
)
def test_processes_that_differ_stop_before_the_first_layer(name: str) -> None:
    agree({})
    with pytest.raises(MergeError, match=rf"process 1 of 2 differs from process 0 in {name}; start all"):
        agree({name: "another"})


def test_other_experts_are_noticed_by_a_few_of_their_values() -> None:
    said: list[dict[str, str]] = []

    class Listening(Two):
        def exchange(self, value: Any) -> list[Any]:
            said.append(value)
            return [value, value]

    experts = make_experts()
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        tasks = [Task("a", Classifier(3), []), Task("b", experts[1], [])]
        _require_agreement(tasks, SAMPLES, {}, None, Listening({}))
    assert said[0] == said[1]
    assert {name for name in said[0] if said[0][name] != said[2][name]} == {"expert 'a'"}


def test_two_threads_do_not_merge_at_once() -> None:
    experts = [torch.nn.Linear(3, 3) for _ in range(2)]
    inside, go_on, errors = threading.Event(), threading.Event(), list[BaseException]()

    def waits(module: torch.nn.Module, batch: torch.Tensor, index: int) -> None:
        inside.set()
        assert go_on.wait(60)
        module(batch)

    tasks = [Task(str(n), expert, [torch.randn(4, 3)]) for n, expert in enumerate(experts)]
    slow = [replace(task, call=waits) for task in tasks]

    def merge_these(these: list[Task]) -> dict[str, torch.Tensor]:
        merged = averages(experts)
        merge_layers(these, merged, [0.5, 0.5], ChainOptions())
        return merged

    def other() -> None:
        try:
            merge_these(slow)
        except BaseException as error:
            errors.append(error)

    alone = merge_these(tasks)
    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(60)
    with pytest.raises(RuntimeError, match="another thread of this process is merging"):
        merge_these(tasks)
    go_on.set()
    thread.join(60)
    assert not errors
    again = merge_these(tasks)  # and afterwards all is as before
    assert all(torch.equal(again[name], value) for name, value in alone.items())


class Nothing(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


def test_a_task_without_a_batch_is_an_error() -> None:
    data = MergeDataModule({"a": make_data(0), "b": TaskLoaders(val=DataLoader(Nothing()))}, num_samples=8)
    with pytest.raises(MergeError, match="task 'b': its loader gives no batch to calibrate on"):
        merge(Classifier(3), dict(zip("ab", make_experts())), data, trainer=quiet_trainer())


def test_values_that_mean_nothing_are_problems() -> None:
    with pytest.raises(MergeError, match=r"target: must be.*\n.*sensitivity: must be"):
        ChainOfMerges(target="x", sensitivity="all")  # type: ignore[arg-type]
    assert MergeOptions(output_dir=" ").problems() == ["output_dir: is empty; name a folder, or leave it out"]
    assert not ChainOfMerges().problems(["a"])
    assert not MergeOptions().problems()
