"""The processes of a merge. Each has its own part of the calibration data."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from com_lightning.core.tensors import private_torch
from com_lightning.errors import MergeError

T = TypeVar("T")

FAILURE_TIMEOUT = 10.0
"""Seconds that a failed process waits for the others to receive its error message."""

ROLL_CALL_TIMEOUT = 2.0
"""Seconds that the remaining processes have to respond after a connection was lost."""

ENDED = (
    "has ended without an error message. It was killed, most often because memory ran out (then lower "
    "data.num_samples, or use fewer processes on each machine), or it crashed. See its output and the system's log"
)
"""Continues a message that begins with the name of a process."""


class PeerError(RuntimeError):
    """Another process has failed. The message is that process's error message."""


class NoCommunication(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises a MergeError where a forward communicates: processes have unequal numbers of forwards, and would wait.

    Args:
        who: what the message calls the forward's module.
    """

    supports_higher_order_operators = True

    def __init__(self, who: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.who = who

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if private_torch.is_operator(func) and func.namespace in ("c10d", "_c10d_functional"):
            raise MergeError(
                [
                    f"{self.who} communicates with the other processes in its forward ({func}), but they have unequal "
                    "numbers of calibration batches, and would wait for each other. Merge with devices=1, or without "
                    "all_gather, synchronised metrics and torch.distributed there: give the module a "
                    "calibration_step(batch) that only runs the network"
                ]
            )
        return func(*args, **(kwargs or {}))


class Peers:
    """Communication between the processes of a merge: here a single process. For several, see :class:`ProcessGroup`."""

    rank = 0
    size = 1
    has_lost = False
    """Whether another process was killed or interrupted."""

    def exchange(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of ranks.

        Raises:
            PeerError: if another process has failed.
        """
        return [value]

    def add(self, tensor: Tensor, owner: int) -> None:
        """Add the tensors of all processes, in place at the owner. The other tensors then have undefined values."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite the tensor of each process with the owner's."""

    def report_failure(self, error: BaseException) -> None:
        """Report an error to the other processes. Returns within seconds in any case."""

    def explain(self, error: BaseException) -> None:
        """Add a note to an error of ``torch.distributed`` outside this class, if a lost connection caused it."""

    @contextmanager
    def shares_failures(self) -> Iterator[None]:
        """Report exceptions in this context to the other processes. Otherwise they would wait for this process."""
        try:
            yield
        except BaseException as error:
            self.report_failure(error)
            raise


class Alike(Peers):
    """One of several processes of which no other has been started, and which would all have the same values.

    Args:
        rank: number of this process.
        size: number of processes.
    """

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def exchange(self, value: T) -> list[T]:
        return [value] * self.size


class ProcessGroup(Peers):
    """The processes of ``torch.distributed``'s default group. All must make the same calls in the same order.

    A process that raises an exception reports it in the next exchange. A process that is killed cannot report anything.
    But its connections break, and processes that wait for it get a :class:`PeerError` at once.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._has_failed = dist.get_rank(), dist.get_world_size(), False
        # Exchanges are small. They use gloo even if tensors use NCCL: gloo's calls return when the other process dies,
        # while a call that waits for a GPU returns only after the strategy's timeout.
        self._group: Any = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._locations: list[str] = self._exchange(f"pid {os.getpid()} on {socket.gethostname()}")

    def exchange(self, value: T) -> list[T]:
        return self._exchange(value)

    def add(self, tensor: Tensor, owner: int) -> None:
        with self._explains_errors():
            dist.reduce(tensor, owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        received = tensor.contiguous() if self.rank == owner else torch.empty_like(tensor)
        with self._explains_errors():
            dist.broadcast(received, owner)
        if self.rank != owner:
            tensor.copy_(received)  # this increments the version counter; receiving in place would not

    def report_failure(self, error: BaseException) -> None:
        if self._has_failed:  # the others know already
            return
        self._has_failed = True
        message = f"{type(error).__name__}: {error}" + "".join(f"; {n}" for n in getattr(error, "__notes__", ()))
        thread = Thread(
            target=self._send_failure, args=(message, isinstance(error, Exception)), name="tell-peers", daemon=True
        )
        thread.start()
        thread.join(FAILURE_TIMEOUT)

    def explain(self, error: BaseException) -> None:
        lost = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)
        if lost and not isinstance(error, PeerError):
            self._has_failed = True
            error.add_note(self._explain_loss(error))

    def _send_failure(self, message: str, is_between_calls: bool) -> None:
        # The others may be in a long forward, or wait outside an exchange. This process does not wait for them. When it
        # ends, their connections break, and they read the message from the store.
        with suppress(Exception):
            _store().set(f"{_KEY}/failed/{self.rank}", message)
        if is_between_calls:  # Ctrl-C may interrupt an exchange, and gloo aborts the process if calls do not match
            with suppress(Exception):
                self._exchange(_Failure(message))

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._explains_errors():
            dist.all_gather_object(values, value, self._group)
        for rank, other in enumerate(values):
            if isinstance(other, _Failure) and rank != self.rank:
                self._has_failed = True
                raise PeerError(self._failure_message(rank, other.message))
        return values

    def _failure_message(self, rank: int, message: str) -> str:
        self.has_lost = message.startswith(_INTERRUPTED)
        return f"process {rank} of {self.size} failed: {message}"

    @contextmanager
    def _explains_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # torch.distributed raises no more specific exception
            self._has_failed = True
            raise PeerError(self._explain_loss(error)) from error

    def _explain_loss(self, error: BaseException) -> str:
        """Describe why a connection broke, as far as this process can find out."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent, messages = self._roll_call(others)
        for rank, message in messages.items():
            return self._failure_message(rank, message)
        # A busy process does not respond either. So with several silent processes, any of them may have ended.
        names = [f"{rank} of {self.size} ({self._locations[rank]})" for rank in silent or others]
        who = f"process {names[0]}" if len(names) == 1 else f"one of the processes {', '.join(names)}"
        if "timed out" in str(error).lower():
            return (
                f"{who} did not respond within the strategy's timeout. If it is slow rather than stuck, raise the "
                "timeout: strategy=DDPStrategy(timeout=timedelta(hours=2))"
            )
        self.has_lost = True
        return f"{who} {ENDED}"

    def _roll_call(self, others: list[int]) -> tuple[list[int], dict[int, str]]:
        """Ask all processes to respond. Returns the ranks that are silent, and the messages of those that failed."""
        silent, messages = others, dict[int, str]()
        with suppress(Exception):  # the process that had the store may be the one that ended
            store, end = _store(), time.monotonic() + ROLL_CALL_TIMEOUT
            store.set(f"{_KEY}/here/{self.rank}", "")
            while True:
                failed = [rank for rank in others if store.check([f"{_KEY}/failed/{rank}"])]
                messages = {rank: store.get(f"{_KEY}/failed/{rank}").decode() for rank in failed}
                silent = [rank for rank in others if not store.check([f"{_KEY}/here/{rank}"])]
                if messages or len(silent) <= 1 or time.monotonic() > end:
                    break
                time.sleep(0.02)
        return silent, messages


_KEY = "com_lightning"
_LOST = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "timed out")
"""Words in the errors of gloo and NCCL after the other process has ended."""
_INTERRUPTED = ("KeyboardInterrupt", "SystemExit", "SIGTERMException")
"""What a process raises that was told to end."""


def _store() -> Any:
    return private_torch.default_store()


class _Failure:
    def __init__(self, message: str) -> None:
        self.message = message
