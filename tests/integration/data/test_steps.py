"""A calibration forward calls a module's hooks as Lightning does."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from com_lightning.data.steps import Batch, CalibrationStep, _copied
from tests.helpers import Classifier, make_data, quiet_trainer


class Short(Classifier):
    """The hooks' signature since Lightning 2, for one loader."""

    seen: tuple[Any, ...] = ()

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.seen = (batch, batch_idx)


class Long(Classifier):
    seen: tuple[Any, ...] = ()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen = (batch, batch_idx, dataloader_idx)


@pytest.mark.parametrize(("module", "count"), [(Short(), 2), (Long(), 3)])
def test_hooks_of_both_signatures(module: LightningModule, count: int) -> None:
    batch = next(iter(make_data(0).val_dataloader()))
    CalibrationStep(quiet_trainer())(module, Batch(batch, 1), 5)
    seen = module.seen
    assert isinstance(seen, tuple)
    assert seen[1:] == (5, 1)[: count - 1]


class Graph:
    """A batch object of the user's own, as those of graph libraries."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.notes = x, {"seen": 0}


class InPlace(Classifier):
    def calibration_step(self, batch: Any) -> None:
        batch.x = batch.x * 2
        batch.x += 1
        batch.notes["seen"] += 1


def test_batch_objects_that_a_step_changes_stay_as_they_were() -> None:
    graph = Graph(torch.ones(2, 6))
    for _ in range(2):
        CalibrationStep(quiet_trainer())(InPlace(), Batch(graph, 0), 0)
    assert torch.equal(graph.x, torch.ones(2, 6))
    assert graph.notes == {"seen": 0}


def test_a_batch_that_cannot_be_copied_is_told_of() -> None:
    batch = {"x": torch.ones(2), "lock": threading.Lock()}
    with pytest.warns(UserWarning, match="cannot be copied .*lock"):
        copied = _copied(batch)
    assert copied["x"] is not batch["x"]


def test_of_a_large_storage_only_the_batch_is_copied() -> None:
    batch = _copied([torch.zeros(1_000_000)[:2]])
    assert batch[0].untyped_storage().nbytes() == 8
