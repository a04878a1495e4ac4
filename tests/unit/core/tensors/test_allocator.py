"""Freed memory is kept while a merge runs, and given back when it ends."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch

from com_lightning.core.tensors import allocator as allocation
from com_lightning.core.tensors.allocator import ScatteredMemory, keep_freed_memory

glibc = pytest.mark.skipif(
    allocation._glibc() is None or not Path("/proc/self/statm").exists(), reason="the C library is not glibc"
)
SIZE = 2**24
"""Bytes of an activation: from some such on, freed memory goes back at once, as glibc has it by itself."""


def allocate(count: int) -> None:
    """Allocate, fill and free so many tensors together."""
    tensors = [torch.ones(SIZE // 4) for _ in range(count)]
    del tensors


def faults() -> int:
    """Pages that the system has given so far."""
    resource = pytest.importorskip("resource")
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@glibc
def test_memory_that_was_freed_is_not_asked_for_again() -> None:
    with keep_freed_memory():
        allocate(16)
        before = faults()
        for _ in range(3):
            allocate(16)
        assert faults() - before < 3 * 16 * SIZE // 4096 // 2


@glibc
def test_memory_is_given_back_even_after_an_error() -> None:
    allocate(16)
    allocation.return_freed_memory()
    before = resident()
    kept = []

    def merge() -> None:
        with keep_freed_memory():
            allocate(16)
            kept.append(resident() - before)
            raise ValueError("in a merge")

    with pytest.raises(ValueError, match="in a merge"):
        merge()
    assert kept[0] > 10 * SIZE
    assert resident() - before < 2 * SIZE


@glibc
def test_memory_between_what_is_held_is_returned_once_it_is_much() -> None:
    """Every second activation is freed, so that the system gets nothing back by itself."""
    size = SIZE // 4  # small enough for the heap
    scattered = ScatteredMemory()
    with keep_freed_memory():
        before = resident()
        tensors = [torch.ones(size // 4) for _ in range(2 * 3 * allocation.SCATTERED_BYTES // size // 2)]
        scattered.tidy()
        whole = resident() - before
        del tensors[::2]
        freed = whole // 2
        assert freed > allocation.SCATTERED_BYTES
        assert resident() - before > 0.9 * whole
        scattered.tidy()
        assert resident() - before < 0.6 * whole
        kept = resident()
        more = [torch.ones(size // 4) for _ in range(8)]
        del more
        scattered.tidy()
        assert resident() >= kept, "a little is kept for the next allocations"


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """Without glibc's functions."""

    def library(name: Any) -> Any:
        return Other()

    monkeypatch.setattr(ctypes, "CDLL", library)
    with keep_freed_memory():
        assert allocation._glibc() is None
    ScatteredMemory().tidy()
