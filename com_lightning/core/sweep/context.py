"""How a merge is carried out, as opposed to what is solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, SkippedBatch


@dataclass
class Solved:
    """A layer that has been merged.

    Attributes:
        record: what happened there.
        written: name of a parameter or buffer, and the first and last of its flattened elements that were written.
        values: those elements, for each of them.
        skipped: batches that were left out from there on.
    """

    record: LayerRecord
    written: list[tuple[str, tuple[int, int]]]
    values: list[Tensor]
    skipped: list[SkippedBatch] = field(default_factory=list)


class Journal:
    """What has been merged so far. This journal forgets it.

    :class:`~com_lightning.results.journal.FileJournal` writes it down.
    """

    keeps = False
    """Whether it remembers anything."""
    resumed = 0
    """How many layers were taken from an earlier run."""

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        """Say what the merge depends on, before the first layer: name -> short text.

        Raises:
            MergeError: if what is there is of a merge that depends on something else.
        """

    def get(self, layer: str) -> Solved | None:
        """What is known of a layer from an earlier run."""
        return None

    def add(self, layer: str, solved: Solved) -> None:
        """Take down a layer that has just been merged."""


@dataclass
class Run:
    """How a merge is carried out.

    Args:
        on_layer: called with each finished layer.
        peers: other processes that do the same on batches of their own.
        journal: where layers are taken down, and taken from if they are there already.
        memory_budget: bytes that paused forwards may hold between them on the device; what is more is paged out.
            ``None``: no limit.
        on_bad_batch: what NaN or infinity in the inputs of a layer does: ``"raise"``, or ``"skip"`` the batch from
            there on.
        skipped: the batches of all processes that have been skipped.
        warnings: what went otherwise than asked for, for the report.
        quiet: whether a rule that takes steps shows no progress.
    """

    on_layer: Callable[[LayerRecord], None] = field(default=lambda record: None)
    peers: Peers = field(default_factory=Peers)
    journal: Journal = field(default_factory=Journal)
    memory_budget: int | None = None
    on_bad_batch: Literal["raise", "skip"] = "raise"
    skipped: list[SkippedBatch] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    quiet: bool = True

    def alone(self, task: str) -> Run:
        """The same for layers that one task has for itself; where they are told of, its name is added to theirs."""
        suffix = f" of {task}"

        def report(record: LayerRecord) -> None:
            record.name, record.task = record.name + suffix, task
            self.on_layer(record)

        return replace(self, on_layer=report, journal=_PartOfJournal(self.journal, suffix), skipped=[])


class _PartOfJournal(Journal):
    def __init__(self, whole: Journal, suffix: str) -> None:
        self._whole, self._suffix = whole, suffix

    def get(self, layer: str) -> Solved | None:
        return self._whole.get(layer + self._suffix)

    def add(self, layer: str, solved: Solved) -> None:
        self._whole.add(layer + self._suffix, solved)
