"""Eight image tasks that contradict each other: MNIST and Fashion-MNIST plain, rotated, inverted and rolled.

The base is trained to predict the rotation of images of both sources. ``images8`` has a vision transformer,
``images8-resnet`` a small ResNet with batch normalisation.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from benchmarks.suites.images import PACKAGES, VIEWS, RotationData, ViewData
from benchmarks.suites.modules import Classifier
from benchmarks.suites.suite import Recipe, Suite

TURNS, CLASSES = 4, 10


class ImageClassifier(Classifier):
    """A classifier of (images, labels)."""

    def labels(self, batch: Any) -> Tensor:
        labels: Tensor = batch[1]
        return labels


class ViTClassifier(ImageClassifier):
    """A pre-norm vision transformer, mean-pooled over the patches."""

    def __init__(self, classes: int, width: int = 96, blocks: int = 6, **optimizer: float) -> None:
        super().__init__(width, classes, **optimizer)
        self.save_hyperparameters()
        config = ViTConfig(
            image_size=28,
            patch_size=7,
            num_channels=1,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.net = ViTModel(config, add_pooling_layer=False)

    def features(self, batch: Any) -> Tensor:
        tokens: Tensor = self.net(pixel_values=batch[0]).last_hidden_state
        return tokens[:, 1:].mean(dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions with batch normalisation beside a shortcut, which halves the size if ``stride`` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Batch x inputs x height x width."""
        y = self.norm2(self.conv2(nn.functional.relu(self.norm1(self.conv1(x)))))
        return nn.functional.relu(y + self.shortcut(x))


class ResNetClassifier(ImageClassifier):
    """A ResNet of three blocks."""

    def __init__(self, classes: int, width: int = 16, **optimizer: float) -> None:
        super().__init__(4 * width, classes, **optimizer)
        self.save_hyperparameters()
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
        )

    def features(self, batch: Any) -> Tensor:
        features: Tensor = self.net(batch[0])
        return features.mean(dim=(-2, -1))


class Images8(Suite):
    """The tasks with the vision transformer."""

    name = "images8"
    title = "Eight image tasks, vision transformer"
    tasks = tuple(source if view == "plain" else f"{source}-{view}" for source in PACKAGES for view in VIEWS)
    base_recipe = Recipe(steps=1200, batch_size=128, learning_rate=2e-3)
    recipe = Recipe(steps=800, batch_size=64, learning_rate=1e-3)
    fashion_recipe = Recipe(steps=1500, batch_size=64, learning_rate=1e-3)  # harder to learn
    joint_batch_size = 16  # of each task, 128 in all; with an expert's 64, joint training would take half an hour

    def expert_recipe(self, task: str) -> Recipe:
        return self.fashion_recipe if task.startswith("fashion") else self.recipe

    def joint_recipe(self) -> Recipe:
        return replace(super().joint_recipe(), batch_size=self.joint_batch_size)

    def module(self, classes: int, recipe: Recipe) -> LightningModule:
        """A classifier of the suite's architecture."""
        return ViTClassifier(classes, **recipe.optimizer())

    def base_module(self) -> LightningModule:
        return self.module(TURNS, self.base_recipe or self.recipe)

    def base_data(self) -> LightningDataModule:
        return RotationData((self.base_recipe or self.recipe).batch_size)

    def expert_module(self, task: str, base: LightningModule) -> LightningModule:
        expert: Any = self.module(CLASSES, self.expert_recipe(task))
        expert.net.load_state_dict(base.net.state_dict())  # type: ignore[union-attr]
        return expert  # type: ignore[no-any-return]

    def data(self, task: str) -> ViewData:
        return ViewData(task, self.expert_recipe(task).batch_size)


class Images8ResNet(Images8):
    """The tasks with the ResNet."""

    name = "images8-resnet"
    title = "Eight image tasks, ResNet"
    base_recipe = Recipe(steps=500, batch_size=128, learning_rate=5e-3)
    recipe = Recipe(steps=300, batch_size=64, learning_rate=3e-3)
    fashion_recipe = Recipe(steps=600, batch_size=64, learning_rate=3e-3)
    joint_batch_size = 64

    def module(self, classes: int, recipe: Recipe) -> LightningModule:
        return ResNetClassifier(classes, **recipe.optimizer())
