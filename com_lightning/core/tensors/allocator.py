"""How PyTorch gets memory on a CPU: from the C library, whose settings are the process's.

A merge allocates and frees activations of many megabytes thousands of times. glibc gives what is free at the end of its
heap back to the system as soon as there are some megabytes of it, and a system's pages are filled with zeros when they
are asked for again: a fifth of a merge's time (tried).
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``: what may be free at the end of the heap, and from what size on an allocation is
no part of the heap, in bytes."""

KEPT = 2**29
"""Bytes at the end of the heap that are kept for what is allocated next."""

LARGEST = 2**25
"""The highest that glibc lets the second of these be, and comes to by itself as allocations of such sizes are freed;
the first is then twice as much."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory for what is allocated next. No more than glibc itself would keep is kept afterwards."""
    try:
        _set(LARGEST, KEPT)
        yield
    finally:
        _set(LARGEST, 2 * LARGEST)
        give_back()


def give_back() -> None:
    """Give freed memory back to the system, wherever in the heap it is."""
    if library := _glibc():
        library.malloc_trim(0)


def _set(mmap_threshold: int, trim_threshold: int) -> None:
    if library := _glibc():
        library.mallopt(_MMAP_THRESHOLD, mmap_threshold)
        library.mallopt(_TRIM_THRESHOLD, trim_threshold)


def _glibc() -> Any:
    """The C library; ``None`` if it is another one."""
    try:
        library = ctypes.CDLL(None)
        library.mallopt, library.malloc_trim, library.gnu_get_libc_version  # noqa: B018
    except (AttributeError, OSError, TypeError):
        return None
    return library
