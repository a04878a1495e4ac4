"""Freed memory is kept while a merge runs, and given back when it ends."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
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
def test_memory_between_what_is_held_is_returned_when_a_process_has_grown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second activation is freed, so that the system gets nothing back by itself."""
    size, count = SIZE // 4, 24  # small enough for the heap
    monkeypatch.setattr(allocation, "SCATTERED_BYTES", size * count // 2)
    with keep_freed_memory():
        scattered, before = ScatteredMemory(), resident()
        tensors = [torch.ones(size // 4) for _ in range(count)]
        del tensors[::2]
        whole = resident() - before
        assert whole > 0.9 * size * count
        scattered.tidy()
        assert resident() - before < 0.6 * whole
        kept = resident()
        more = [torch.ones(size // 4) for _ in range(4)]
        del more
        scattered.tidy()
        assert resident() >= kept, "a little is kept for the next allocations"


def test_memory_is_returned_only_after_growth(monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc goes through all free pieces of the heap for it, which takes long in an old process."""
    sizes, calls = iter([5, 6, 7, 1, 12, 3, 12, 13, 14, 2]), list[int]()
    monkeypatch.setattr(allocation, "SCATTERED_BYTES", 10)
    monkeypatch.setattr(ScatteredMemory, "_resident", lambda self: next(sizes))
    scattered = ScatteredMemory()
    scattered._library = SimpleNamespace(malloc_trim=calls.append)
    trimmed = []
    for _ in range(7):
        scattered.tidy()
        trimmed.append(len(calls))
    # It has grown from 1 to 12, is at 3 after that, and has then grown by no more than 10.
    assert trimmed == [0, 0, 0, 1, 1, 1, 2]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """Without glibc's functions."""

    def library(name: Any) -> Any:
        return Other()

    monkeypatch.setattr(ctypes, "CDLL", library)
    with keep_freed_memory():
        assert allocation._glibc() is None
    ScatteredMemory().tidy()
