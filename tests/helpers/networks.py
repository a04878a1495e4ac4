"""A network, and a module that wraps it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from tests.helpers.classifier import FEATURES


class Net(nn.Module):
    """A network of a library, as torchvision's are."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))  # type: ignore[no-any-return]


class Wrapper(LightningModule):
    """A user's module around it."""

    def __init__(self, classes: int = 3, compiled: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: Any = torch.compile(Net(classes)) if compiled else Net(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())
