"""Fixed splits into train, val and test without duplicates, and the datamodule of a task that has them.

Experts are trained on train. Calibration and every choice of a setting use train or val. Figures come from test only.
"""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

SPLITS = ("train", "val", "test")


def first_of_each(keys: Sequence[Hashable]) -> list[int]:
    """Indices of the first sample with each key, in order. All others are duplicates."""
    first: dict[Hashable, int] = {}
    for index, key in enumerate(keys):
        first.setdefault(key, index)
    return sorted(first.values())


def split(name: str, count: int, val: int, test: int) -> dict[str, list[int]]:
    """Split ``count`` samples at random. The splits depend on ``name`` and the numbers, not on the seed of a run.

    Example::

        >>> parts = split("a task", 10, val=2, test=3)
        >>> [len(part) for part in parts.values()], sorted(sum(parts.values(), []))
        ([5, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    if val + test >= count:
        raise ValueError(f"{name}: {val} samples for val and {test} for test leave none of {count} for train")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).tolist()
    return {"train": order[val + test :], "val": order[test : val + test], "test": order[:test]}


class SplitData(LightningDataModule):
    """The three loaders of a task. A split is made when a stage needs it.

    Args:
        batch_size: batch size of train.
        eval_batch_size: batch size of val and test.
    """

    collate: Callable[[list[Any]], Any] | None = None

    def __init__(self, batch_size: int, eval_batch_size: int) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.splits: dict[str, Dataset[Any]] = {}

    @abstractmethod
    def make_split(self, name: str) -> Dataset[Any]:
        """The samples of one split."""

    def setup(self, stage: str) -> None:
        for name in _NEEDED[stage]:
            if name not in self.splits:
                self.splits[name] = self.make_split(name)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=True, collate_fn=self.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.splits["val"], self.eval_batch_size, collate_fn=self.collate)

    def test_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.splits["test"], self.eval_batch_size, collate_fn=self.collate)


_NEEDED: Mapping[str, Sequence[str]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
