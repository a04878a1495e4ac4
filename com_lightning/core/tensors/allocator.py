"""Settings of the C library's memory allocator, which PyTorch uses on a CPU.

A merge allocates and frees activations of many megabytes thousands of times. Two things go wrong.

What is freed between activations that are still held is too small for others, and stays with the process. With all
batches waiting at a layer, that grew to the size of the activations themselves (measured). A sweep returns it to the
system, see :class:`ScatteredMemory`.

As soon as some megabytes at the end of the heap are free, glibc returns them to the system. When it requests them
again, the system fills them with zeros. That takes a fifth of a merge's time (measured). The command line keeps them,
see :func:`keep_freed_memory`. The library does not, because the settings apply to the whole process, and that is the
user's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``. The first one bounds the free bytes at the end of the heap. Allocations with at
least as many bytes as the second one are made outside the heap."""

KEPT_BYTES = 2**29
"""Free bytes at the end of the heap that are kept for later allocations."""

MAX_MMAP_THRESHOLD = 2**25
"""The largest value that glibc accepts for the second parameter."""

_STATM = "/proc/self/statm"
"""Where Linux tells what memory a process has, in pages."""

SCATTERED_BYTES = 2**29
"""By how many bytes a process grows in a sweep before what is free of them is returned."""

DEFAULT_THRESHOLD = 2**17
"""The value of both parameters in a new process."""


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory for later allocations. On exit, return it to the system and restore glibc's thresholds."""
    try:
        _set(MAX_MMAP_THRESHOLD, KEPT_BYTES)
        yield
    finally:
        _set(DEFAULT_THRESHOLD, DEFAULT_THRESHOLD)
        return_freed_memory()


def return_freed_memory() -> None:
    """Return all freed memory of the heap to the system."""
    if library := _glibc():
        library.malloc_trim(0)


class ScatteredMemory:
    """Returns memory that was freed between memory in use, each time the process has grown by much.

    To return it at once would cost more: what is allocated next would have to be filled with zeros again. To ask glibc
    how much is free takes as long as to return it, as both go through all free pieces of the heap.
    """

    def __init__(self) -> None:
        self._library = _glibc() if os.access(_STATM, os.R_OK) else None
        self._before = self._resident()

    def tidy(self) -> None:
        """Return it, if the process has grown by :data:`SCATTERED_BYTES` since the last time. This is fast."""
        if self._library is None:
            return
        now = self._resident()
        self._before = min(self._before, now)
        if now - self._before > SCATTERED_BYTES:
            self._library.malloc_trim(0)
            self._before = self._resident()

    def _resident(self) -> int:
        """Bytes of memory that the process has, mapped files apart."""
        if self._library is None:
            return 0
        with open(_STATM, encoding="ascii") as file:
            _, resident, of_files = map(int, file.read().split()[:3])
        return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    if library := _glibc():
        library.mallopt(_MMAP_THRESHOLD, mmap_threshold)
        library.mallopt(_TRIM_THRESHOLD, trim_threshold)


def _glibc() -> Any:
    """The C library, or ``None`` if it is not glibc."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt, library.malloc_trim, library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    return library


def automatic_budget(held: float, free: int, reserved: int) -> int | None:
    """Return how many bytes paused forwards may hold, if they would need most of the memory.

    Args:
        held: what they hold without a limit, as far as it can be estimated.
        free: memory that nothing uses.
        reserved: what statistics and solution of a layer need of it.

    Returns:
        The budget; ``None`` if everything fits.

    Example::

        >>> automatic_budget(600, free=1000, reserved=200), automatic_budget(700, free=1000, reserved=200)
        (None, 480)
    """
    spare = max(free - reserved, 0)
    return None if held <= 0.8 * spare else int(0.6 * spare)


def free_memory(device: torch.device) -> int | None:
    """The bytes of memory that nothing uses; ``None`` where that cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # what the kernel would give, caches too
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
