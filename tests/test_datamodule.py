"""Calibration samples, what is held out for them, and the task's own loaders and transfer hooks."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from com_lightning import ChainOfMergesCallback, MergeDataModule, TaskLoaders
from com_lightning.datamodule import CalibrationSample
from tests.helpers import FEATURES, Classifier, make_data, make_experts, quiet_trainer

COUNT = 50


class Stream(IterableDataset[Tensor]):
    """Numbers without a known count."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.read = 0

    def __iter__(self) -> Iterator[Tensor]:
        for number in range(self.count):
            self.read += 1
            yield torch.tensor(number)


class Sized(Stream):
    def __len__(self) -> int:
        return self.count


class Noisy(Dataset[Tensor]):
    """An augmentation at random."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


class Pairs(IterableDataset[Any]):
    """A stream of classifier samples."""

    def __init__(self, count: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(count, FEATURES, generator=generator)
        self.y = torch.randint(3, (count,), generator=generator)

    def __iter__(self) -> Iterator[Any]:
        yield from zip(self.x, self.y)


def numbers(start: int = 0, count: int = COUNT) -> Tensor:
    return torch.arange(start, start + count)


def loader(count: int = COUNT, start: int = 0, batch_size: int = 8, **kwargs: Any) -> DataLoader[Any]:
    """Batches of numbers."""
    return DataLoader(numbers(start, count), batch_size=batch_size, **kwargs)  # type: ignore[arg-type]


def ready(val: Any, train: Any = None, **kwargs: Any) -> MergeDataModule:
    """A datamodule of one task, set up."""
    tasks = MergeDataModule({"a": TaskLoaders(val=val, train=train)}, **kwargs)
    tasks.setup("validate")
    return tasks


def values(sample: CalibrationSample) -> list[int]:
    return [int(number) for batch, _ in sample.batches for number in batch]


def validated(tasks: MergeDataModule, name: str = "a") -> list[int]:
    loaders = tasks.task(name).val_dataloader()
    return [int(n) for part in (loaders if isinstance(loaders, list) else [loaders]) for batch in part for n in batch]


def merge(tasks: MergeDataModule, model: Any = None, experts: Any = None, **kwargs: Any) -> Any:
    """Merge through ``trainer.validate``; the callback, and what ``validate`` returns."""
    experts = experts or dict(zip(tasks.tasks, make_experts([3] * len(tasks.tasks))))
    callback = ChainOfMergesCallback(experts)
    trainer = quiet_trainer(callbacks=[callback], **kwargs)
    return callback, trainer.validate(model or Classifier(), datamodule=tasks, verbose=False)


# The sample


def test_the_sample_is_seeded_and_not_the_head() -> None:
    first, again, other = (values(ready(loader(), samples=20, seed=s).calibration("a")) for s in (0, 0, 1))
    assert first == again
    assert set(first) != set(other)
    assert first != list(range(20))
    assert sorted(first) != list(range(20))
    assert len(set(first)) == 20
    assert set(first) <= set(range(COUNT))


def test_the_sample_is_spread_over_the_data() -> None:
    """Every sample is drawn about equally often: 50 ± 6 of 200 seeds, where heads would give 200 and 0."""
    drawn = torch.zeros(20)
    for seed in range(200):
        drawn[values(ready(loader(20), samples=5, seed=seed).calibration("a"))] += 1
    assert drawn.sum() == 1000
    assert drawn.min() > 20
    assert drawn.max() < 85


def test_tasks_draw_differently() -> None:
    tasks = MergeDataModule({name: TaskLoaders(val=loader()) for name in "ab"}, samples=20)
    assert values(tasks.calibration("a")) != values(tasks.calibration("b"))


@pytest.mark.parametrize(
    "make",
    [
        loader,
        lambda: loader(shuffle=True),
        lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(3)),
        lambda: loader(sampler=WeightedRandomSampler([1.0] * COUNT, 30)),
        lambda: DataLoader(Stream(), batch_size=4),
        lambda: DataLoader(Noisy(), batch_size=4),
    ],
    ids=["plain", "shuffled", "shuffled, own generator", "weighted", "stream", "augmented"],
)
def test_the_sample_and_the_global_random_state_are_independent(make: Callable[[], DataLoader[Any]]) -> None:
    tasks = ready(make(), samples=12)
    batches = []
    for seed in (0, 123):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        batches.append([batch for batch, _ in tasks.calibration("a").batches])
        assert tasks.problems() == []
        tasks.task("a").val_dataloader()
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1]
        assert str(np.random.get_state()) == states[2]
    torch.testing.assert_close(batches[0], batches[1], rtol=0, atol=0)


def test_the_generator_of_a_loader_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(3)
    tasks = ready(loader(shuffle=True, generator=generator), samples=5)
    before = generator.get_state()
    tasks.problems()
    tasks.calibration("a")
    assert torch.equal(generator.get_state(), before)


def test_more_samples_than_there_are() -> None:
    sample = ready(loader(10), samples=100).calibration("a")
    assert sorted(values(sample)) == list(range(10))
    assert sample.samples == 10


@pytest.mark.parametrize("source", ["val", "train"])
def test_the_source(source: Any) -> None:
    sample = ready(loader(), loader(start=100, shuffle=True), samples=20, source=source).calibration("a")
    assert all((value >= 100) == (source == "train") for value in values(sample))
    assert sample.overlap == (20 if source == "val" else 0)
    assert sample.samples == len(values(sample)) == 20


@pytest.mark.parametrize("size", [None, 1, 7])
def test_the_batch_size(size: int | None) -> None:
    """Overriding it changes the batches, not the sample."""
    sample = ready(loader(), samples=20, batch_size=size).calibration("a")
    assert [len(batch) for batch, _ in sample.batches][:-1] == [size or 8] * (
        20 // (size or 8) - (20 % (size or 8) == 0)
    )
    assert values(sample) == values(ready(loader(), samples=20).calibration("a"))


def test_the_collate_function_is_kept() -> None:
    def collate(samples: list[Tensor]) -> dict[str, Any]:
        return {"numbers": torch.stack(samples), "count": len(samples)}

    data = loader(collate_fn=collate)
    for holdout in (False, True):
        tasks = ready(data, samples=10, holdout=holdout)
        batches = [batch for batch, _ in tasks.calibration("a").batches]
        assert [batch["count"] for batch in batches] == [8, 2]
        assert all(len(batch["numbers"]) == batch["count"] for batch in batches)
        assert all(set(batch) == {"numbers", "count"} for batch in tasks.task("a").val_dataloader())


def test_samples_are_read_only_once() -> None:
    """Of a large dataset only the calibration samples are read."""
    read: list[int] = []

    class Recorded(Dataset[Tensor]):
        def __len__(self) -> int:
            return 1000

        def __getitem__(self, index: int) -> Tensor:
            read.append(index)
            return torch.tensor(index)

    tasks = ready(DataLoader(Recorded(), batch_size=8), samples=10, holdout=True)
    assert tasks.problems() == []
    assert read == []
    assert values(tasks.calibration("a")) == read
    assert len(read) == 10


# Several loaders


@pytest.mark.parametrize("kind", ["list", "dict", "tuple"])
def test_several_loaders(kind: str) -> None:
    """The sample is drawn from all of them, and every batch knows its loader."""
    parts = [loader(30), loader(60, start=100)]
    given: Any = {"list": parts, "dict": dict(zip("xy", parts)), "tuple": tuple(parts)}[kind]
    tasks = ready(given, samples=30)
    assert tasks.problems() == []
    sample = tasks.calibration("a")
    assert sample.samples == sample.overlap == len(set(values(sample))) == 30
    counts = [0, 0]
    for batch, index in sample.batches:
        assert all((int(number) >= 100) == (index == 1) for number in batch)
        counts[index] += len(batch)
    assert 3 <= counts[0] <= 17  # about a third


def test_several_loaders_with_holdout() -> None:
    tasks = ready([loader(30), loader(60, start=100)], samples=30, holdout=True)
    held_out = values(tasks.calibration("a"))
    assert sorted(held_out + validated(tasks)) == [*range(30), *range(100, 160)]
    parts = tasks.task("a").val_dataloader()
    assert [all(int(n) >= 100 for batch in part for n in batch) for part in parts] == [False, True]


@pytest.mark.filterwarnings("ignore:.*fine-tuned from the same base")
def test_several_loaders_in_a_merge() -> None:
    class TwoLoaders(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            assert batch[1].dtype == torch.int64
            assert bool((batch[0][:, 0] > 50).all()) == (dataloader_idx == 1)
            self.log("loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    x, y = torch.randn(20, FEATURES), torch.randint(3, (20,))
    shifted = x + 100 * torch.eye(FEATURES)[0]
    parts = [DataLoader(TensorDataset(inputs, y), batch_size=5) for inputs in (x, shifted)]
    tasks = MergeDataModule({"a": TaskLoaders(val=parts), "b": TaskLoaders(val=parts)}, samples=10)
    callback, logged = merge(tasks, TwoLoaders(), {"a": TwoLoaders(), "b": TwoLoaders()})
    assert set(callback.report.metrics["merged"]["a"]) == {"loss/dataloader_idx_0", "loss/dataloader_idx_1"}
    assert {k: v for part in logged for k, v in part.items()} == pytest.approx(callback.report.metrics["merged"]["a"])


# Held-out and overlap


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [49, 50])
def test_what_is_held_out_is_not_validated(shuffle: bool, count: int) -> None:
    tasks = ready(loader(count, shuffle=shuffle), samples=20, holdout=True)
    sample = tasks.calibration("a")
    assert sample.overlap == 0
    assert not set(values(sample)) & set(validated(tasks))
    assert sorted(values(sample) + validated(tasks)) == list(range(count))
    assert sample.samples == 20


def test_validated_samples_keep_their_order() -> None:
    tasks = ready(loader(), samples=20, holdout=True)
    assert validated(tasks) == sorted(validated(tasks))
    assert [len(batch) for batch in tasks.task("a").val_dataloader()] == [8, 8, 8, 6]


def test_without_holdout_the_loader_is_the_users_own() -> None:
    own = loader(shuffle=True)
    assert ready(own).task("a").val_dataloader() is own


def grouped(count: int = COUNT) -> DataLoader[Any]:
    """Batches of 10 and of 2 in turn."""
    groups: list[list[int]] = []
    start = 0
    while start < count:
        size = 2 if len(groups) % 2 else 10
        groups.append(list(range(start, min(start + size, count))))
        start += size
    return DataLoader(numbers(count=count), batch_sampler=groups)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [loader, grouped, lambda: loader(drop_last=True)], ids=["plain", "grouped", "drop"])
@pytest.mark.parametrize("limit", [None, 1, 3, 0.5, 1.0])
def test_the_overlap_is_counted(make: Callable[[], DataLoader[Any]], limit: int | float | None) -> None:
    """By what the loader really gives in the batches that are validated."""
    data = make()
    sample = ready(data, samples=30).calibration("a", limit)
    number = limit if isinstance(limit, int) else int((limit or 1.0) * len(data))
    seen = {int(n) for _, batch in zip(range(number), data) for n in batch}
    assert sample.overlap == len(set(values(sample)) & seen)
    assert limit in (None, 1.0) or len(sample.batches) <= number


def test_grouped_batches_are_kept_in_what_is_validated() -> None:
    """A batch sampler of the user may group what can be collated."""
    tasks = ready(grouped(), samples=5, holdout=True)
    held_out = set(values(tasks.calibration("a")))
    expected = [[n for n in batch.tolist() if n not in held_out] for batch in grouped()]
    assert [batch.tolist() for batch in tasks.task("a").val_dataloader()] == [group for group in expected if group]


@pytest.mark.parametrize(
    ("make", "limit"),
    [
        (lambda: loader(shuffle=True), 2),
        (lambda: loader(sampler=WeightedRandomSampler([1.0] * COUNT, 30)), None),
        (lambda: DataLoader(numbers(), batch_sampler=BatchSampler(RandomSampler(numbers()), 8, False)), 2),  # type: ignore[arg-type]
        (lambda: DataLoader(Stream(), batch_size=4), None),
    ],
    ids=["shuffled", "weighted", "shuffled batch sampler", "stream"],
)
def test_an_overlap_that_cannot_be_known(make: Callable[[], DataLoader[Any]], limit: int | None) -> None:
    sample = ready(make(), samples=10).calibration("a", limit)
    assert sample.overlap is None
    assert sample.samples > 0


def test_a_shuffled_loader_overlaps_wholly() -> None:
    assert ready(loader(shuffle=True), samples=10).calibration("a").overlap == 10


def test_a_custom_batch_sampler() -> None:
    plain = BatchSampler(SequentialSampler(numbers()), 8, drop_last=False)
    for data in (DataLoader(numbers(), batch_sampler=plain), grouped()):  # type: ignore[arg-type]
        sample = ready(data, samples=20).calibration("a")
        assert sample.samples == len(set(values(sample))) == 20
        assert values(sample) == values(ready(loader(), samples=20).calibration("a"))


@pytest.mark.parametrize("limit", [1, 2, 0.5])
def test_the_limit_bounds_the_calibration_batches(limit: int | float) -> None:
    sample = ready(loader(), samples=COUNT).calibration("a", limit)
    assert len(sample.batches) == (limit if isinstance(limit, int) else 3)
    assert sample.samples == 8 * len(sample.batches)


# Streams


@pytest.mark.parametrize("kind", [Stream, Sized])
def test_a_stream_is_sampled_all_over(kind: type[Stream]) -> None:
    """Whole batches, about as many samples as asked for, not the head, a different one for each seed."""
    chosen = []
    for seed in range(6):
        tasks = ready(DataLoader(kind(), batch_size=5), samples=18, seed=seed)
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
    sample = ready(DataLoader(stream, batch_size=5), samples=10).calibration("a", 4)
    assert stream.read <= 25
    assert set(values(sample)) <= set(range(20))


def test_a_stream_of_whole_batches() -> None:
    """``batch_size=None``: the dataset makes the batches."""
    rows = numbers().reshape(10, 5)
    sample = ready(DataLoader(rows, batch_size=None), samples=10).calibration("a")  # type: ignore[arg-type]
    assert sample.samples == 10
    assert all(batch.shape == (5,) for batch, _ in sample.batches)


def test_a_stream_in_a_merge() -> None:
    tasks: dict[str, LightningDataModule] = {n: TaskLoaders(val=DataLoader(Pairs(), batch_size=8)) for n in "ab"}
    callback, _ = merge(MergeDataModule(tasks, samples=16))
    assert callback.report.samples == {"a": 16, "b": 16}
    assert callback.report.overlap == {"a": None, "b": None}
    assert "not known" in callback.report.summary()


# Settings


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"samples": 0}, "data.samples: must be 1 or more, got 0"),
        ({"batch_size": 0}, "data.batch_size: must be 1 or more, got 0"),
        ({"holdout": True, "source": "train"}, "data.holdout: there is nothing to hold out"),
        ({"holdout": True, "samples": COUNT}, f"task 'a': all {COUNT} samples would be held out"),
        ({"source": "train", "train": None}, "task 'a': its train loader is empty"),
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
    tasks = MergeDataModule({"a": LightningDataModule()}, samples=5)
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

    merge(MergeDataModule({"a": Data(), "b": Data()}, samples=8, source="train"))
    assert calls == ["prepare", "prepare", "validate", "validate", "fit", "fit"]


# Workers


@pytest.mark.parametrize("kind", ["map", "stream"])
def test_persistent_workers_lose_no_batch(kind: str) -> None:
    """Their one iterator is already in use for validation when the merge reads calibration data."""

    def run(**workers: Any) -> tuple[Any, Any]:
        def data() -> TaskLoaders:
            dataset: Any = Pairs() if kind == "stream" else make_data(count=40).val_dataloader().dataset
            return TaskLoaders(val=DataLoader(dataset, batch_size=8, **workers))

        callback, logged = merge(MergeDataModule({"a": data(), "b": data()}, samples=16))
        return callback.report.metrics, logged

    metrics, logged = run()
    with_workers, logged_with_workers = run(num_workers=1, persistent_workers=True)
    assert with_workers == metrics
    assert logged_with_workers == logged
    assert logged[0] == metrics["merged"]["a"]


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
        return MergeDataModule({n: Raw(s) if n in raw else make_data(s) for s, n in enumerate("ab")}, samples=32)

    expected, logged = merge(tasks(""))
    data = tasks(raw)
    callback, logged_with_hooks = merge(data)
    same_merge(callback, expected)
    assert logged_with_hooks[0] == pytest.approx(logged[0], rel=1e-4)
    assert logged[0] == pytest.approx(expected.report.metrics["merged"]["a"])
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
    expected, _ = merge(MergeDataModule({"a": make_data(0), "b": make_data(1)}, samples=32))
    experts = {}
    for name, expert in zip("ab", make_experts((3, 3))):
        experts[name] = Normalising()
        experts[name].load_state_dict(expert.state_dict())
    tasks = MergeDataModule({n: TaskLoaders(val=Raw(s).val_dataloader()) for s, n in enumerate("ab")}, samples=32)
    Normalising.calls = 0
    callback, logged = merge(tasks, Normalising(), experts)
    same_merge(callback, expected)
    assert logged[0] == pytest.approx(expected.report.metrics["merged"]["a"], rel=1e-4)
    assert Normalising.calls == 2 * 2 + 4 + 2 * 3 * 4


@pytest.mark.filterwarnings("ignore:You have overridden")
def test_hooks_of_the_data_take_precedence() -> None:
    """As in Lightning: a hook of the datamodule replaces that of the module."""
    expected, _ = merge(MergeDataModule({"a": make_data(0), "b": make_data(1)}, samples=32))
    experts = {}
    for name, expert in zip("ab", make_experts((3, 3))):
        experts[name] = Normalising()
        experts[name].load_state_dict(expert.state_dict())
    Normalising.calls = 0
    callback, _ = merge(MergeDataModule({"a": Raw(0), "b": Raw(1)}, samples=32), Normalising(), experts)
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
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, samples=60)
    callback, _ = merge(tasks, **kwargs)
    assert callback.report.samples == {"a": samples, "b": samples}
    for task, overlap in callback.report.overlap.items():
        sample, head = tasks.calibration(task, kwargs.get("limit_val_batches")), samples
        assert 0 < overlap <= head
        if "limit_val_batches" in kwargs:
            assert sample.overlap == overlap


@pytest.mark.parametrize(("limit", "samples"), [({"limit_train_batches": 2}, 32), ({"limit_val_batches": 1}, 60)])
def test_limits_of_the_train_source(limit: dict[str, Any], samples: int) -> None:
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, samples=60, source="train")
    callback, _ = merge(tasks, **limit)
    assert callback.report.samples == {"a": samples, "b": samples}
    assert callback.report.overlap == {"a": 0, "b": 0}
