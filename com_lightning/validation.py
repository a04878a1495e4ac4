"""Validation of every task with its own module, through ``trainer.validate``, on one device."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.utilities.model_helpers import is_overridden

from com_lightning.core.sweep.context import Progress, each, no_progress
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.tensors.modules import copy_on_same_storage, named_tensors
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.data.trainer_view import muted
from com_lightning.errors import MergeError
from com_lightning.strategies import alone, end_on_sigterm


def default_trainer(accelerator: str = "auto") -> Trainer:
    """Return a trainer with one device that logs and saves nothing.

    Args:
        accelerator: as for ``Trainer``. ``"auto"`` is the CPU where the accelerator cannot merge (MPS has no float64).
    """
    if accelerator == "auto" and MPSAccelerator.is_available():
        accelerator = "cpu"
    with quiet_lightning():
        return Trainer(
            accelerator=accelerator, devices=1, logger=False, enable_checkpointing=False, enable_model_summary=False
        )


def single_device_trainer(trainer: Trainer) -> Trainer:
    """Return a trainer with the accelerator, precision and limits of another, on its device alone, that logs nowhere.

    Metrics of one device are exact: nothing is padded or averaged over ranks.
    """
    device = trainer.strategy.root_device
    with quiet_lightning():
        return Trainer(
            accelerator=device.type,
            devices=[device.index] if device.index is not None else 1,
            precision=trainer.precision,
            limit_val_batches=trainer.limit_val_batches,
            limit_test_batches=trainer.limit_test_batches,
            logger=muted(trainer.loggers),  # modules may use `self.logger` in their steps
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[_EndsOnSigterm()],
            inference_mode=trainer.validate_loop.inference_mode,
            default_root_dir=trainer.default_root_dir,
            plugins=[LightningEnvironment()],  # that of a cluster would ask for all of its processes
        )


class _EndsOnSigterm(Callback):
    def on_validation_batch_end(self, trainer: Trainer, *batch: Any) -> None:
        end_on_sigterm(trainer)

    def on_test_batch_end(self, trainer: Trainer, *batch: Any) -> None:
        end_on_sigterm(trainer)


def copy_to_run(module: LightningModule) -> LightningModule:
    """A copy for a trainer, which moves and converts it. It has the same storage, unless setup may write to that."""
    copied = copy.deepcopy(module) if is_overridden("setup", module) else copy_on_same_storage(module)
    assert isinstance(copied, LightningModule)
    return copied


class _KeepsWeights(Callback):
    """Puts the weights of a module back that its ``setup`` has built anew, or written to."""

    def __init__(self, module: LightningModule, label: str) -> None:
        self.module, self.label = module, label

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keep_weights(pl_module, self.module, self.label)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        keep_weights(pl_module, self.module, self.label)


@torch.no_grad()
def keep_weights(module: LightningModule, source: LightningModule, label: str) -> None:
    """Give a module that was set up the weights of another one.

    Args:
        module: the module.
        source: has the weights.
        label: what messages call the module.

    Raises:
        MergeError: if their parameters or buffers differ.
    """
    values = {name: tensor for name, tensor, _ in named_tensors(source)}
    ours = {name: tensor for name, tensor, _ in named_tensors(module)}
    for name in {**values, **ours}:
        shapes = [tuple(tensors[name].shape) if name in tensors else "missing" for tensors in (ours, values)]
        if shapes[0] != shapes[1]:
            raise MergeError(
                [
                    f"{label}: after its setup, {name} of {type(module).__name__} is {shapes[0]}, in the merge "
                    f"{shapes[1]}; build layers in __init__ or configure_model"
                ]
            )
    for name, tensor in ours.items():
        tensor.copy_(values[name])


@contextmanager
def _keeping_weights(trainer: Trainer, module: LightningModule, label: str) -> Iterator[None]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    before = list(callbacks)
    if is_overridden("setup", module):
        callbacks.append(_KeepsWeights(module, label))
    try:
        yield
    finally:
        callbacks[:] = before


def validate_tasks(
    trainer: Trainer,
    modules: Mapping[str, LightningModule],
    tasks: MergeDataModule,
    label: str,
    progress: Progress = no_progress,
    stage: str = "validate",
    prepared: bool = False,
    peers: Peers | None = None,
) -> dict[str, dict[str, float]]:
    """Validate each task with its module. Several processes share the tasks out, and all get all results.

    Args:
        trainer: a single-device trainer, see :func:`single_device_trainer`.
        modules: task -> module.
        tasks: the data.
        label: what is validated, for the progress.
        progress: draws it.
        stage: ``"validate"`` or ``"test"``.
        prepared: whether the data have been prepared already.
        peers: the processes; ``None``: this one validates all tasks.

    Returns:
        Task -> metric -> value, as the module's ``validation_step`` logs them.
    """
    peers, results = peers or Peers(), dict[str, dict[str, float]]()
    mine = {task: modules[task] for task in list(modules)[peers.rank :: peers.size]}
    evaluate = trainer.validate if stage == "validate" else trainer.test
    # Modules moved or converted under the inference mode of an outer trainer could never be trained again.
    with torch.inference_mode(False), quiet_lightning():
        for task, module in each(list(mine.items()), progress, f"validating {label}"):
            copied = copy_to_run(module)
            with alone(copied), _keeping_weights(trainer, module, f"task '{task}'"):
                logged = evaluate(copied, datamodule=tasks.task(task, prepared), verbose=False)
            # Lightning returns one dictionary for each of the task's loaders.
            results[task] = {metric: float(value) for metrics in logged for metric, value in metrics.items()}
    everything = {task: metrics for share in peers.exchange(results) for task, metrics in share.items()}
    return {task: everything[task] for task in modules}


@contextmanager
def borrowed(trainer: Trainer, **changes: Any) -> Iterator[None]:
    """Change a trainer for a while, and give it back as it was, also when something raises.

    Its loggers, callbacks, datamodule, model, stage, metrics and progress are what they were before.

    Args:
        trainer: the trainer.
        changes: name -> value of attributes to set meanwhile, such as ``loggers`` or ``datamodule``.
    """
    connectors = (trainer._logger_connector, trainer._data_connector, trainer.state)
    owners = [*connectors, trainer.validate_loop, trainer.test_loop]
    before = [dict(vars(owner)) for owner in owners]
    names = ("callbacks", "loggers", "datamodule")
    attributes = {name: getattr(trainer, name) for name in names if hasattr(trainer, name)}
    callbacks, modules = list(trainer.callbacks), (trainer.strategy._lightning_module, trainer.strategy._model)  # type: ignore[attr-defined]
    for owner, values in zip(owners, before):
        vars(owner).update({n: copy.copy(value) for n, value in values.items() if type(value) in (dict, list)})
        if "batch_progress" in values:
            vars(owner)["batch_progress"] = copy.deepcopy(values["batch_progress"])
    try:
        for name, value in changes.items():
            setattr(trainer, name, value)
        yield
    finally:
        for name, value in attributes.items():
            setattr(trainer, name, value)
        trainer.callbacks[:] = callbacks  # type: ignore[attr-defined]
        trainer.strategy._lightning_module, trainer.strategy._model = modules
        for owner, values in zip(owners, before):
            vars(owner).clear()
            vars(owner).update(values)


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
