"""A calibration forward calls a module's hooks as Lightning does."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import LightningModule

from com_lightning.data.steps import Batch, CalibrationStep
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
    CalibrationStep(quiet_trainer())(module, Batch(batch, 1, None), 5)
    seen = module.seen
    assert isinstance(seen, tuple)
    assert seen[1:] == (5, 1)[: count - 1]
