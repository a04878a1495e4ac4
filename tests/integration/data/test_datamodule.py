"""Calibration samples, what is held out for them, and the task's own loaders and transfer hooks."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from com_lightning import MergeDataModule, TaskLoaders
from tests.helpers import FEATURES, Classifier, PointsData, quiet_trainer
from tests.helpers.calibration import COUNT, Stream, loader, merge, numbers, ready, values


class Noisy(Dataset[Tensor]):
    """An augmentation at random."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor([float(index), float(torch.rand(()))])


def validated(tasks: MergeDataModule, name: str = "a") -> list[int]:
    loaders = tasks.task(name).val_dataloader()
    return [int(n) for part in (loaders if isinstance(loaders, list) else [loaders]) for batch in part for n in batch]


# The sample


def test_the_sample_is_seeded_and_not_the_head() -> None:
    first, again, other = (values(ready(loader(), num_samples=20, seed=s).calibration("a")) for s in (0, 0, 1))
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
        drawn[values(ready(loader(20), num_samples=5, seed=seed).calibration("a"))] += 1
    assert drawn.sum() == 1000
    assert drawn.min() > 20
    assert drawn.max() < 85


def test_tasks_draw_differently() -> None:
    tasks = MergeDataModule({name: TaskLoaders(val=loader()) for name in "ab"}, num_samples=20)
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
    tasks = ready(make(), num_samples=12)
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
    tasks = ready(loader(shuffle=True, generator=generator), num_samples=5)
    before = generator.get_state()
    tasks.problems()
    tasks.calibration("a")
    assert torch.equal(generator.get_state(), before)


def test_more_samples_than_there_are() -> None:
    sample = ready(loader(10), num_samples=100).calibration("a")
    assert sorted(values(sample)) == list(range(10))
    assert sample.samples == 10


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_split(split: Any) -> None:
    tasks = ready(loader(), loader(start=100, shuffle=True), num_samples=20, split=split, holdout=False)
    sample = tasks.calibration("a")
    assert all((value >= 100) == (split == "train") for value in values(sample))
    assert sample.overlap == (20 if split == "val" else 0)
    assert sample.samples == len(values(sample)) == 20


@pytest.mark.parametrize("size", [None, 1, 7])
def test_the_batch_size(size: int | None) -> None:
    """Overriding it changes the batches, not the sample."""
    sample = ready(loader(), num_samples=20, batch_size=size).calibration("a")
    assert [len(batch) for batch, _ in sample.batches][:-1] == [size or 8] * (
        20 // (size or 8) - (20 % (size or 8) == 0)
    )
    assert values(sample) == values(ready(loader(), num_samples=20).calibration("a"))


def test_the_collate_function_is_kept() -> None:
    def collate(samples: list[Tensor]) -> dict[str, Any]:
        return {"numbers": torch.stack(samples), "count": len(samples)}

    data = loader(collate_fn=collate)
    for holdout in (False, True):
        tasks = ready(data, num_samples=10, holdout=holdout)
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

    tasks = ready(DataLoader(Recorded(), batch_size=8), num_samples=10, holdout=True)
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
    tasks = ready(given, num_samples=30, holdout=False)
    assert tasks.problems() == []
    sample = tasks.calibration("a")
    assert sample.samples == sample.overlap == len(set(values(sample))) == 30
    counts = [0, 0]
    for batch, index in sample.batches:
        assert all((int(number) >= 100) == (index == 1) for number in batch)
        counts[index] += len(batch)
    assert 3 <= counts[0] <= 17  # about a third


def test_several_loaders_with_holdout() -> None:
    tasks = ready([loader(30), loader(60, start=100)], num_samples=30, holdout=True)
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
    tasks = MergeDataModule({"a": TaskLoaders(val=parts), "b": TaskLoaders(val=parts)}, num_samples=10)
    callback, logged = merge(tasks, TwoLoaders(), {"a": TwoLoaders(), "b": TwoLoaders()})
    assert set(callback.report.metrics["merged"]["a"]) == {"loss/dataloader_idx_0", "loss/dataloader_idx_1"}
    everything, metrics = {k: v for part in logged for k, v in part.items()}, callback.report.metrics["merged"]["a"]
    assert {name: everything[name] for name in metrics} == pytest.approx(metrics)


# Held-out and overlap


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [49, 50])
def test_what_is_held_out_is_not_validated(shuffle: bool, count: int) -> None:
    tasks = ready(loader(count, shuffle=shuffle), num_samples=20, holdout=True)
    sample = tasks.calibration("a")
    assert sample.overlap == 0
    assert not set(values(sample)) & set(validated(tasks))
    assert sorted(values(sample) + validated(tasks)) == list(range(count))
    assert sample.samples == 20


def test_validated_samples_keep_their_order() -> None:
    tasks = ready(loader(), num_samples=20, holdout=True)
    assert validated(tasks) == sorted(validated(tasks))
    assert [len(batch) for batch in tasks.task("a").val_dataloader()] == [8, 8, 8, 6]


