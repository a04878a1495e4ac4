"""Loaders are asked for once, and read as they are: of any class, shared out over processes or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset, random_split

from com_lightning import MergeDataModule, TaskLoaders
from tests.helpers import make_data, run_apart
from tests.helpers.calibration import COUNT, Stream, loader, merge, numbers, ready, values


def test_loaders_that_are_shared_out_over_processes() -> None:
    run_apart("tests/integration/data/forked_loaders.py", timeout=600)


class Splitting(LightningDataModule):
    """Splits its data at each call, at random."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        dataset = make_data(seed).val_dataloader().dataset
        assert isinstance(dataset, TensorDataset)
        self.dataset, self.calls = dataset, 0

    def val_dataloader(self) -> Any:
        self.calls += 1
        return DataLoader(random_split(self.dataset, [40, 20])[0], 8)


def test_a_loader_is_asked_for_once() -> None:
    """What is held out is not validated, though the datamodule splits its data anew at each call."""
    data = MergeDataModule({"a": Splitting(0), "b": Splitting(1)}, num_samples=20, holdout=True)
    callback, _ = merge(data)
    assert [task.calls for task in data.tasks.values()] == [1, 1]  # type: ignore[attr-defined]
    assert callback.report.overlap == {"a": 0, "b": 0}
    data.setup("validate")  # anew, after the teardown of the trainer
    rows = [batch for (batch, _), _ in data.calibration("a").batches]
    rows += [batch for batch, _ in data.task("a").val_dataloader()]
    assert len({tuple(row.tolist()) for batch in rows for row in batch}) == 40
    assert [task.calls for task in data.tasks.values()] == [2, 1]  # type: ignore[attr-defined]


def test_the_split_of_a_datamodule_depends_on_the_seed_alone() -> None:
    def drawn(before: int) -> list[Tensor]:
        torch.manual_seed(before)
        data = MergeDataModule({"a": Splitting(0)}, num_samples=20)
        data.setup("validate")
        return [batch[0] for batch, _ in data.calibration("a").batches]

    torch.testing.assert_close(drawn(1), drawn(2), rtol=0, atol=0)


class Iterators(LightningDataModule):
    def __init__(self, one: bool) -> None:
        super().__init__()
        self.iterator = iter(loader()) if one else None

    def val_dataloader(self) -> Any:
        return self.iterator or (batch for batch in loader())


def test_iterators() -> None:
    """A new one at each call is read as a stream. One that is always the same is an error."""
    tasks = MergeDataModule({"new": Iterators(False), "same": Iterators(True)}, num_samples=16)
    tasks.setup("validate")
    problems = tasks.problems()
    assert len(problems) == 1
    assert problems[0].startswith("task 'same': its val loader is one _SingleProcessDataLoaderIter, which can be read")
    for _ in range(2):
        assert len(values(tasks.calibration("new"))) == 16
        assert len([*tasks.task("new").val_dataloader()]) == 7


# Classes of loaders


class Scaled(DataLoader[Any]):
    """Has an argument that its constructor must have and no attribute tells, and collates by itself."""

    def __init__(self, data: Any, factor: int, **kwargs: Any) -> None:
        super().__init__(data, collate_fn=lambda samples: torch.stack(samples) * factor, **kwargs)


class Backwards(DataLoader[Any]):
    """Gives the batches in another way than its batch sampler says."""

    def __iter__(self) -> Any:
        return reversed([batch.flip(0) for batch in super().__iter__()])


def backwards() -> Backwards:
    dataset: Any = numbers()
    return Backwards(dataset, batch_size=8)


def test_a_subclass_keeps_what_it_does() -> None:
    data = Scaled(numbers(), 10, batch_size=8)
    for holdout in (False, True):
        tasks = ready(data, num_samples=20, holdout=holdout)
        assert tasks.problems() == tasks.warnings() == []
        drawn = values(tasks.calibration("a"))
        assert len(drawn) == 20
        assert all(value % 10 == 0 for value in drawn)
        validated = [int(n) for batch in tasks.task("a").val_dataloader() for n in batch]
        assert sorted(validated + drawn * holdout) == list(range(0, 10 * COUNT, 10))


def test_options_of_a_loader_are_kept() -> None:
    data = loader(num_workers=1, prefetch_factor=3, timeout=60, multiprocessing_context="fork")
    fresh = ready(data, num_samples=20, holdout=True).task("a").val_dataloader()
    assert (fresh.prefetch_factor, fresh.timeout, fresh.num_workers) == (3, 60, 1)
    assert fresh.multiprocessing_context.get_start_method() == "fork"
    assert fresh.dataset is data.dataset


def test_a_loader_with_an_iter_of_its_own_gives_its_own_batches() -> None:
    tasks = ready(backwards(), num_samples=16, batch_size=4)
    assert tasks.problems() == []
    assert [warning.split(": ")[1][:35] for warning in tasks.warnings()] == [
        "its val loader is a Backwards, whic",
        "its val loader is a stream, whose b",
    ]
    sample = tasks.calibration("a")
    assert sample.overlap is None
    own = [batch.tolist() for batch in backwards()]
    assert all(batch.tolist() in own for batch, _ in sample.batches)
    held = ready(backwards(), num_samples=16, holdout=True).problems()
    assert held == [
        "task 'a': samples of a Backwards, which has an __iter__ of its own, cannot be held out; use split: train"
    ]


def test_workers_of_a_stream_are_kept() -> None:
    """Each worker reads the whole stream, as for the user's own validation."""
    sample = ready(DataLoader(Stream(), 5, num_workers=2), num_samples=1000).calibration("a")
    assert sorted(values(sample)) == sorted([*range(COUNT)] * 2)


@pytest.mark.parametrize("mode", ["sequential", "max_size"])
def test_combined_loaders(mode: Any) -> None:
    tasks = ready(CombinedLoader([loader(16), loader(16, start=100)], mode), num_samples=32)
    assert tasks.problems() == []
    batches = [batch for batch, _ in tasks.calibration("a").batches]
    seen = [int(n) for batch in batches for part in (batch if mode == "max_size" else [batch]) for n in part]
    assert sorted(seen) == [*range(16), *range(100, 116)]
    assert len([*tasks.task("a").val_dataloader()]) == (4 if mode == "sequential" else 2)


def test_a_share_of_the_data_in_a_single_process_is_told() -> None:
    sampler: Any = DistributedSampler(numbers(), num_replicas=2, rank=1, shuffle=False)  # type: ignore[arg-type]
    tasks = ready(loader(sampler=sampler), num_samples=COUNT)
    assert tasks.problems() == []
    assert sorted(values(tasks.calibration("a"))) == list(range(1, COUNT, 2))
    (warning,) = tasks.warnings()
    assert "gives the share of process 1 of 2 in a merge by 1" in warning
    data = {name: make_data(number) for number, name in enumerate("ab")}
    dataset = data["b"].val_dataloader().dataset
    data["b"] = TaskLoaders(val=DataLoader(dataset, 8, sampler=DistributedSampler(dataset, 2, 0)))
    callback, _ = merge(MergeDataModule(data, num_samples=16))
    assert sum("the share of process 0 of 2" in warning for warning in callback.report.warnings) == 1
