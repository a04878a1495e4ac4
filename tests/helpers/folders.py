"""Merges that leave a folder behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from com_lightning import (
    ChainOfMergesCallback,
    MergeDataModule,
)
from com_lightning.experts.load import ExpertSource
from tests.helpers.classifier import Classifier, make_data, make_experts
from tests.helpers.running import quiet_trainer


class WithBuffers(Classifier):
    """Batch normalisation: floating-point and integer buffers; a second head that one expert only has."""

    def __init__(self, classes: int = 3, extra: bool = False) -> None:
        super().__init__(classes)
        self.save_hyperparameters()
        self.body.append(nn.BatchNorm1d(8))
        self.scale = nn.Parameter(torch.ones(8))
        if extra:
            self.extra = nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x) * self.scale.exp())


def make_tasks() -> MergeDataModule:
    return MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, num_samples=24, holdout=False)


def merge(
    output_dir: Path | None = None,
    experts: Mapping[str, ExpertSource] | None = None,
    model: LightningModule | None = None,
    tasks: MergeDataModule | None = None,
    **kwargs: Any,
) -> ChainOfMergesCallback:
    """Merge through ``trainer.validate``."""
    experts = experts or dict(zip("ab", make_experts((3, 4))))
    folder = None if output_dir is None else str(output_dir)
    callback = ChainOfMergesCallback(dict(experts), output_dir=folder, **kwargs)
    trainer = quiet_trainer(callbacks=[callback])
    trainer.validate(model or Classifier(), datamodule=tasks or make_tasks(), verbose=False)
    return callback
