"""Base classes of the suites' LightningModules: the one-cycle schedule, and a classifier with its metrics."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class OneCycle(LightningModule):
    """AdamW under a one-cycle schedule, stepped every batch.

    Args:
        learning_rate: the peak of the schedule.
        weight_decay: of AdamW.
        warmup: share of the steps in which the learning rate rises to its peak.
    """

    def __init__(self, learning_rate: float, weight_decay: float, warmup: float) -> None:
        super().__init__()
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # Fused: one pass over each parameter instead of a dozen.
        optimizer = torch.optim.AdamW(trained, lr=self.learning_rate, weight_decay=self.weight_decay, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            # A warm-up of exactly one step divides by zero; a smoke test of a few steps should not.
            total_steps=max(int(self.trainer.estimated_stepping_batches), 50),
            pct_start=self.warmup,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Classifier(OneCycle):
    """A network that gives features, and a linear head; logs ``val_acc`` and ``test_acc``.

    Subclasses set ``self.net``, and compute features and labels of a batch (:meth:`features`, :meth:`labels`).

    Args:
        width: number of features.
        classes: number of classes.
        learning_rate: see :class:`OneCycle`, also for the others.
    """

    def __init__(
        self,
        width: int,
        classes: int,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.2,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.head = nn.Linear(width, classes)
        self.val_acc = MulticlassAccuracy(classes, average="micro")
        self.test_acc = MulticlassAccuracy(classes, average="micro")

    def features(self, batch: Any) -> Tensor:
        """Samples x width."""
        raise NotImplementedError

    def labels(self, batch: Any) -> Tensor:
        """The class of each sample."""
        raise NotImplementedError

    def forward(self, batch: Any) -> Tensor:
        """The logits of a batch."""
        logits: Tensor = self.head(self.features(batch))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch), self.labels(batch))
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        labels = self.labels(batch)
        self.val_acc(self(batch), labels)
        self.log("val_acc", self.val_acc, batch_size=len(labels))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        labels = self.labels(batch)
        self.test_acc(self(batch), labels)
        self.log("test_acc", self.test_acc, batch_size=len(labels))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch)  # type: ignore[no-any-return]