def test_without_holdout_the_loader_is_the_users_own() -> None:
    own = loader(shuffle=True)
    assert ready(own).task("a").val_dataloader() is own


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("count", [39, 40])
def test_by_default_samples_are_held_out_where_as_many_remain(count: int, shuffle: bool) -> None:
    own = loader(count, shuffle=shuffle)
    tasks = ready(own, num_samples=20)
    sample = tasks.calibration("a")
    assert tasks.problems() == []
    assert tasks.holds_out("a") == (count == 40)
    assert (tasks.task("a").val_dataloader() is own) == (count == 39)
    assert sample.overlap == (20 if count == 39 else 0)
    held_out = values(sample) if count == 40 else []
    assert sorted(validated(tasks) + held_out) == list(range(count))


@pytest.mark.parametrize(
    "make",
    [
        lambda: loader(sampler=WeightedRandomSampler([1.0] * COUNT, 200)),
        lambda: loader(sampler=RandomSampler(numbers(), replacement=True, num_samples=200)),
        lambda: loader(sampler=RandomSampler(numbers(), num_samples=30)),
        lambda: loader(sampler=[*range(COUNT), *range(COUNT)]),
        lambda: DataLoader(Stream(), batch_size=4),
    ],
    ids=["weighted", "with replacement", "another part in each pass", "repeated", "stream"],
)
def test_by_default_nothing_is_held_out_where_that_changes_what_is_measured(make: Callable[[], Any]) -> None:
    own = make()
    tasks = ready(own, num_samples=10)
    assert tasks.problems() == []
    assert not tasks.holds_out("a")
    assert tasks.task("a").val_dataloader() is own


def test_by_default_no_loader_is_left_empty() -> None:
    answers = []
    for seed in range(12):
        tasks = ready([loader(1), loader(start=100)], num_samples=20, seed=seed)
        single, _ = tasks.calibration_indices("a")
        assert tasks.holds_out("a") == (single == [])
        answers.append(tasks.holds_out("a"))
    assert len(set(answers)) == 2


def test_nothing_is_held_out_of_what_is_not_calibrated_on() -> None:
    own = loader()
    for tasks in (ready(own, own, num_samples=10, split="train"), ready(own, num_samples=10)):
        tasks.calibrates = tasks.split == "train"
        assert not tasks.holds_out("a")
        assert tasks.task("a").val_dataloader() is own


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
    sample = ready(data, num_samples=30).calibration("a", limit)
    number = limit if isinstance(limit, int) else int((limit or 1.0) * len(data))
    seen = {int(n) for _, batch in zip(range(number), data) for n in batch}
    assert sample.overlap == len(set(values(sample)) & seen)
    assert limit in (None, 1.0) or len(sample.batches) <= number


def test_grouped_batches_are_kept_in_what_is_validated() -> None:
    """A batch sampler of the user may group what can be collated."""
    tasks = ready(grouped(), num_samples=5, holdout=True)
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
    sample = ready(make(), num_samples=10, holdout=False).calibration("a", limit)
    assert sample.overlap is None
    assert sample.samples > 0


def test_a_shuffled_loader_overlaps_wholly() -> None:
    assert ready(loader(shuffle=True), num_samples=10, holdout=False).calibration("a").overlap == 10


def test_a_custom_batch_sampler() -> None:
    plain = BatchSampler(SequentialSampler(numbers()), 8, drop_last=False)
    for data in (DataLoader(numbers(), batch_sampler=plain), grouped()):  # type: ignore[arg-type]
        sample = ready(data, num_samples=20).calibration("a")
        assert sample.samples == len(set(values(sample))) == 20
        assert values(sample) == values(ready(loader(), num_samples=20).calibration("a"))


@pytest.mark.parametrize("limit", [1, 2, 0.5])
def test_the_limit_bounds_the_calibration_batches(limit: int | float) -> None:
    sample = ready(loader(), num_samples=COUNT).calibration("a", limit)
    assert len(sample.batches) == (limit if isinstance(limit, int) else 3)
    assert sample.samples == 8 * len(sample.batches)


def test_old_names_of_options_work_with_a_warning() -> None:
    old: Any = {"samples": 3, "source": "train"}
    with pytest.warns(FutureWarning, match=r"samples=3 is now num_samples=3|source='train' is now split='train'"):
        tasks = MergeDataModule({"a": TaskLoaders(val=loader())}, **old)
    assert (tasks.num_samples, tasks.split) == (3, "train")


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_trainer_that_merges_nothing_is_told_that_it_gets_the_first_task(stage: str) -> None:
    tasks = MergeDataModule({"a": PointsData(), "b": PointsData()})
    with pytest.warns(UserWarning, match="only the first task, 'a', is (validated|tested)"):
        getattr(quiet_trainer(), stage)(Classifier(3), datamodule=tasks, verbose=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="only the first task")
        getattr(quiet_trainer(), stage)(Classifier(3), datamodule=tasks.task("b"), verbose=False)
        getattr(quiet_trainer(), stage)(Classifier(3), datamodule=MergeDataModule({"a": PointsData()}), verbose=False)
