"""The eight image tasks: of torchvision, of the Hugging Face Hub, or in a folder of your own."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import GTSRB, MNIST, SVHN, ImageFolder
from torchvision.transforms import InterpolationMode, v2

from examples.clip_8_tasks.prompts import CLASSES, TASKS, class_numbers

# Where torchvision's train and test split are the usual ones.
TORCHVISION: Mapping[str, Callable[[str, bool], Any]] = {
    "svhn": lambda root, train: SVHN(root, "train" if train else "test", download=True),
    "gtsrb": lambda root, train: GTSRB(root, "train" if train else "test", download=True),
    "mnist": lambda root, train: MNIST(root, train, download=True),
}
# In the splits that the published experts were trained and measured on.
HUB = {
    "sun397": "tanganke/sun397",
    "stanford-cars": "tanganke/stanford_cars",
    "resisc45": "tanganke/resisc45",
    "eurosat": "tanganke/eurosat",
    "dtd": "tanganke/dtd",
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
VAL = 0.1  # share of the training images, where settings are chosen on them


def clip_transform(size: int = 224) -> v2.Transform:
    """What CLIP does to an image: its middle square, ``3 x size x size``, normalised."""
    return v2.Compose(
        [
            v2.Resize(size, InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def open_images(task: str, train: bool, root: str, folder: str | None = None) -> Any:
    """The images of one split, with labels; downloaded where they are not there yet.

    Args:
        task: one of the eight.
        train: the training or the test split.
        root: where torchvision downloads to. The Hub's data sets are in its own cache.
        folder: images of your own, ``<folder>/<task>/<train or test>/<class>/<any name>.png``.
    """
    split = "train" if train else "test"
    if folder is not None:
        return ImageFolder(str(Path(folder, task, split)))
    if task in TORCHVISION:
        return TORCHVISION[task](root, train)
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ImportError(f"{task} is read from the Hugging Face Hub: pip install datasets") from error
    return load_dataset(HUB[task], split=split)


class TaskImages(Dataset[dict[str, Any]]):
    """Images as CLIP sees them, labels as the head numbers them, and the number of the task."""

    def __init__(self, task: str, images: Any, image_size: int) -> None:
        self.task, self.images, self.transform = task, images, clip_transform(image_size)
        label = getattr(images, "features", {}).get("label")
        names = getattr(label, "names", None) or getattr(images, "classes", None)
        known = CLASSES[task].names
        self.numbers = class_numbers(names, known) if names else range(len(known))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.images[index]
        image, label = (sample["image"], sample["label"]) if isinstance(sample, dict) else sample
        pixels: Tensor = self.transform(image.convert("RGB"))
        return {"pixel_values": pixels, "labels": self.numbers[label], "task": TASKS.index(self.task)}


class TaskData(LightningDataModule):
    """One task. Its val loader has what a merge is to be measured on: the test split, as in the published tables."""

    def __init__(
        self,
        task: str,
        root: str = "data",
        folder: str | None = None,
        validate_on: Literal["test", "val"] = "test",
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 4,
    ) -> None:
        """Describe the data of one task.

        Args:
            task: one of the eight.
            root: see :func:`open_images`.
            folder: see :func:`open_images`.
            validate_on: ``"val"``: a tenth of the training split, which is then left out of the training loader. For
                choosing between rules and settings, which is not to be done on the test split.
            image_size: side of the images.
            batch_size: of all loaders.
            num_workers: of all loaders.
        """
        super().__init__()
        if task not in TASKS:
            raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
        self.task, self.root, self.folder, self.validate_on = task, root, folder, validate_on
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.splits: dict[str, Dataset[Any]] = {}

    def _images(self, train: bool) -> TaskImages:
        return TaskImages(self.task, open_images(self.task, train, self.root, self.folder), self.image_size)

    def prepare_data(self) -> None:
        """Download, once."""
        for train in (True, False):
            open_images(self.task, train, self.root, self.folder)

    def setup(self, stage: str | None = None) -> None:
        """Open the splits; no image is read yet."""
        if self.splits:
            return
        train, test = self._images(train=True), self._images(train=False)
        self.splits = {"train": train, "val": test, "test": test}
        if self.validate_on == "val":
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
            cut = max(int(VAL * len(train)), 1)
            self.splits |= {"train": Subset(train, order[cut:]), "val": Subset(train, order[:cut])}

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(self.splits[split], self.batch_size, shuffle, num_workers=self.num_workers)

    def train_dataloader(self) -> DataLoader[Any]:
        """Training images, shuffled: what merges calibrate on, and experts are trained on."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """What ``validate_on`` says."""
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Test images."""
        return self._loader("test")
