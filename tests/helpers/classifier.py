"""Tiny modules and data for the tests: a user's LightningModule, its loaders, and experts of one base."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from com_lightning import TaskLoaders

FEATURES = 6


class Classifier(LightningModule):
    """A user's module: tuple batches, torchmetrics, a head whose size depends on the task."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(
            nn.Linear(FEATURES, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, classes)
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", self.accuracy)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.accuracy(self(x), y)
        self.log("test_acc", self.accuracy)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def make_data(seed: int = 0, classes: int = 3, count: int = 60, batch_size: int = 16) -> TaskLoaders:
    """A task of random points, with labels from a random linear map."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    y = (x @ torch.randn(FEATURES, classes, generator=generator)).argmax(1)
    dataset = TensorDataset(x, y)
    train = DataLoader(dataset, batch_size, shuffle=True)
    return TaskLoaders(val=DataLoader(dataset, batch_size), train=train, test=DataLoader(dataset, batch_size))


def make_experts(classes: Sequence[int] = (3, 4), scale: float = 0.3) -> list[Classifier]:
    """Experts with one perturbed body and a head each; deterministic."""
    torch.manual_seed(0)
    base = Classifier()
    experts = []
    for number in classes:
        expert = Classifier(number)
        expert.body.load_state_dict(copy.deepcopy(base.body.state_dict()))
        perturb(expert.body, scale)
        experts.append(expert)
    return experts


def perturb(module: nn.Module, scale: float = 0.3, seed: int | None = None) -> nn.Module:
    """Add noise to all parameters, as fine-tuning would; returns the module."""
    if seed is not None:
        torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * (parameter.std() if parameter.numel() > 1 else 1.0) * torch.randn_like(parameter))
            if parameter.dim() == 1:
                parameter.add_(scale * 0.1 * torch.randn_like(parameter))
    return module


def built(make: Callable[[], nn.Module], count: int = 2, scale: float = 0.3) -> list[nn.Module]:
    """``count`` perturbed copies of a module, in eval mode."""
    torch.manual_seed(0)
    base = make().eval()
    return [perturb(copy.deepcopy(base), scale, seed=number + 1) for number in range(count)]


class PointsData(LightningDataModule):
    """The data of :func:`make_data` as a user's datamodule."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__()
        self.loaders = make_data(seed, classes)

    def train_dataloader(self) -> Any:
        return self.loaders.train_dataloader()

    def val_dataloader(self) -> Any:
        return self.loaders.val_dataloader()

    def test_dataloader(self) -> Any:
        return self.loaders.test_dataloader()


class SavedPointsData(PointsData):
    """One that reads its own hyperparameters, and says what they are."""

    def __init__(self, seed: int = 0, classes: int = 3) -> None:
        super().__init__(seed, classes)
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        print(dict(self.hparams))
        assert (self.hparams["seed"], self.hparams["classes"]) in {(0, 3), (1, 4)}
