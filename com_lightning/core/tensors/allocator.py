"""How PyTorch gets memory on a CPU: from the C library, whose settings are those of the whole process.

A merge allocates and frees activations of many megabytes thousands of times. glibc gives what is free at the end of its
heap back to the system as soon as there are some megabytes of it. When these pages are asked for again, the system
fills them with zeros. That takes a fifth of a merge's time (tried). The command line keeps them, see
:func:`keep_freed_memory`. The library does not: the settings belong to the user's process.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``, in bytes: how much may be free at the end of the heap, and from what size on an
allocation is no part of the heap."""

KEPT = 2**29
"""Bytes at the end of the heap that are kept for the next allocations."""

LARGEST = 2**25
"""The highest value that glibc accepts for the second parameter."""

DEFAULT = 2**17
"""The value of both parameters in a new process."""


@contextlib.contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Keep freed memory for the next allocations. Afterwards it is given back, and the thresholds are glibc's again."""
    try:
        _set(LARGEST, KEPT)
        yield
    finally:
        _set(DEFAULT, DEFAULT)
        return_freed_memory()


def return_freed_memory() -> None:
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
