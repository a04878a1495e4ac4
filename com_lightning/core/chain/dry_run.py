"""What the forwards of a merge hold, found out without merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.chain.chain import _Chain
from com_lightning.core.chain.gather import CalibrationForward
from com_lightning.core.chain.options import ChainOptions, Distance
from com_lightning.core.chain.sensitivity import _Sensing
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.lockstep import Arrival
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import named_tensors


def held_by_forwards(tasks: Sequence[Task], merged: Mapping[str, Tensor], rule: ChainOptions) -> list[int]:
    """The most bytes that the forwards of each task hold while they are paused.

    Takes what :func:`~com_lightning.core.chain.chain.merge_layers` does, and runs the forwards in the same way; nothing is
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


def held_by_gradients(tasks: Sequence[Task], merged: Mapping[str, Tensor], distance: Distance) -> int:
    """The most bytes that a forward of these batches holds for its backward, where predictions are differentiated.

    Args:
        tasks, merged, distance: as for :func:`~com_lightning.core.chain.sensitivity.roots`.
    """
    sensing = _RehearsedSensing(tasks, merged, distance)
    for number, task in enumerate(tasks):
        for batch in range(len(task.batches)):
            sensing.sense(number, batch)
    return sensing.most


class _RehearsedSensing(_Sensing):
    most = 0

    def _differentiate(self, call: Any, start: Tensor, seed: int) -> None:
        weights = {t.untyped_storage().data_ptr() for _, t, _ in named_tensors(call.module)}
        held: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            super()._differentiate(call, start, seed)
        self.most = max(self.most, sum(held.values()))


class _Rehearsal(_Chain):
    def _merge(self, name: str, arrivals: Sequence[Arrival]) -> LayerRecord:
        return LayerRecord(name, "", note="not solved in a rehearsal")
