"""What a step sees as ``self.trainer``: the trainer, with the data of its own task, and with loggers that log nothing.

A calibration forward of task b runs while the trainer holds the data of all tasks, and its loaders are those of the
first one. As in ``trainer.validate(model, datamodule=b)``, ``self.trainer.datamodule`` has to be b.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from types import FunctionType
from typing import Any, TypeVar

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import CombinedLoader

from com_lightning.data.datamodule import MergeDataModule

T = TypeVar("T")

_WRITING = ("log", "save", "finalize", "after_", "watch", "unwatch")
"""How the names of a logger's methods begin that write something."""


def trainer_of_task(trainer: Trainer, data: MergeDataModule, task: str) -> Trainer:
    """Return a view of a trainer for the steps of one task. All processes have to call this.

    Args:
        trainer: the trainer. Everything else is its own.
        data: the data of all tasks, set up.
        task: name of the task.

    Returns:
        An instance of the trainer's class.
    """
    loggers = muted(trainer.loggers)
    log_dir = trainer.log_dir  # asks process 0, which no step can do by itself: not all processes run it as often
    loaders = cache(lambda: data.validation_loaders(task))
    return _view(
        trainer,
        datamodule=property(lambda self: data.tasks[task]),
        val_dataloaders=property(lambda self: loaders()),
        num_val_batches=property(lambda self: _lengths(loaders(), trainer.limit_val_batches)),
        loggers=property(lambda self: loggers),
        logger=property(lambda self: loggers[0]),
        log_dir=property(lambda self: log_dir),
    )


def muted(loggers: Sequence[Logger]) -> list[Logger]:
    """Return views of loggers: of the same classes, with the same folders and versions, that write nothing.

    Args:
        loggers: the loggers. If there are none, the result is one dummy, because modules may use ``self.logger``.
    """
    return [_muted(logger) for logger in loggers] or [DummyLogger()]


def _muted(logger: Logger) -> Logger:
    methods = [(name, inspect.getattr_static(type(logger), name)) for name in dir(type(logger))]
    writing: dict[str, Any] = {
        name: _nothing for name, value in methods if name.startswith(_WRITING) and isinstance(value, FunctionType)
    }
    experiment = DummyLogger().experiment
    return _view(logger, experiment=property(lambda self: experiment), **writing)


def _nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    return None


def _view(target: T, **attributes: property | Callable[..., Any]) -> T:
    """An object of the same class and with the same attributes, but for some that are replaced."""
    cls = type(type(target).__name__, (type(target),), {"__module__": type(target).__module__, **attributes})
    view: T = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(target))
    return view


def _lengths(loaders: Any, limit: int | float | None) -> list[int | float]:
    """Number of batches that a trainer validates on, for each loader."""
    lengths: list[int | float] = []
    for loader in CombinedLoader(loaders, "sequential").flattened:
        length = sized_len(loader)
        size: int | float = float("inf") if length is None else length
        share = isinstance(limit, float) and size != float("inf")
        lengths.append(size if limit is None else int(size * limit) if share else min(size, limit))
    return lengths
