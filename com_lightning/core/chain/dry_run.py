"""What the forwards of a merge hold in memory, measured without merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from com_lightning.core.chain.options import ChainOptions, Distance
from com_lightning.core.chain.sensitivity import gather_gradients
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import LayerRecord, Task, batch_ids
from com_lightning.core.tensors.modules import named_tensors


def held_by_forwards(tasks: Sequence[Task], merged: Mapping[str, Tensor], rule: ChainOptions) -> list[int]:
    """Return the most bytes that the forwards of each task hold while they are paused.

    The forwards run as in a merge. Nothing is gathered, solved or written. The arguments are those of
    :func:`~com_lightning.core.chain.chain.merge_layers`.
    """
    models = Models(tasks, merged, rule.streams)
    pager = Pager(None, models.device)
    Sweep(tasks, models, PassBy(), pager=pager).run()
    held = [0] * len(tasks)
    for forward, most in pager.peak_by_forward().items():
        assert isinstance(forward, CalibrationForward)
        held[forward.id.batch.task] += most
    return held


def held_by_gradients(tasks: Sequence[Task], merged: Mapping[str, Tensor], distance: Distance) -> int:
    """Return the most bytes that a forward of these batches holds for its backward.

    Predictions are differentiated as by :func:`~com_lightning.core.chain.sensitivity.roots`, with the same arguments.
    """
    models = Models(tasks, merged, ("expert",))
    weights = {t.untyped_storage().data_ptr() for model in models.running.values() for t in model.tensors.values()}
    weights |= {t.untyped_storage().data_ptr() for task in tasks for _, t, _ in named_tensors(task.expert)}
    most = 0
    for batch in batch_ids(tasks):
        held: dict[int, int] = {}

        def count(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            gather_gradients(tasks, models, batch, distance)
        most = max(most, sum(held.values()))
    return most


class PassBy(Visitor):
    """Does nothing at any layer."""

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        return LayerRecord(name, "", note="not solved in a dry run")
