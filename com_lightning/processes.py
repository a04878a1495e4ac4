"""Merging in several processes: which strategies can, and how the processes keep together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.strategies import DDPStrategy
from torchmetrics import Metric

from com_lightning.checkpoints import MergeError
from com_lightning.core.peers import Peers, ProcessGroup


def require_mergeable(trainer: Trainer, output_dir: str | None) -> None:
    """Refuse what would merge wrongly, or to no avail.

    Raises:
        MergeError: for a strategy that shards the model, a result that nobody would see, a device without float64.
    """
    problems, strategy = [], trainer.strategy
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        problems.append(
            f"strategy: {type(strategy).__name__} may keep a part of the model in each process, and a layer is solved "
            "as a whole; use strategy=ddp, or devices=1"
        )
    if returns_nothing(trainer) and not output_dir:
        problems.append("output_dir: the processes of this strategy end with the merge; say where to write the result")
    if isinstance(trainer.accelerator, MPSAccelerator):
        problems.append("merging solves in float64, which MPS does not have; set accelerator=cpu")
    if problems:
        raise MergeError(problems)


def returns_nothing(trainer: Trainer) -> bool:
    """Whether the merge is done by processes of which nothing comes back but what they write (spawn, fork)."""
    return trainer.world_size > 1 and getattr(trainer.strategy, "_start_method", "popen") != "popen"


def peers_of(trainer: Trainer) -> Peers:
    """The processes of a trainer that has set up its strategy."""
    return ProcessGroup() if trainer.world_size > 1 and dist.is_initialized() else Peers()


@contextmanager
def together(peers: Peers) -> Iterator[None]:
    """Where one process fails, all do, instead of waiting for it."""
    try:
        yield
        peers.exchange(None)  # nobody goes on before all have come this far
    except BaseException as error:
        peers.fail(error)
        raise


@contextmanager
def alone(module: LightningModule) -> Iterator[None]:
    """Metrics of a module that only this process validates do not wait for the others."""
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    before = [metric.distributed_available_fn for metric in metrics]
    try:
        for metric in metrics:
            metric.distributed_available_fn = _nobody
        yield
    finally:
        for metric, available in zip(metrics, before):
            metric.distributed_available_fn = available


def _nobody() -> bool:
    return False
