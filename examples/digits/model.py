"""A small vision transformer that classifies digits: an ordinary LightningModule, with no thought of merging in it."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import ViTConfig, ViTModel


class ViTClassifier(LightningModule):
    """A ViT backbone, mean-pooled over the patches, with a linear head."""

    def __init__(
        self,
        num_classes: int = 10,
        base: str | None = None,
        hidden_size: int = 96,
        num_layers: int = 2,
        num_heads: int = 4,
        patch_size: int = 7,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.2,
    ) -> None:
        """Build the model.

        Args:
            num_classes: Number of classes of the head.
            base: Path of a checkpoint of this class from which the backbone, but not the head, is loaded.
            hidden_size: Width of the transformer.
            num_layers: Number of transformer layers.
            num_heads: Number of attention heads.
            patch_size: Side of the square patches the 28 x 28 images are cut into.
            learning_rate: Peak of the one-cycle schedule.
            weight_decay: AdamW's weight decay.
            warmup: Share of the steps in which the learning rate rises to its peak.
        """
        super().__init__()
        # Without `base`: it only matters before training, and a finished checkpoint should load where it is absent.
        self.save_hyperparameters(ignore="base")
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.warmup = warmup
        config = ViTConfig(
            image_size=28,
            patch_size=patch_size,
            num_channels=1,
            hidden_size=hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=2 * hidden_size,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.backbone = ViTModel(config, add_pooling_layer=False)
        self.head = nn.Linear(hidden_size, num_classes)
        self.loss = nn.CrossEntropyLoss()
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")
        if base is not None:
            self._load_backbone(base)

    def _load_backbone(self, path: str) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        prefix = "backbone."
        self.backbone.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of 1 x 28 x 28 images."""
        tokens: Tensor = self.backbone(pixel_values=images).last_hidden_state
        logits: Tensor = self.head(tokens[:, 1:].mean(dim=1))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss: Tensor = self.loss(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_acc`."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", self.loss(logits, labels), batch_size=len(labels))
        self.log("val_acc", self.val_acc, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_acc`."""
        images, labels = batch
        logits = self(images)
        self.test_acc(logits, labels)
        self.log("test_loss", self.loss(logits, labels), batch_size=len(labels))
        self.log("test_acc", self.test_acc, batch_size=len(labels))

    def configure_optimizers(self) -> Any:
        """AdamW under a one-cycle schedule, stepped every batch."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            max_lr=self.learning_rate,
            # A warm-up of exactly one step divides by zero; a smoke test of a few steps should not.
            total_steps=max(int(self.trainer.estimated_stepping_batches), 50),
            pct_start=self.warmup,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
