"""Validation of every task with its own module, through ``trainer.validate``, on one device."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from tqdm.auto import tqdm

from com_lightning.core.tensors.modules import renewed
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.strategies import alone


def single_device_trainer(trainer: Trainer) -> Trainer:
    """A trainer with the accelerator, precision and limits of another, on its device alone, that logs nowhere.

    Metrics of one device are exact: nothing is padded or averaged over ranks.
    """
    device = trainer.strategy.root_device
    return Trainer(
        accelerator=device.type,
        devices=[device.index] if device.index is not None else 1,
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        limit_test_batches=trainer.limit_test_batches,
        logger=DummyLogger(),  # modules may use `self.logger` in their steps
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=trainer.validate_loop.inference_mode,
        default_root_dir=trainer.default_root_dir,
        plugins=[LightningEnvironment()],  # that of a cluster would ask for all of its processes
    )


def validate_tasks(
    trainer: Trainer,
    modules: Mapping[str, LightningModule],
    tasks: MergeDataModule,
    description: str,
    quiet: bool = False,
    stage: str = "validate",
    prepared: bool = False,
) -> dict[str, dict[str, float]]:
    """Validate each task with its module.

    Args:
        trainer: a single-device trainer, see :func:`single_device_trainer`.
        modules: task -> module.
        tasks: the data.
        description: of the progress bar.
        quiet: whether to show none.
        stage: ``"validate"`` or ``"test"``.
        prepared: whether the data have been prepared already.

    Returns:
        Task -> metric -> value, whatever the module's ``validation_step`` logs.
    """
    results: dict[str, dict[str, float]] = {}
    # Modules moved or converted under the inference mode of an outer trainer could never be trained again.
    with torch.inference_mode(False), quiet_lightning():
        for task, module in tqdm(modules.items(), desc=description, leave=False, disable=quiet):
            run = trainer.validate if stage == "validate" else trainer.test
            own = renewed(module)  # which Lightning moves and converts
            assert isinstance(own, LightningModule)
            with alone(own):
                logged = run(own, datamodule=tasks.task(task, prepared), verbose=False)
            merged: dict[str, Any] = {}
            for part in logged:  # one per loader, where a task has several
                merged.update(part)
            results[task] = {metric: float(value) for metric, value in merged.items()}
    return results


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's notes on available devices and the like are said once by the outer trainer, not once per task."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
