"""Which samples a comparison calibrates on, chooses settings on, and reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from com_lightning import (
    MergeDataModule,
    MergeError,
    TaskLoaders,
)
from com_lightning.analysis.splits import Splits, split


def numbered(count: int, batch_size: int = 4, **kwargs: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.arange(count)), batch_size, **kwargs)


def groups(count: int) -> list[list[int]]:
    return [list(range(start, min(start + 3, count))) for start in range(0, count, 3)]


LOADERS: dict[str, Any] = {
    "plain": lambda: numbered(50),
    "shuffled": lambda: numbered(50, shuffle=True),
    "grouped": lambda: DataLoader(TensorDataset(torch.arange(50)), batch_sampler=groups(50)),
    "two": lambda: [numbered(30), DataLoader(TensorDataset(torch.arange(30, 50)), 4)],
}


def validated(splits: Splits, part: str) -> list[int]:
    loaders = splits.part(part).task("a").val_dataloader()
    loaders = loaders if isinstance(loaders, list) else [loaders]
    return [int(value) for loader in loaders for (batch,) in loader for value in batch]


@pytest.mark.parametrize("selects", [False, True])
@pytest.mark.parametrize("kind", LOADERS)
def test_no_sample_is_for_two_things(kind: str, selects: bool) -> None:
    data = MergeDataModule({"a": TaskLoaders(val=LOADERS[kind]())}, num_samples=8)
    data.setup("validate")
    splits = split(data, [0, 1, 2], calibrates=True, selects=selects)
    calibrated = {
        int(value)
        for seed in (0, 1, 2)
        for (batch,), _ in splits.part("report", seed).calibration("a").batches
        for value in batch
    }
    report, selection = validated(splits, "report"), validated(splits, "selection") if selects else []
    assert len({*report, *selection}) == len(report) + len(selection) == 50 - len(calibrated)
    assert not calibrated & {*report, *selection}
    assert len(calibrated) > 8
    counts = splits.counts["a"]
    assert counts == {"calibration": len(calibrated), "selection": len(selection), "report": len(report)}
    if selects:
        assert abs(len(report) - len(selection)) <= 2
        again = split(data, [0, 1, 2], calibrates=True, selects=True)
        assert sorted(validated(again, "selection")) == sorted(selection)


def test_loaders_of_one_dataset_share_no_sample() -> None:
    dataset = TensorDataset(torch.arange(60))
    loaders = [DataLoader(dataset, 4), DataLoader(dataset, 5)]
    data = MergeDataModule({"a": TaskLoaders(val=loaders)}, num_samples=10)
    data.setup("validate")
    splits = split(data, [0], calibrates=True, selects=True)
    calibrated = {int(v) for (batch,), _ in splits.part("report").calibration("a").batches for v in batch}
    report, selection = set(validated(splits, "report")), set(validated(splits, "selection"))
    assert not calibrated & report
    assert not calibrated & selection
    assert not report & selection


def test_train_data_hold_nothing_out() -> None:
    tasks = {"a": TaskLoaders(val=numbered(20), train=numbered(50))}
    data = MergeDataModule(tasks, num_samples=30, split="train")
    data.setup("validate")
    assert len(validated(split(data, [0], True, selects=False), "report")) == 20
    splits = split(data, [0], True, selects=True)
    assert sorted(validated(splits, "report") + validated(splits, "selection")) == list(range(20))


def test_rules_without_data_hold_nothing_out() -> None:
    data = MergeDataModule({"a": TaskLoaders(val=numbered(20))}, num_samples=100)
    data.setup("validate")
    assert len(validated(split(data, [0], calibrates=False, selects=False), "report")) == 20


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(torch.arange(20))


def test_what_a_single_merge_validates_on_is_said_if_it_differs() -> None:
    def said(count: int, seeds: list[int], calibrates: bool = True, selects: bool = False, **options: Any) -> str:
        data = MergeDataModule({"a": TaskLoaders(val=numbered(count))}, num_samples=8, **options)
        data.setup("validate")
        return str(split(data, seeds, calibrates, selects)).partition("A single `merge` has other figures")[2]

    assert ": 20 of each task with a rule that reads none." in said(20, [0])
    assert "reads data" not in said(20, [0])  # it holds out the same samples
    assert "12 of each task with a rule that reads data, 20 of each task with a rule that reads none" in said(
        20, [0, 1]
    )
    assert "20 of each task with a rule that reads data" in said(20, [0], holdout=False)
    assert "12 of each task with a rule that reads data" in said(20, [0], selects=True)
    assert "12 of each task with a rule that reads data" in said(20, [1])  # as many, but others
    assert not said(20, [0], calibrates=False)


def test_what_cannot_be_split() -> None:
    few = MergeDataModule({"a": TaskLoaders(val=numbered(20)), "b": TaskLoaders(val=numbered(9))}, num_samples=8)
    with pytest.raises(MergeError, match="task 'b': 3 seeds calibrate on 9 of its 9 val samples"):
        split(few, [0, 1, 2], calibrates=True, selects=False)
    tasks = {"a": TaskLoaders(val=DataLoader(Stream(), 4), train=numbered(50))}
    with pytest.raises(MergeError, match="iterable dataset cannot be split"):
        split(MergeDataModule(tasks), [0], calibrates=True, selects=False)
    with pytest.raises(MergeError, match="iterable dataset cannot be split"):
        split(MergeDataModule(tasks, split="train"), [0], calibrates=True, selects=True)
    whole = split(MergeDataModule(tasks, split="train"), [0], calibrates=True, selects=False)
    assert whole.part("report").task("a").val_dataloader() is tasks["a"].val_dataloader()
