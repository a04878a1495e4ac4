"""The tensors that have one value for each task with ``private_biases`` or ``task_rank``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from com_lightning.core.layers.candidates import candidates
from com_lightning.core.layers.convolution import Convolution
from com_lightning.core.layers.linear import Linear
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.sweep.task import Task
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
        if isinstance(layer.layer_type, PerChannel):
            names = [*layer.parameters.values(), *layer.buffers.values()]
        elif isinstance(layer.layer_type, (Linear, Convolution)):
            names = [layer.parameters[own] for own in ("weight", "bias") if own in layer.parameters]
            if not weights:
                names = [layer.parameters["bias"]] if "bias" in layer.parameters else []
            elif "weight" not in layer.parameters or not tied.isdisjoint(names):
                names = []
        else:
            names = []
        for name in names:
            if name not in tied:
                result[name] = [writable_copy(merged[name]) for _ in tasks]
    return result
