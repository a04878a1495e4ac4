"""The covariate shift of merged weights that are there already, as a chain measures it on its way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from com_lightning.core.chain.chain import _Chain
from com_lightning.core.chain.gather import Inputs, Layer
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.task import LayerRecord, Task


def measure_shift(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    run: Run,
    own: Mapping[str, Sequence[Tensor]] | None = None,
) -> list[LayerRecord]:
    """How far each layer's inputs are from those of the experts, with these weights everywhere.

    Takes what :func:`~com_lightning.core.chain.chain.merge_layers` does; nothing is solved or written. For the average it is
    what a chain would meet if it changed nothing.
    """
    chain = _Measuring(tasks, merged, [1 / len(tasks)] * len(tasks), ChainOptions("merged", "expert"), run, own=own)
    with run.peers.told():
        return chain.run()


class _Measuring(_Chain):
    def _solve(self, layer: Layer, inputs: Inputs) -> tuple[LayerRecord, list[tuple[str, tuple[int, int]]]]:
        record = LayerRecord(layer.name, layer.kind.name)
        for task, statistics in zip(self.tasks, inputs.statistics):
            if statistics.shift.rows:
                record.distance[task.name] = statistics.shift.relative_distance
                record.cosine[task.name] = statistics.shift.mean_cosine
        # As if they had been solved, so that the same layers are measured as in a chain.
        return record, [(part.name, part.extent(self.models.merged[part.name])) for part in layer.parts.values()]
