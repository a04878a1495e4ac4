"""Merging in several processes: which strategies can, and how the processes keep together."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import MPSAccelerator
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torchmetrics import Metric

from com_lightning.core.sweep.distributed import ENDED, PeerError, Peers, ProcessGroup
from com_lightning.errors import MergeError


def require_mergeable(trainer: Trainer, output_dir: str | None) -> None:
    """Refuse trainers that would merge wrongly, or in vain.

    Args:
        trainer: the trainer.
        output_dir: where the result is written.

    Raises:
        MergeError: for a strategy that shards the model, a result that nobody would see, layers that are
            replaced, a device without float64.
    """
    problems, strategy = [], trainer.strategy
    if trainer.world_size > 1 and not isinstance(strategy, DDPStrategy):
        problems.append(
            f"strategy: {type(strategy).__name__} may keep a part of the model in each process, and a layer is solved "
            "as a whole; use strategy=ddp, or devices=1, and offload='layers' if the model is large. Its "
            "checkpoints can be merged as they are"
        )
    if returns_nothing(trainer) and not output_dir:
        problems.append("output_dir: the processes of this strategy end with the merge; say where to write the result")
    if isinstance(trainer.precision_plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        problems.append(
            f"precision: {type(trainer.precision_plugin).__name__} puts other layers in the place of the experts'; "
            "merge in 32-true or bf16-true, and convert the result"
        )
    if isinstance(trainer.accelerator, MPSAccelerator):
        problems.append("merging solves in float64, which MPS does not have; set accelerator=cpu")
    if problems:
        raise MergeError(problems)


def returns_nothing(trainer: Trainer) -> bool:
    """Return whether the merging processes end with the merge, so that only written files remain (spawn, fork)."""
    return trainer.world_size > 1 and getattr(trainer.strategy, "_start_method", "popen") != "popen"


def peers_of(trainer: Trainer) -> Peers:
    """Return the processes of a trainer that has set up its strategy."""
    return ProcessGroup() if trainer.world_size > 1 and dist.is_initialized() else Peers()


def early_peers(trainer: Trainer) -> Peers:
    """Return the processes of a trainer that has not set up its strategy, if torchrun, SLURM or the like started them.

    If something is wrong on one machine only, such as a missing file, the others learn of it. They would wait for that
    machine otherwise. If Lightning starts the processes, the first one comes this far by itself, and starts the others
    only if nothing is wrong.
    """
    strategy = trainer.strategy
    if trainer.world_size < 2 or not isinstance(strategy, DDPStrategy):
        return Peers()
    environment = strategy.cluster_environment
    # Lightning's own environment says so in all processes but the first.
    if isinstance(environment, LightningEnvironment) or not environment or not environment.creates_processes_externally:
        return Peers()
    environment.validate_settings(num_devices=strategy.num_processes, num_nodes=strategy.num_nodes)
    with _told_of_waiting(trainer):
        strategy.setup_environment()  # the trainer does so again, which changes nothing
    return peers_of(trainer)


WAITING = 20.0
"""Seconds after which a process says that it waits for others to join."""


@contextmanager
def _told_of_waiting(trainer: Trainer) -> Iterator[None]:
    """Say that this process waits for the others. PyTorch waits without a word, for as long as the timeout lasts.

    Raises:
        PeerError: if they do not come in time.
    """
    rank, size = trainer.global_rank, trainer.world_size
    text = f"process {rank} of {size} waits for the others to start; if one was killed, end all and start them again"
    timer = Timer(WAITING, lambda: print(f"com_lightning: {text}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:  # as torch.distributed raises
        raise PeerError(why_alone(rank, size, error)) from error
    finally:
        timer.cancel()


def why_alone(rank: int, size: int, error: BaseException) -> str:
    """Say why a process that could not join the others could not."""
    return (
        f"process {rank} of {size} could not join the others: one was not started, was killed, or has another address "
        "or port. How long it waits is the strategy's timeout: strategy=DDPStrategy(timeout=timedelta(minutes=5)) "
        f"({' '.join(str(error).split())[:200]})"
    )


_PARENT = "COM_LIGHTNING_PARENT"
_PR_SET_PDEATHSIG = 1
"""The signal that Linux sends to a process when the one that started it ends, see prctl(2)."""


@contextmanager
def known_as_parent() -> Iterator[None]:
    """Let the processes that are started within know which process started them, see :func:`end_with_parent`."""
    os.environ[_PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(_PARENT, None)


def join_parent() -> None:
    """Do what :func:`known_as_parent` and :func:`end_with_parent` do, for a trainer that starts processes by itself."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # Lightning gives the processes that it starts other numbers
        os.environ[_PARENT] = str(os.getpid())
    else:
        end_with_parent()


def end_with_parent() -> None:
    """If Lightning started this process for a merge, have it end when the process that started it is killed.

    Otherwise it would wait for that process until the strategy's timeout, which is half an hour. Linux ends it; on
    other systems it waits.

    Raises:
        PeerError: if the process that started this one has ended already.
    """
    parent = int(os.environ.pop(_PARENT, 0))
    if parent in (0, os.getpid()) or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # other signals wait for the call that blocks to return
    if not _is_running(parent):
        raise PeerError(f"the process that started this one {ENDED}")


def _is_running(process: int) -> bool:
    try:  # a process that was killed stays as a zombie until its own parent has taken note
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_on_sigterm(trainer: Trainer) -> None:
    """End the process if it was told to: Lightning only takes note of the signal.

    Raises:
        SIGTERMException: with the status that a process has which the signal ends.
    """
    if trainer.received_sigterm:
        raise SIGTERMException(128 + signal.SIGTERM)


@contextmanager
def together(peers: Peers) -> Iterator[None]:
    """If one process fails here, all do, instead of waiting for it."""
    with peers.shares_failures():
        yield
        peers.exchange(None)  # nobody goes on before all have come this far


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
