"""The drift of a merged model that exists already, measured layer by layer as a chain would meet it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from com_lightning.core.chain.find_positions import with_places
from com_lightning.core.chain.gather import Gatherer
from com_lightning.core.chain.inputs import LayerInputs
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.residual_stream import ResidualStreams
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import LayerRecord, Task


def measure_drift(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    context: Context,
    task_tensors: Mapping[str, Sequence[Tensor]] | None = None,
) -> list[LayerRecord]:
    """Return how far each layer's inputs are from those of the experts, with these weights everywhere.

    Nothing is solved or written. For the average of the experts, it is what a chain would meet if it changed nothing.
    The arguments are those of :func:`~com_lightning.core.chain.chain.merge_layers`.
    """
    options = ChainOptions("merged", "expert")
    with context.peers.shares_failures():
        experts = Models(tasks, merged, ("expert",)) if any(task.has_masks for task in tasks) else None
        tasks = with_places(tasks, experts, context)
        del experts
        models = Models(tasks, merged, options.streams, task_tensors=task_tensors)
        return Sweep(tasks, models, DriftMeter(tasks, options, context), context).run()


class DriftMeter(Visitor):
    """Records the drift at each layer.

    Args:
        tasks: the experts.
        options: of a two-sided chain.
        context: how the sweep is carried out.
    """

    activity = "measuring drift"

    def __init__(self, tasks: Sequence[Task], options: ChainOptions, context: Context) -> None:
        self.tasks, self.context = tasks, context
        self.gatherer = Gatherer(options, ResidualStreams({}))

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        layer = sweep.layer(name) if calls else None
        gathered = self.gatherer.gather(sweep, layer, name, calls)
        if gathered.refusal:
            return LayerRecord(name, layer.layer_type.name if layer else "", note=gathered.refusal)
        mine = None
        if layer and self.gatherer.inputs and self.gatherer.owner == self.context.peers.rank:
            # The layer counts as solved, so that the same layers are measured as in a chain.
            mine = (self._measure(layer, self.gatherer.inputs), sweep.extents(layer))
        record, extents = self.context.peers.exchange(mine)[self.gatherer.owner] or (LayerRecord(name, ""), [])
        sweep.mark_solved(extents)
        return record

    def _measure(self, layer: Layer, inputs: LayerInputs) -> LayerRecord:
        record = LayerRecord(layer.name, layer.layer_type.name)
        for task, sums in zip(self.tasks, inputs.sums):
            if sums.drift_norms.rows:
                record.distance[task.name] = sums.drift_norms.relative_distance
                record.cosine[task.name] = sums.drift_norms.mean_cosine
        return record
