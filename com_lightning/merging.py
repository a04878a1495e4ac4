"""The front door: merge experts with one call, with or without data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from com_lightning.callback import ChainOfMergesCallback
from com_lightning.compat import of_other_package
from com_lightning.core.sweep.context import own_modes
from com_lightning.core.sweep.distributed import Peers
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError
from com_lightning.execution import MergeResult
from com_lightning.experts.load import ExpertSource
from com_lightning.memory_estimate import needed
from com_lightning.methods import MergingMethod
from com_lightning.options import MergeOptions
from com_lightning.plan import MergePlan
from com_lightning.strategies import early_peers, end_with_parent, known_as_parent, require_mergeable, together
from com_lightning.validation import borrowed, copy_to_run, default_trainer

__all__ = ["MergeOptions", "MergeResult", "merge"]


def merge(
    model: LightningModule,
    experts: Mapping[str, ExpertSource],
    datamodule: LightningDataModule | Mapping[str, LightningDataModule] | None = None,
    method: MergingMethod | type[MergingMethod] | str | None = None,
    trainer: Trainer | None = None,
    **options: Any,
) -> MergeResult:
    """Merge experts into one model, and validate every task with it.

    Args:
        model: a module of the experts' class; it is not changed.
        experts: task -> its expert, in any form that :class:`~com_lightning.ChainOfMergesCallback` takes.
        datamodule: a :class:`~com_lightning.MergeDataModule`, or task -> its datamodule. Without data nothing is
            validated, and the method must be one that needs none.
        method: the merging rule, its class (``TIES``), or its name (``"TIES(density=0.1)"``); by default
            :class:`~com_lightning.ChainOfMerges`.
        trainer: its device, precision, limits and loggers are used, and it is given back as it was. By default it is a
            trainer with one device that logs nothing.
        options: see :class:`~com_lightning.MergeOptions`.

    Returns:
        The merged modules and the report. With a strategy whose processes end with the merge (spawn, fork) it is empty,
        and the result is in ``output_dir``.

    Raises:
        MergeError: before any calibration batch is read, with all problems at once.

    Example::

        result = merge(model, {"mnist": "mnist.ckpt", "digits": "digits.ckpt"}, {"mnist": MNIST(), "digits": Digits()})
        print(result)
        result.save("merged")
    """
    merger = ChainOfMergesCallback(experts, method, **options)
    run(merger, model, datamodule, trainer or default_trainer())
    return merger.result


def run(
    merger: ChainOfMergesCallback,
    model: LightningModule,
    datamodule: LightningDataModule | Mapping[str, LightningDataModule] | None,
    trainer: Trainer,
    dry_run: bool = False,
) -> MergePlan:
    """Merge, and validate if there are data. The result is in ``merger.result``.

    Args:
        merger: what to merge, and how.
        model: a module of the experts' class; it is not changed.
        datamodule: the data, if there are any.
        trainer: the trainer; it is given back as it was.
        dry_run: only check everything, and estimate the memory.

    Returns:
        The plan, which says what was or would be merged.

    Raises:
        MergeError: with all problems at once.
    """
    if problems := of_other_package("model", model) + of_other_package("trainer", trainer):
        raise MergeError(problems)
    data, options = None if datamodule is None else as_tasks(datamodule), merger.options
    with own_modes(), borrowed(trainer):
        with set_up(trainer, data, options.output_dir, dry_run):
            plan = merger.plan(model, data, becomes_first=False, writes=trainer.is_global_zero)
        if dry_run:
            if data is not None:
                plan.need = needed(plan, trainer, data, options.memory_budget, options.offload)
        elif data is not None:
            first = copy_to_run(next(iter(plan.experts.values())))
            merger.use(plan, first)
            trainer.callbacks.append(merger)  # type: ignore[attr-defined]
            with known_as_parent():
                trainer.validate(first, datamodule=data, verbose=False)
        elif trainer.is_global_zero:  # the other processes would do the same
            merger.use(plan, model)
            merger.merge(model, trainer)
    return plan


@contextmanager
def set_up(
    trainer: Trainer, data: MergeDataModule | None, output_dir: str | None, alone: bool = False
) -> Iterator[None]:
    """Prepare and set up the data. What is raised then, or by the caller within, ends all processes.

    Args:
        trainer: the trainer, whose strategy is not set up yet.
        data: the data, if there are any.
        output_dir: where the result is written.
        alone: whether this process does not wait for others.

    Raises:
        MergeError: if this trainer cannot merge.
    """
    require_mergeable(trainer, output_dir)
    end_with_parent()
    peers = Peers() if alone else early_peers(trainer)
    with together(peers):
        if data is not None:
            data.trainer = trainer
            if peers.size == 1 or trainer.local_rank == 0:
                data.prepare_data()
    with together(peers):
        if data is not None:
            data.setup("validate")
        yield


def as_tasks(datamodule: Any) -> MergeDataModule:
    """Return a user's data as a MergeDataModule.

    Args:
        datamodule: a MergeDataModule, or task -> its datamodule.

    Raises:
        MergeError: for anything else.
    """
    if isinstance(datamodule, Mapping):
        return MergeDataModule(datamodule)
    if isinstance(datamodule, MergeDataModule):
        return datamodule
    if problems := of_other_package("data", datamodule):
        raise MergeError(problems)
    message = "must be a com_lightning.MergeDataModule, which holds every task's data"
    raise MergeError([f"data: {message}; got {type(datamodule).__name__}"])


def _full_signature() -> inspect.Signature:
    signature = inspect.signature(merge)
    named = [parameter for parameter in signature.parameters.values() if parameter.kind != parameter.VAR_KEYWORD]
    options = [
        parameter.replace(kind=parameter.KEYWORD_ONLY)
        for name, parameter in inspect.signature(MergeOptions).parameters.items()
    ]
    return signature.replace(parameters=[*named, *options])


merge.__signature__ = _full_signature()  # type: ignore[attr-defined]
