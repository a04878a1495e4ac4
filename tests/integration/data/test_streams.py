"""Calibration from streams and workers, with hooks of data and module, and limits of the trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import (
    DataLoader,
    TensorDataset,
)

from com_lightning import MergeDataModule, TaskLoaders
from tests.helpers import Classifier, make_data, make_experts
from tests.helpers.calibration import COUNT, Pairs, Sized, Stream, loader, merge, numbers, ready, values

# Streams


@pytest.mark.parametrize("kind", [Stream, Sized])
def test_a_stream_is_sampled_all_over(kind: type[Stream]) -> None:
    """Whole batches, about as many samples as asked for, not the head, a different one for each seed."""
    chosen = []
    for seed in range(6):
        tasks = ready(DataLoader(kind(), batch_size=5), num_samples=18, seed=seed)
        assert tasks.problems() == []
        sample = tasks.calibration("a")
        assert sample.samples == len(set(values(sample))) == 20
        assert sample.overlap is None
        chosen.append(tuple(sorted(values(sample))))
    assert len(set(chosen)) > 3
    assert any(max(numbers) > 40 for numbers in chosen)
    assert tuple(range(20)) not in chosen


def test_a_stream_is_read_no_further_than_the_limit() -> None:
    stream = Stream(10**9)
    sample = ready(DataLoader(stream, batch_size=5), num_samples=10).calibration("a", 4)
    assert stream.read <= 25
    assert set(values(sample)) <= set(range(20))


def test_a_stream_of_whole_batches() -> None:
    """``batch_size=None``: the dataset makes the batches."""
    rows = numbers().reshape(10, 5)
    sample = ready(DataLoader(rows, batch_size=None), num_samples=10).calibration("a")  # type: ignore[arg-type]
    assert sample.samples == 10
    assert all(batch.shape == (5,) for batch, _ in sample.batches)


def test_a_stream_in_a_merge() -> None:
    tasks: dict[str, LightningDataModule] = {n: TaskLoaders(val=DataLoader(Pairs(), batch_size=8)) for n in "ab"}
    callback, _ = merge(MergeDataModule(tasks, num_samples=16))
    assert callback.report.samples == {"a": 16, "b": 16}
    assert callback.report.overlap == {"a": None, "b": None}
    assert "perhaps validated on data that the merge has seen" in callback.report.summary()


# Settings


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"num_samples": 0}, "data.num_samples: must be 1 or more, got 0"),
        ({"batch_size": 0}, "data.batch_size: must be 1 or more, got 0"),
        ({"holdout": True, "split": "train"}, "data.holdout: there is nothing to hold out"),
        ({"holdout": True, "num_samples": COUNT}, f"task 'a': all {COUNT} samples would be held out"),
        ({"split": "train", "train": None}, "task 'a': its train loader is empty"),
        ({"val": loader(0)}, "task 'a': its val loader is empty"),
        ({"val": None}, "task 'a': its val loader is empty"),
        ({"val": []}, "task 'a': its val loader is empty"),
        ({"val": DataLoader(Stream(), batch_size=4), "holdout": True}, "task 'a': samples of an iterable dataset"),
    ],
)
def test_settings_that_cannot_be(kwargs: dict[str, Any], told: str) -> None:
    found = ready(**{"val": loader(), "train": loader(), **kwargs}).problems()
    assert len(found) == 1, found
    assert found[0].startswith(told)


def test_a_datamodule_without_the_loader() -> None:
    tasks = MergeDataModule({"a": LightningDataModule()}, num_samples=5)
    assert tasks.problems()[0].startswith("task 'a': its datamodule gives no loader")
    assert MergeDataModule({}).problems() == ["data.tasks: no task is given"]


def test_tasks_are_prepared_and_set_up_once_per_stage() -> None:
    calls: list[str] = []

    class Data(LightningDataModule):
        def prepare_data(self) -> None:
            calls.append("prepare")

        def setup(self, stage: str) -> None:
            assert self.trainer is not None
            calls.append(stage)

        def val_dataloader(self) -> Any:
            return make_data().val_dataloader()

        def train_dataloader(self) -> Any:
            return make_data().train_dataloader()

    merge(MergeDataModule({"a": Data(), "b": Data()}, num_samples=8, split="train"))
    assert calls == ["prepare", "prepare", "validate", "validate", "fit", "fit"]


# Workers


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_persistent_workers_lose_no_batch(kind: str) -> None:
    """Their one iterator is already in use for validation when the merge reads calibration data."""

    def run(**workers: Any) -> tuple[Any, Any]:
        def data() -> TaskLoaders:
            dataset: Any = Pairs() if kind == "stream" else make_data(count=40).val_dataloader().dataset
            return TaskLoaders(val=DataLoader(dataset, batch_size=8, **workers))

        callback, logged = merge(MergeDataModule({"a": data(), "b": data()}, num_samples=16))
        return callback.report.metrics, logged

    metrics, logged = run()
    with_workers, logged_with_workers = run(num_workers=1, persistent_workers=True)
    assert with_workers == metrics
    assert logged_with_workers == logged
    assert metrics["merged"]["a"].items() <= logged[0].items()


# Transfer hooks


def shift(batch: Any, by: float) -> Any:
    return [batch[0] + by, batch[1]]


class Raw(TaskLoaders):
    """Its samples are normalised by its own hooks only."""

    def __init__(self, seed: int, **kwargs: Any) -> None:
        inputs, labels = make_data(seed).val_dataloader().dataset.tensors
        data = TensorDataset(inputs * 50 + 7, labels)
        super().__init__(val=DataLoader(data, batch_size=16), train=DataLoader(data, batch_size=16))
        self.calls: list[str] = []

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("before")
        return shift(batch, -7)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.calls.append("transfer")
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.calls.append("after")
        return [batch[0] / 50, batch[1]]


def same_merge(callback: Any, expected: Any) -> None:
    for task, module in expected.modules.items():
        ours, theirs = dict(callback.modules[task].named_parameters()), dict(module.named_parameters())
        for name, parameter in theirs.items():
            torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-5)
    for kind, tasks in expected.report.metrics.items():
        for task, metrics in tasks.items():
            assert callback.report.metrics[kind][task] == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("raw", ["a", "b", "ab"])
def test_hooks_of_a_task_are_used_throughout(raw: str) -> None:
    """In calibration, in Lightning's own pass over the first task, and in the validation of each: one task may have
    hooks that another lacks, and the result is that of data normalised beforehand."""

    def tasks(raw: str) -> MergeDataModule:
        return MergeDataModule({n: Raw(s) if n in raw else make_data(s) for s, n in enumerate("ab")}, num_samples=32)

    expected, logged = merge(tasks(""))
    data = tasks(raw)
    callback, logged_with_hooks = merge(data)
    same_merge(callback, expected)
    assert logged_with_hooks[0] == pytest.approx(logged[0], rel=1e-4)
    metrics = expected.report.metrics["merged"]["a"]
    assert {name: logged[0][name] for name in metrics} == pytest.approx(metrics)
    for name in raw:
        own = data.tasks[name]
        assert isinstance(own, Raw)
        # 2 batches of calibration, 4 of each of 3 validations, and Lightning's own pass over the first task.
        assert own.calls == ["before", "transfer", "after"] * (2 + 3 * 4 + 4 * (name == "a"))


class Normalising(Classifier):
    """A module that normalises its batches itself."""

    calls = 0

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return shift(batch, -7)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        Normalising.calls += 1
        return [batch[0] / 50, batch[1]]


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_hooks_of_the_module_are_used_throughout() -> None:
    expected, _ = merge(MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=32))
    experts = {}
    for name, expert in zip("ab", make_experts((3, 3))):
        experts[name] = Normalising()
        experts[name].load_state_dict(expert.state_dict())
    tasks = MergeDataModule({n: TaskLoaders(val=Raw(s).val_dataloader()) for s, n in enumerate("ab")}, num_samples=32)
    Normalising.calls = 0
    callback, logged = merge(tasks, Normalising(), experts)
    same_merge(callback, expected)
    metrics = expected.report.metrics["merged"]["a"]
    assert {name: logged[0][name] for name in metrics} == pytest.approx(metrics, rel=1e-4)
    assert Normalising.calls == 2 * 2 + 4 + 2 * 3 * 4


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_hooks_of_the_data_take_precedence() -> None:
    """As in Lightning: a hook of the datamodule replaces that of the module."""
    expected, _ = merge(MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=32))
    experts = {}
    for name, expert in zip("ab", make_experts((3, 3))):
        experts[name] = Normalising()
        experts[name].load_state_dict(expert.state_dict())
    Normalising.calls = 0
    callback, _ = merge(MergeDataModule({"a": Raw(0), "b": Raw(1)}, num_samples=32), Normalising(), experts)
    same_merge(callback, expected)
    assert Normalising.calls == 0


# Limits of the trainer


@pytest.mark.parametrize(
    ("kwargs", "samples"),
    [
        ({"fast_dev_run": True}, 16),
        ({"fast_dev_run": 2}, 32),
        ({"limit_val_batches": 1}, 16),
        ({"limit_val_batches": 0.5}, 32),
        ({"limit_val_batches": 1.0}, 60),
        ({"limit_train_batches": 1}, 60),
    ],
)
def test_limits_of_the_trainer(kwargs: dict[str, Any], samples: int) -> None:
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=60)
    callback, _ = merge(tasks, **kwargs)
    assert callback.report.samples == {"a": samples, "b": samples}
    for task, overlap in callback.report.overlap.items():
        sample, head = tasks.calibration(task, kwargs.get("limit_val_batches")), samples
        assert 0 < overlap <= head
        if "limit_val_batches" in kwargs:
            assert sample.overlap == overlap


@pytest.mark.parametrize(("limit", "samples"), [({"limit_train_batches": 2}, 32), ({"limit_val_batches": 1}, 60)])
def test_limits_of_the_train_split(limit: dict[str, Any], samples: int) -> None:
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=60, split="train")
    callback, _ = merge(tasks, **limit)
    assert callback.report.samples == {"a": samples, "b": samples}
    assert callback.report.overlap == {"a": 0, "b": 0}
