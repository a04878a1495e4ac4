"""Fits private layers to the features of the merged model.

A private layer, such as a task's head, was trained on the features of its expert, but gets the features of the merged
model. So once the shared layers are merged, it is solved again, for each task alone:

    W = argmin 1 / N  sum_n s_n || W x̂_n - W_i x_n ||² + l || W - W_i ||²

with ``x̂`` the layer's input in the merged model, ``x`` and ``W_i`` input and weight in the expert, and ``s`` and ``l``
as in the chain. This needs no labels, and adds no parameters to the model. It goes beyond Chain of Merges.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers.candidates import candidates
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import alike_in_all, named_tensors, writable_copy


def refit(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    task_tensors: Mapping[str, Sequence[Tensor]],
    rule: ChainOptions,
    context: Context,
) -> tuple[list[LayerRecord], dict[str, dict[str, Tensor]]]:
    """Solve the private layers of each task. This takes one more forward of the expert and of the merged model.

    Args:
        tasks: the experts and their calibration data.
        merged: name of each shared tensor -> its merged value.
        task_tensors: name of each tensor that is shared by name and has a value for each task -> these values.
        rule: the options of the merge. Its ``normalize``, ``ridge`` and ``residual`` apply to private layers too. They
            are always solved two-sided, because a one-sided solution is the expert's layer.
        context: how the merge is carried out.

    Returns:
        Records of the layers, with the task in each name, and task -> name -> solved tensor, with an entry for each
        task. Private parameters that no layer with a closed form has, or that no data reach, are not in it. Neither
        are those that all experts have alike: a frozen projection would become one for each task.
    """
    records: list[LayerRecord] = []
    solved: dict[str, dict[str, Tensor]] = {task.name: {} for task in tasks}
    device = next(iter(merged.values())).device if merged else None
    options = ChainOptions(normalize=rule.normalize, ridge=rule.ridge, residual=rule.residual)
    experts = [task.expert for task in tasks]
    alike = alike_in_all(experts, _private(experts[0], merged))
    for number, task in enumerate(tasks):
        fixed = {**merged, **{name: tensors[number] for name, tensors in task_tensors.items()}}
        own = _private(task.expert, fixed.keys() | alike)
        private = {name: writable_copy(tensor, device) for name, tensor in own.items()}
        if not private:
            continue
        alone = context.alone(task.name)
        task_records = merge_layers([context.without_skipped(task)], private, [1.0], options, alone, fixed=fixed)
        context.skipped += alone.skipped
        records += task_records
        names = {name for record in task_records for name in (*record.parameters, *record.buffers)}
        solved[task.name] = {name: tensor for name, tensor in private.items() if name in names}
    return records, solved


def _private(expert: nn.Module, shared: Collection[str]) -> dict[str, Tensor]:
    """Private parameters, and private buffers that a layer type re-estimates."""
    entries = list(named_tensors(expert))
    private = {n: t for n, t, _ in entries if n not in shared and t.is_floating_point()}
    buffers = {name for layer in candidates(expert, private).values() for name in layer.buffers.values()}
    parameters = {name for name, _, is_parameter in entries if is_parameter}
    return {name: tensor for name, tensor in private.items() if name in parameters | buffers}
