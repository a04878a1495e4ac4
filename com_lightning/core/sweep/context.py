"""How a merge is carried out: processes, journal, memory budget, bad batches. The equations are elsewhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, SkippedBatch, Task

T = TypeVar("T")
Advance = Callable[[str], None]
"""Says that a step is done, by its name."""
Progress = Callable[[str, int], AbstractContextManager[Advance]]
"""Draws the progress of a stage, given what is done in it and its number of steps. A stage may have further stages."""

_BUSY = threading.RLock()


@contextmanager
def no_progress(what: str, steps: int) -> Iterator[Advance]:
    """Draw no progress."""
    yield lambda step: None


def each(items: Sequence[T], progress: Progress, what: str) -> Iterator[T]:
    """The items, one after the other, with their progress."""
    with progress(what, len(items)) as advance:
        for item in items:
            yield item
            advance("")


def about(progress: Progress, subject: str) -> Progress:
    """The same progress, with what it is about: "merging layers of mnist"."""
    return lambda what, steps: progress(f"{what} {subject}", steps)


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Only one thread of a process merges at a time: random state, grad mode and hooks belong to the process.

    Raises:
        RuntimeError: if another thread merges.
    """
    if not _BUSY.acquire(blocking=False):
        raise RuntimeError("another thread of this process is merging; merge one after the other, or in processes")
    try:
        yield
    finally:
        _BUSY.release()


@contextmanager
def own_modes() -> Iterator[None]:
    """Within it, PyTorch computes as if the caller had set no mode: a merge depends on the trainer's precision alone.

    ``torch.inference_mode``, ``torch.no_grad``, ``torch.autocast`` and a default device are undone. Modules still see
    the caller's default precision, on which code of the merge itself does not depend.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@dataclass
class Solved:
    """A layer that has been merged.

    Attributes:
        record: the record of the layer.
        written: name of each parameter or buffer that was written, with the first and the last position in it when
            flattened.
        values: the elements between these positions, for each entry of ``written``.
        skipped: the batches that were skipped from this layer on.
    """

    record: LayerRecord
    written: list[tuple[str, tuple[int, int]]]
    values: list[Tensor]
    skipped: list[SkippedBatch] = field(default_factory=list)


class Journal:
    """A journal of the merged layers, with which a merge can resume. This class keeps nothing.

    :class:`~com_lightning.results.journal.FileJournal` writes the layers to a file.
    """

    keeps = False
    """Whether it keeps layers."""
    resumed = 0
    """Number of layers that were taken from an earlier run."""

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        """Compare a fingerprint with the fingerprint of the earlier run, before the first layer.

        Args:
            fingerprint: name of each input of the merge -> a short text that depends on it.

        Raises:
            MergeError: if the journal belongs to a merge of other inputs.
        """

    def get(self, layer: str) -> Solved | None:
        """A layer as an earlier run solved it. ``None``: no earlier run did."""
        return None

    def add(self, layer: str, solved: Solved) -> None:
        """Add a layer that has just been merged."""


@dataclass
class Context:
    """How a merge is carried out.

    Args:
        on_layer: called with the record of each finished layer.
        peers: the processes of the merge. Each has its own batches.
        journal: keeps merged layers. Layers that it has from an earlier run are not solved again.
        memory_budget: bytes that all paused forwards together may hold on the device. The rest is paged out. ``None``:
            no limit.
        on_bad_batch: with NaN or infinity in the inputs of a layer, ``"raise"`` an error, or ``"skip"`` the batch from
            that layer on.
        skipped: the batches of all processes that have been skipped.
        warnings: warnings for the report.
        unplaced: task -> why shapes alone tell where its padding masks belong.
        progress: draws the progress of each stage.
    """

    on_layer: Callable[[LayerRecord], None] = field(default=lambda record: None)
    peers: Peers = field(default_factory=Peers)
    journal: Journal = field(default_factory=Journal)
    memory_budget: int | None = None
    on_bad_batch: Literal["raise", "skip"] = "raise"
    skipped: list[SkippedBatch] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unplaced: dict[str, str] = field(default_factory=dict)
    progress: Progress = no_progress

    def alone(self, task: str) -> Context:
        """The same context for the private layers of a task. The task's name is added to theirs in records."""
        return self.with_suffix(f" of {task}", task)

    def with_suffix(self, suffix: str, task: str | None = None) -> Context:
        """The same context for a further sweep, which has skipped no batch yet.

        Args:
            suffix: added to the names of its layers in records and in the journal.
            task: whose layers these are, if they are private.

        Returns:
            The context.
        """

        def report(record: LayerRecord) -> None:
            record.name, record.task = record.name + suffix, task
            self.on_layer(record)

        journal, progress = _SuffixJournal(self.journal, suffix), about(self.progress, f"of {task}")
        return replace(self, on_layer=report, journal=journal, skipped=[], progress=progress)

    def without_skipped(self, task: Task) -> Task:
        """A task without the batches that were skipped."""
        skipped = {entry.batch for entry in self.skipped if entry.task == task.name}
        return task.with_batches([number for number in task.batch_numbers if number not in skipped])


class _SuffixJournal(Journal):
    def __init__(self, journal: Journal, suffix: str) -> None:
        self._journal, self._suffix = journal, suffix

    def get(self, layer: str) -> Solved | None:
        return self._journal.get(layer + self._suffix)

    def add(self, layer: str, solved: Solved) -> None:
        self._journal.add(layer + self._suffix, solved)
