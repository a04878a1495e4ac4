"""The tensors that have one value for each task, and their values where there are no data to solve them from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from com_lightning.core.layers.candidates import candidates
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.solve.task_adapters import nearest_of_rank
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import named_tensors, tied_names, writable_copy
from com_lightning.errors import some


def task_tensors(tasks: Sequence[Task], merged: Mapping[str, Tensor], weights: bool = False) -> dict[str, list[Tensor]]:
    """Copy the biases of solved layers, and parameters and buffers of solved normalisations, for each task.

    Args:
        tasks: the experts.
        merged: name of each shared tensor -> its merged value. Tied parameters stay shared.
        weights: also copy the weights of layers that can have corrections, and parameters of modules that are no
            layers: functions may use them, and then a sweep finds out what they are.

    Returns:
        Full name -> one tensor for each task, which holds the merged value at first.
    """
    layers = candidates(tasks[0].expert, merged)
    names: list[str] = []
    for layer in layers.values():
        if isinstance(layer.layer_type, PerChannel):
            names += [*layer.parameters.values(), *layer.buffers.values()]
        elif layer.layer_type.can_have_correction:
            names += [layer.parameters[own] for own in ("weight", "bias")[not weights :] if own in layer.parameters]
    if weights:
        of_layers = {name for layer in layers.values() for name in layer.parameters.values()}
        parameters = {name for name, _, is_parameter in named_tensors(tasks[0].expert) if is_parameter}
        names += [name for name in merged if name in parameters - of_layers and ".parametrizations." not in name]
    tied = _tied(tasks[0].expert)
    return {name: [writable_copy(merged[name]) for _ in tasks] for name in dict.fromkeys(names) if name not in tied}


def without_copies(own: Mapping[str, list[Tensor]], records: Sequence[LayerRecord]) -> dict[str, list[Tensor]]:
    """Return those of the :func:`task_tensors` that tasks have for themselves. The others are copies of shared ones."""
    names = {name for record in records for name in record.of_tasks}
    return {name: tensors for name, tensors in own.items() if name in names}


def warn_of_uncorrected(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    records: Sequence[LayerRecord],
    ranks: Mapping[str, int] | None = None,
) -> list[str]:
    """Return a warning that names the shared matrices without a correction, and says why they have none.

    Args:
        tasks: the experts.
        merged: name of each shared tensor -> its merged value.
        records: of all layers.
        ranks: layer -> rank, if the ranks of layers were chosen.

    Returns:
        The warning, or none.
    """
    passed_over = {name for record in records if (ranks or {}).get(record.name) == 0 for name in record.parameters}
    corrected = {name for record in records if record.rank for name in record.of_tasks}
    types = {n: c.layer_type for c in candidates(tasks[0].expert, merged).values() for n in c.parameters.values()}
    tied, named = _tied(tasks[0].expert), dict[str, list[str]]()
    for name, tensor in merged.items():
        if name in corrected or not isinstance(tensor, nn.Parameter) or sum(size > 1 for size in tensor.shape) < 2:
            continue
        why = "not solved as a matrix"
        if name in passed_over:
            why = "other layers gain more"
        elif name in tied:
            why = "tied"
        elif name in types and not types[name].can_have_correction:
            why = types[name].name
        named.setdefault(why, []).append(name)
    texts = [f"{some(names)} ({why})" for why, names in named.items()]
    return [f"no corrections, so the same for all tasks: {', '.join(texts)}"] if texts else []


def own_parts(layer: Layer, models: Models, rank: int) -> list[str]:
    """Return the names, in a layer, of the parameters and buffers that each task has for itself.

    Args:
        layer: the layer.
        models: whose ``task_tensors`` are what tasks may have for themselves.
        rank: of the correction of its weight, if it can have one; 0 for none.
    """
    is_matrix = layer.layer_type.can_have_correction
    if not (is_matrix or isinstance(layer.layer_type, PerChannel)):
        return []
    own = [local for local, part in layer.parts.items() if part.name in models.task_tensors]
    return [local for local in own if rank or not is_matrix or local != "weight"]


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
    for local in own_parts(layer, models, rank):
        part = layer.parts[local]
        size = part.of(models.merged[part.name]).numel()
        if local == "weight" and layer.layer_type.can_have_correction:
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
        The record of each layer, and of each parameter that belongs to no layer.
    """
    models, records = Models(tasks, merged, (), task_tensors=own), []
    for name in models.candidates:
        layer = models.layer(name)
        record = LayerRecord(name, layer.layer_type.name)
        record_of_tasks(record, layer, models, rank)
        if not record.of_tasks:
            continue
        records.append(record)
        weights: list[Tensor] = []
        if record.rank:
            features = layer.weights[0].shape[2] - int(layer.layer_type.has_bias(layer.merged))
            shared = layer.layer_type.to_matrix(layer.merged, layer.merged)
            weights = _nearest([weight[..., :features] for weight in layer.weights], shared[..., :features], rank)
            weights = [torch.cat([weight, shared[..., features:].double()], -1) for weight in weights]
        for local in own_parts(layer, models, rank):
            part = layer.parts[local]
            for number in range(len(tasks)):
                value = models.tensors[number][part.name]
                if local == "weight" and weights:
                    value = layer.layer_type.from_matrix(layer.merged, weights[number])[local]
                target = models.merged[models.merged_name(part.name, number)]
                target.copy_(value.view_as(target))
    layers = models.candidates.values()
    of_layers = {name for layer in layers for name in (*layer.parameters.values(), *layer.buffers.values())}
    for name in own:
        if name in of_layers:
            continue
        of_parameter = _compress(name, [tensors[name] for tensors in models.tensors], merged[name], own[name], rank)
        records += [of_parameter] if of_parameter else []
    return records


def _tied(module: nn.Module) -> set[str]:
    """Names of the parameters that have several names."""
    return {name for pair in tied_names(module).items() if pair[0] != pair[1] for name in pair}


def _compress(
    name: str, experts: Sequence[Tensor], shared: Tensor, own: Sequence[Tensor], rank: int
) -> LayerRecord | None:
    """The same for a parameter whose use is not known: a vector, a matrix or a stack of matrices, by its shape."""
    shape = [size for size in shared.shape if size != 1]
    record = LayerRecord(name, "parameter")
    if len(shape) < 2:
        record.of_tasks[name], values = shared.numel(), list(experts)
    elif len(shape) < 4:
        stack = [1] * (3 - len(shape)) + shape
        record.rank = min(rank, *stack[1:])
        record.of_tasks[name] = min(shared.numel(), stack[0] * record.rank * sum(stack[1:]))
        values = _nearest([expert.detach().view(stack) for expert in experts], shared.detach().view(stack), rank)
    else:
        return None
    for target, value in zip(own, values):
        target.copy_(value.view_as(target))
    return record


def _nearest(weights: Sequence[Tensor], shared: Tensor, rank: int) -> list[Tensor]:
    """For each weight, ``(g, o, k)``, the nearest one that differs from the shared one by a rank, in float64."""
    shared = shared.double()
    return [shared + nearest_of_rank(weight.double() - shared, rank) for weight in weights]
