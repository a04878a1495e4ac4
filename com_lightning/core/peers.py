"""The processes that merge together, each with its own share of the calibration data."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class PeerError(RuntimeError):
    """Another process has failed, with this message."""


class Peers:
    """A process on its own. With others, see :class:`ProcessGroup`."""

    rank = 0
    size = 1

    def exchange(self, value: T) -> list[T]:
        """Everyone's value, in the order of ranks.

        Raises:
            PeerError: if another process has failed.
        """
        return [value]

    def add(self, tensor: Tensor, owner: int) -> None:
        """Add everyone's tensors, in place at the owner; what the others then hold is undefined."""

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        """Overwrite everyone's tensor with the owner's."""

    def fail(self, error: BaseException) -> None:
        """Tell the others, wherever they next meet, that this process gives up."""


class ProcessGroup(Peers):
    """The processes of ``torch.distributed``'s default group. All meet in the same order of calls."""

    def __init__(self) -> None:
        self.rank, self.size, self._over = dist.get_rank(), dist.get_world_size(), False

    def exchange(self, value: T) -> list[T]:
        return self._exchange(value)

    def add(self, tensor: Tensor, owner: int) -> None:
        dist.reduce(tensor, owner)

    def broadcast(self, tensor: Tensor, owner: int) -> None:
        received = tensor.contiguous() if self.rank == owner else torch.empty_like(tensor)
        dist.broadcast(received, owner)
        if self.rank != owner:
            tensor.copy_(received)  # which counts as a new version of it, unlike what is received in place

    def fail(self, error: BaseException) -> None:
        if not self._over:  # or else all know
            self._over = True
            told = f"{type(error).__name__}: {error}" + "".join(f"; {n}" for n in getattr(error, "__notes__", ()))
            with suppress(PeerError):  # others have failed too: each tells its own error
                self._exchange(_Failure(told))

    def _exchange(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        for rank, other in enumerate(values):
            if isinstance(other, _Failure) and rank != self.rank:
                self._over = True
                raise PeerError(f"process {rank} of {self.size} failed: {other.told}")
        return values


class _Failure:
    def __init__(self, told: str) -> None:
        self.told = told
