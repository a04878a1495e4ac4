"""What the forwards of a merge hold, found out without merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from com_lightning.core.chain import _Chain
from com_lightning.core.gathering import CalibrationForward
from com_lightning.core.lockstep import Arrival
from com_lightning.core.paging import Pager
from com_lightning.core.rule import LayerRecord, Rule, Task
from com_lightning.core.run import Run


def held_by_forwards(tasks: Sequence[Task], merged: Mapping[str, Tensor], rule: Rule) -> list[int]:
    """The most bytes that the forwards of each task hold while they are paused.

    Takes what :func:`~com_lightning.core.chain.merge_layers` does, and runs the forwards in the same way; nothing is
    gathered, solved or written.
    """
    chain = _Rehearsal(tasks, merged, [1 / len(tasks)] * len(tasks), rule, Run())
    chain.pager = Pager(None, chain.models.device)
    chain.run()
    held = [0] * len(tasks)
    for forward, most in chain.pager.most().items():
        assert isinstance(forward, CalibrationForward)
        held[forward.task] += most
    return held


class _Rehearsal(_Chain):
    def _merge(self, name: str, arrivals: Sequence[Arrival]) -> LayerRecord:
        return LayerRecord(name, "", note="not solved in a rehearsal")
