"""How a merge is carried out, as opposed to what is solved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from com_lightning.core.peers import Peers
from com_lightning.core.rule import LayerRecord, SkippedBatch


@dataclass
class Solved:
    """A layer that has been merged.

    Attributes:
        record: what happened there.
        extents: name of a parameter or buffer -> first and last of the elements, flattened, that were written.
        values: the same names -> those elements.
    """

    record: LayerRecord
    extents: dict[str, tuple[int, int]]
    values: Mapping[str, Tensor]


class Journal:
    """What has been merged so far. This one forgets; :class:`~com_lightning.journal.FileJournal` writes it down."""

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
    """

    on_layer: Callable[[LayerRecord], None] = field(default=lambda record: None)
    peers: Peers = field(default_factory=Peers)
    journal: Journal = field(default_factory=Journal)
    memory_budget: int | None = None
    on_bad_batch: Literal["raise", "skip"] = "raise"
    skipped: list[SkippedBatch] = field(default_factory=list)
