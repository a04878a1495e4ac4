"""Finds out which layers have the positions of which padding mask, by forwards of small batches.

A mask over ``(samples, positions)`` may fit the input of a layer by chance: with as many samples as positions, the
input of a pooler, ``(samples, features)``, looks like one over positions, and where encoder and decoder have equally
many positions, so do their masks. So each expert runs on two small copies of a batch, in which the samples and the
positions of each mask have other numbers. Sizes that change as the positions of a mask do are its positions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Size, Tensor

from com_lightning.core.layers.base import Layout
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.layer import CalibrationForward, forward_id
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import BatchId, Cut, LayerRecord, Place, Places, Role, Task
from com_lightning.errors import reason as one_line
from com_lightning.errors import some

Pair = tuple[int, int]
"""A size in the first and in the second small copy."""


def with_places(tasks: Sequence[Task], models: Models | None, context: Context) -> list[Task]:
    """Return the tasks with what is known about which layers have the positions of which mask.

    Args:
        tasks: as for :func:`~com_lightning.core.chain.chain.merge_layers`. Each expert that has masks runs forward on
            two small batches.
        models: the models of these tasks, in which the experts run. ``None``: no task has masks in this process.
        context: has the processes. For each task, all use the result of the first process that has one. If there is
            none, ``context.unplaced`` gets the reason.
    """
    places: dict[str, Places] = {}
    problems: dict[str, str] = {}
    for number, task in enumerate(tasks):
        if models is None or not task.has_masks:
            continue
        cuts = iter(task.cuts(task.batches))
        while task.name not in places:
            try:
                if (pair := next(cuts, None)) is None:
                    break
                places[task.name] = _places(tasks, models, number, pair)
            except Exception as error:  # the user's model does not take batches of these sizes, or of this kind
                problems.setdefault(task.name, one_line(error))
    for theirs, their_problems in reversed(context.peers.exchange((places, problems))):
        places.update(theirs)
        problems.update(their_problems)
    context.unplaced.update({name: problem for name, problem in problems.items() if name not in places})
    return [replace(task, places=places.get(task.name)) for task in tasks]


def warn_of_doubts(records: Sequence[LayerRecord], unplaced: Mapping[str, str]) -> list[str]:
    """Return warnings of layers whose rows a mask may have picked by chance.

    Args:
        records: of the merged layers.
        unplaced: as in :class:`~com_lightning.core.sweep.context.Context`.
    """
    tasks: dict[tuple[tuple[str, ...], str], list[str]] = defaultdict(list)
    for task in dict.fromkeys(task for record in records for task in record.doubtful):
        names = tuple(record.name for record in records if task in record.doubtful)
        tasks[names, unplaced.get(task, "")].append(task)
    warnings = []
    for (names, problem), of_tasks in tasks.items():
        reason = f" (a forward of a smaller batch failed: {problem})" if problem else ""
        warnings.append(
            f"padding of {some(of_tasks)}: a mask fits the inputs of {some(names)}, but these may be other rows than "
            f"those that it was made for{reason}; to be sure, use batches whose numbers of samples and of positions "
            "differ from each other and from the sizes in the model"
        )
    return warnings


def _places(tasks: Sequence[Task], models: Models, number: int, cuts: tuple[Cut, Cut]) -> Places:
    """Run an expert on two small batches, and compare what arrives at its layers."""
    task = tasks[number]
    index = task.batch_numbers[0]
    search, tasks = _ShapeSearch(), list(tasks)
    tasks[number] = replace(task, batches=[cut.batch for cut in cuts], numbers=[index, index])
    Sweep(tasks, models, search, batches=[BatchId(number, position, index) for position in range(2)]).run()
    samples = cuts[0].samples, cuts[1].samples
    positions = {name: (size, cuts[1].positions[name]) for name, size in cuts[0].positions.items()}
    places = {}
    for key, shapes in search.shapes.items():
        if len(shapes) == 2 and len(shapes[0]) == len(shapes[1]):
            sizes = list(zip(shapes[0], shapes[1]))
            layouts = {name: _layout(sizes, samples, pair) for name, pair in positions.items()}
            known = {name: layout for name, layout in layouts.items() if layout is not None}
            places[key] = Place(known, frozenset(first for first, second in sizes[:2] if first == second))
    return places


def _layout(sizes: Sequence[Pair], samples: Pair, positions: Pair) -> Layout | None:
    """How the positions of a mask lie in a tensor of these sizes; ``None`` if it has no such positions."""
    if positions in sizes and samples in sizes:
        return "samples first" if sizes.index(samples) <= sizes.index(positions) else "positions first"
    if (samples[0] * positions[0], samples[1] * positions[1]) in sizes:
        return "flat"
    return "one row" if positions in sizes else None


class _ShapeSearch(Visitor):
    """Records the shapes of what goes into each layer and comes out of it.

    Attributes:
        shapes: input or output of a layer -> its shape in the forward of each batch, by the batch's position.
    """

    watches_outputs = True

    def __init__(self) -> None:
        self.shapes: dict[tuple[Role, str], dict[int, Size]] = defaultdict(dict)

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        layer = sweep.layer(name)
        if refusal := sweep.refusal(layer, calls):
            return LayerRecord(name, layer.layer_type.name, note=refusal)
        for call in calls:
            self.shapes["input", name][forward_id(call).batch.position] = call.input.shape
        sweep.mark_solved(sweep.extents(layer))  # as in a merge, so that the forwards visit the same layers
        return LayerRecord(name, layer.layer_type.name)

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> None:
        if isinstance(output, Tensor):
            self.shapes["output", layer][forward.id.batch.position] = output.shape[:-1]
