"""The tensors that have one value for each task, and their values where there are no data to solve them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from com_lightning.core.layers import LayerType
from com_lightning.core.layers.candidates import candidates
from com_lightning.core.layers.convolution import Convolution
from com_lightning.core.layers.linear import Linear
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.solve.task_adapters import low_rank_corrections
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import tied_names, writable_copy


def task_tensors(tasks: Sequence[Task], merged: Mapping[str, Tensor], weights: bool = False) -> dict[str, list[Tensor]]:
    """Copy the biases of solved layers, and parameters and buffers of solved normalisations, for each task.

    Args:
        tasks: the experts.
        merged: name of each shared tensor -> its merged value. Tied parameters stay shared.
        weights: also copy the weights of linear and convolutional layers.

    Returns:
        Full name -> one tensor for each task, which holds the merged value at first.
    """
    ties = list(tied_names(tasks[0].expert).items())
    tied = {name for pair in ties if pair[0] != pair[1] for name in pair}
    result: dict[str, list[Tensor]] = {}
    for layer in candidates(tasks[0].expert, merged).values():
        names: list[str] = []
        if isinstance(layer.layer_type, PerChannel):
            names = [*layer.parameters.values(), *layer.buffers.values()]
        elif has_correction(layer.layer_type):
            names = [layer.parameters[own] for own in ("weight", "bias")[not weights :] if own in layer.parameters]
        result.update({name: [writable_copy(merged[name]) for _ in tasks] for name in names if name not in tied})
    return result


def has_correction(layer_type: LayerType) -> bool:
    """Whether the weight of layers of this type can have a correction of low rank for each task."""
    return isinstance(layer_type, (Linear, Convolution))


def record_of_tasks(record: LayerRecord, layer: Layer, models: Models, rank: int) -> None:
    """Record how many values each task keeps of a layer.

    Args:
        record: the record of the layer.
        layer: the layer.
        models: whose ``task_tensors`` say what each task keeps.
        rank: of the corrections.
    """
    groups, outputs, inputs = layer.weights[0].shape
    inputs -= int(layer.layer_type.has_bias(layer.merged))
    for local, part in layer.parts.items():
        if part.name not in models.task_tensors:
            continue
        size = part.of(models.merged[part.name]).numel()
        if local == "weight" and has_correction(layer.layer_type):
            record.rank = min(rank, outputs, inputs)
            size = min(size, groups * record.rank * (outputs + inputs))
        name = models.packed_names.get(part.name, part.name)
        record.of_tasks[name] = record.of_tasks.get(name, 0) + size


@torch.no_grad()
def compress_differences(
    tasks: Sequence[Task], merged: Mapping[str, Tensor], own: Mapping[str, Sequence[Tensor]], rank: int
) -> list[LayerRecord]:
    """Give each task its expert's biases and normalisations, and weights that differ from the shared ones by a rank.

    These weights are the nearest of that kind to the expert's (Eckart and Young 1936). This needs no data.

    Args:
        tasks: the experts.
        merged: name of each shared tensor -> its merged value. They stay as they are.
        own: as :func:`task_tensors` returns it. Written in place.
        rank: of the difference of each weight.

    Returns:
        The record of each layer.
    """
    models, records = Models(tasks, merged, (), task_tensors=own), []
    for name in models.candidates:
        layer = models.layer(name)
        record = LayerRecord(name, layer.layer_type.name)
        record_of_tasks(record, layer, models, rank)
        if not record.of_tasks:
            continue
        weights = _nearest(layer, rank) if record.rank else []
        for local, part in layer.parts.items():
            for number, key in enumerate(models.task_tensors.get(part.name, ())):
                value = models.tensors[number][part.name]
                if local == "weight" and weights:
                    value = layer.layer_type.from_matrix(layer.merged, weights[number])[local]
                models.merged[key].copy_(value.view_as(models.merged[key]))
        records.append(record)
    return records


def _nearest(layer: Layer, rank: int) -> list[Tensor]:
    """The weight of each task, ``(g, o, k)``, that differs from the shared one by a rank."""
    shared = layer.layer_type.to_matrix(layer.merged, layer.merged).double()
    features = shared.shape[2] - int(layer.layer_type.has_bias(layer.merged))
    weights = [weight[..., :features] for weight in layer.weights]
    grams = [torch.eye(features, device=shared.device).expand(len(shared), -1, -1)] * len(weights)
    corrections = low_rank_corrections(grams, [None] * len(weights), weights, shared[..., :features], rank, ridge=0.0)
    return [torch.cat([shared[..., :features] + correction, shared[..., features:]], -1) for correction in corrections]
