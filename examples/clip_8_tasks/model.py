"""CLIP as a classifier of eight tasks: one vision tower, and a zero-shot head for each task."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torchmetrics.classification import MulticlassAccuracy
from transformers import AutoTokenizer, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from examples.clip_8_tasks.prompts import CLASSES, TASKS, zero_shot_head

MOST = max(len(prompts.names) for prompts in CLASSES.values())


class ClipClassifier(LightningModule):
    """The vision tower is what experts differ in, and what is merged. Projection and heads are the pretrained model's.

    An expert is a ``CLIPVisionModel``, by its folder or name on the Hub, that takes the place of :attr:`vision`. Such a
    model knows nothing of its task, so all heads are there, and a batch says which of them is meant.
    """

    def __init__(
        self,
        base: str | None = None,
        vision: dict[str, Any] | None = None,
        projection_dim: int = 512,
        learning_rate: float = 1e-5,
    ) -> None:
        """Build the model.

        Args:
            base: the pretrained CLIP, a name on the Hub or a folder. The heads are made with its text encoder.
            vision: configuration of the vision tower, where there is no ``base``: a checkpoint of this class has all
                weights, and is loaded without it.
            projection_dim: width of the embeddings, likewise.
            learning_rate: Adam's, for experts of your own.
        """
        super().__init__()
        if base is not None:
            clip: Any = CLIPModel.from_pretrained(base)
            self.vision = clip.vision_model
            vision, projection_dim = self.vision.config.to_diff_dict(), clip.config.projection_dim
        else:
            self.vision = CLIPVisionModel(CLIPVisionConfig(**(vision or {})))
        self.save_hyperparameters({"vision": vision, "projection_dim": projection_dim, "learning_rate": learning_rate})
        width = self.vision.config.hidden_size
        self.projection = nn.Linear(width, projection_dim, bias=False).requires_grad_(False)
        self.heads = nn.ModuleDict(
            {task: nn.Linear(projection_dim, len(prompts.names), bias=False) for task, prompts in CLASSES.items()}
        ).requires_grad_(False)
        self.learning_rate = learning_rate
        self.val_acc = MulticlassAccuracy(MOST, average="micro")
        self.test_acc = MulticlassAccuracy(MOST, average="micro")
        if base is not None:
            tokenizer = AutoTokenizer.from_pretrained(base)
            self.projection.load_state_dict(clip.visual_projection.state_dict())
            for task, prompts in CLASSES.items():
                self.heads[task].load_state_dict({"weight": zero_shot_head(clip, tokenizer, prompts)})

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """CLIP's logits for the classes of the batch's task, samples × classes."""
        images = self.vision(pixel_values=batch["pixel_values"]).pooler_output
        logits: Tensor = self.heads[TASKS[int(batch["task"][0])]](normalize(self.projection(images), dim=-1))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss = cross_entropy(self(batch), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log `val_acc`."""
        self.val_acc(self(batch).argmax(dim=-1), batch["labels"])
        self.log("val_acc", self.val_acc, prog_bar=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log `test_acc`."""
        self.test_acc(self(batch).argmax(dim=-1), batch["labels"])
        self.log("test_acc", self.test_acc, batch_size=len(batch["labels"]))

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the logits."""
        logits: Tensor = self(batch)
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the vision tower, as the published experts were trained."""
        return torch.optim.Adam(self.vision.parameters(), lr=self.learning_rate)
