"""Data sets that say what was read of them, and calibration samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
)

from com_lightning import ChainOfMergesCallback, MergeDataModule, TaskLoaders
from com_lightning.data.sampling import CalibrationSample
from tests.helpers.classifier import FEATURES, Classifier, make_experts
from tests.helpers.running import quiet_trainer

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


def merge(tasks: MergeDataModule, model: Any = None, experts: Any = None, **kwargs: Any) -> Any:
    """Merge through ``trainer.validate``; the callback, and what ``validate`` returns."""
    experts = experts or dict(zip(tasks.tasks, make_experts([3] * len(tasks.tasks))))
    callback = ChainOfMergesCallback(experts)
    trainer = quiet_trainer(callbacks=[callback], **kwargs)
    return callback, trainer.validate(model or Classifier(), datamodule=tasks, verbose=False)
