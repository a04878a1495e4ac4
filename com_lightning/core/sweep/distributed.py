"""The processes that merge together, each with its own share of the calibration data."""

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

from com_lightning.core.tensors import private_torch

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds that a process which gives up waits for the others to hear of it."""

ROLL_CALL = 2.0
"""Seconds for those that are left to say so, once a connection is lost."""

ENDED = (
    "has ended without a word: it was killed, most often because memory ran out (then lower data.num_samples, or use "
    "fewer processes on each machine), or it crashed; see its own output, and the system's log"
)
"""What is said of a process that is gone."""


class PeerError(RuntimeError):
    """Another process has failed, with this message."""


class Peers:
    """A process on its own. With others, see :class:`ProcessGroup`."""

    rank = 0
    size = 1

    def exchange(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of ranks.

        Raises:
            PeerError: if another process has failed.
        """
        return [value]

    def add(self, tensor: Tensor, owner: int) -> None:
        """Add everyone's tensors, in place at the owner; what the others then hold is undefined."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite everyone's tensor with the owner's."""

    def report_failure(self, error: BaseException) -> None:
        """Tell the others that this process gives up. Returns within seconds, whatever happens."""

    def explain(self, error: BaseException) -> None:
        """Note what it means if an error is that of a lost connection, in a call that is not ours."""

    @contextmanager
    def shares_failures(self) -> Iterator[None]:
        """What is raised here is told to the others, which would wait for this process otherwise."""
        try:
            yield
        except BaseException as error:
            self.report_failure(error)
            raise


class ProcessGroup(Peers):
    """The processes of ``torch.distributed``'s default group. All meet in the same order of calls.

    A process that raises tells the others in the next exchange. One that is killed tells nobody, but its connections
    break: whoever waits for it, then or later, gets a :class:`PeerError` at once.
    """

    def __init__(self) -> None:
        self.rank, self.size, self._over = dist.get_rank(), dist.get_world_size(), False
        # What is exchanged is small, and goes through gloo also where tensors go through NCCL: gloo's calls return when
        # the process at the other end dies, while a call that waits for a GPU waits for as long as the strategy allows.
        self._group: Any = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        self._where: list[str] = self._exchange(f"pid {os.getpid()} on {socket.gethostname()}")

    def exchange(self, value: T) -> list[T]:
        return self._exchange(value)

    def add(self, tensor: Tensor, owner: int) -> None:
        with self._in_touch():
            dist.reduce(tensor, owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        received = tensor.contiguous() if self.rank == owner else torch.empty_like(tensor)
        with self._in_touch():
            dist.broadcast(received, owner)
        if self.rank != owner:
            tensor.copy_(received)  # which counts as a new version of it, unlike what is received in place

    def report_failure(self, error: BaseException) -> None:
        if self._over:  # all know
            return
        self._over = True
        told = f"{type(error).__name__}: {error}" + "".join(f"; {n}" for n in getattr(error, "__notes__", ()))
        teller = Thread(target=self._tell, args=(told, isinstance(error, Exception)), name="tell-peers", daemon=True)
        teller.start()
        teller.join(PATIENCE)

    def explain(self, error: BaseException) -> None:
        lost = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST)
        if lost and not isinstance(error, PeerError):
            self._over = True
            error.add_note(self._loss(error))

    def _tell(self, told: str, meet: bool) -> None:
        # Others may be in a long forward, or wait elsewhere than in an exchange. They are not waited for: with the end
        # of this process their connections break, and then they look into the store.
        with suppress(Exception):
            _store().set(f"{_KEY}/failed/{self.rank}", told)
        if meet:  # Ctrl-C comes at any time, in the middle of an exchange too: gloo aborts where calls do not match
            with suppress(Exception):
                self._exchange(_Failure(told))

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with self._in_touch():
            dist.all_gather_object(values, value, self._group)
        for rank, other in enumerate(values):
            if isinstance(other, _Failure) and rank != self.rank:
                self._over = True
                raise PeerError(self._failed(rank, other.told))
        return values

    def _failed(self, rank: int, told: str) -> str:
        return f"process {rank} of {self.size} failed: {told}"

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what torch.distributed raises for whatever goes wrong
            self._over = True
            raise PeerError(self._loss(error)) from error

    def _loss(self, error: BaseException) -> str:
        """Why a connection broke, as far as that can be known."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent, told = self._roll_call(others)
        for rank, message in told.items():
            return self._failed(rank, message)
        # A process that is busy does not answer either, so that with several it may be any of them.
        names = [f"{rank} of {self.size} ({self._where[rank]})" for rank in silent or others]
        who = f"process {names[0]}" if len(names) == 1 else f"one of the processes {', '.join(names)}"
        if "timed out" in str(error).lower():
            return (
                f"{who} did not come within the time that processes wait for each other; if it is not stuck but slow, "
                "give more: strategy=DDPStrategy(timeout=timedelta(hours=2))"
            )
        return f"{who} {ENDED}"

    def _roll_call(self, others: list[int]) -> tuple[list[int], dict[int, str]]:
        """Who does not answer, the one that has gone among them; and what those that gave up have left to say."""
        silent, told = others, dict[int, str]()
        with suppress(Exception):  # the store may have gone with the process that kept it
            store, end = _store(), time.monotonic() + ROLL_CALL
            store.set(f"{_KEY}/here/{self.rank}", "")
            while True:
                given_up = [rank for rank in others if store.check([f"{_KEY}/failed/{rank}"])]
                told = {rank: store.get(f"{_KEY}/failed/{rank}").decode() for rank in given_up}
                silent = [rank for rank in others if not store.check([f"{_KEY}/here/{rank}"])]
                if told or len(silent) <= 1 or time.monotonic() > end:
                    break
                time.sleep(0.02)
        return silent, told


_KEY = "com_lightning"
_LOST = ("closed by peer", "reset by peer", "broken pipe", "remote process exited", "timed out")
"""What the errors of gloo and NCCL say when the process at the other end has gone."""


def _store() -> Any:
    return private_torch.default_store()


class _Failure:
    def __init__(self, told: str) -> None:
        self.told = told
