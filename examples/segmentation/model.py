"""torchvision's LR-ASPP in a LightningModule, with no thought of merging in it."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models.segmentation import lraspp_mobilenet_v3_large


class Segmenter(LightningModule):
    """A MobileNetV3 with dilated convolutions, and a head that adds what two of its resolutions say (LR-ASPP)."""

    def __init__(
        self,
        num_classes: int = 4,
        base: str | None = None,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.2,
    ) -> None:
        """Build the model.

        Args:
            num_classes: Number of classes, with the ground.
            base: Path of a checkpoint of this class from which all is loaded that has the same shape here.
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
        self.net = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
        for module in self.net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1  # torchvision's 0.01 is for long trainings
        self.loss = nn.CrossEntropyLoss()
        self.val_iou = MulticlassJaccardIndex(num_classes)
        self.test_iou = MulticlassJaccardIndex(num_classes)
        if base is not None:
            self._load(base)

    def _load(self, path: str) -> None:
        own = self.state_dict()
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        self.load_state_dict({**own, **{k: v for k, v in state.items() if k in own and v.shape == own[k].shape}})

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, `(n, num_classes, height, width)`, of a batch of `(n, 3, height, width)` images."""
        logits: Tensor = self.net(images)["out"]
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        images, masks = batch
        loss: Tensor = self.loss(self(images), masks)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `val_loss` and `val_iou`, the mean over classes of intersection over union."""
        images, masks = batch
        logits = self(images)
        self.val_iou(logits, masks)
        self.log("val_loss", self.loss(logits, masks), batch_size=len(masks))
        self.log("val_iou", self.val_iou, prog_bar=True, batch_size=len(masks))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log `test_loss` and `test_iou`."""
        images, masks = batch
        logits = self(images)
        self.test_iou(logits, masks)
        self.log("test_loss", self.loss(logits, masks), batch_size=len(masks))
        self.log("test_iou", self.test_iou, batch_size=len(masks))

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
