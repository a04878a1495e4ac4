"""Private layers, solved once more for what the merged model gives them.

A layer that one task has for itself, its head say, was trained on the features of the expert, and meets those of the
merged model. Once the shared layers are merged, it is solved for them, for each task alone:

    W = argmin 1 / N  sum_n s_n || W x̂_n - W_i x_n ||² + l || W - W_i ||²

with ``x̂`` its input in the merged model, ``x`` and ``W_i`` those of the expert, and ``s`` and ``l`` as in the chain.
No labels are needed, and the model has no more parameters than without. It goes beyond Chain of Merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers.candidates import candidates
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import named_tensors, writable_copy


def refit(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    task_tensors: Mapping[str, Sequence[Tensor]],
    rule: ChainOptions,
    run: Run,
) -> tuple[list[LayerRecord], dict[str, dict[str, Tensor]]]:
    """Solve the private layers of each task. It takes one more forward of the expert and of the merged model.

    Args:
        tasks: the experts and their calibration data.
        merged: name of what is shared -> its merged value.
        task_tensors: name of what each task keeps for itself, of what would be shared -> one tensor for each.
        rule: by which the shared layers were solved. Its normalisation, ridge and residual streams count for private
            layers too. These are always solved two-sided: one-sided, they would stay as they are.
        run: how it is carried out.

    Returns:
        The layers, each with its task in its name, and task -> name -> tensor of what was solved.
    """
    records: list[LayerRecord] = []
    solved: dict[str, dict[str, Tensor]] = {}
    device = next(iter(merged.values())).device if merged else None
    rule = ChainOptions(normalize=rule.normalize, ridge=rule.ridge, residual=rule.residual)
    for number, task in enumerate(tasks):
        fixed = {**merged, **{name: tensors[number] for name, tensors in task_tensors.items()}}
        private = {name: writable_copy(tensor, device) for name, tensor in _private(task.expert, fixed).items()}
        if not private:
            continue
        context = run.alone(task.name)
        new = merge_layers([_without_skipped(task, run)], private, [1.0], rule, context, fixed=fixed)
        run.skipped += context.skipped
        records += new
        names = {name for record in new for name in (*record.parameters, *record.buffers)}
        solved[task.name] = {name: tensor for name, tensor in private.items() if name in names}
    return records, solved


def _private(expert: nn.Module, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, and buffers of layers, that are not shared."""
    everything = list(named_tensors(expert))
    private = {n: t for n, t, _ in everything if n not in shared and t.is_floating_point()}
    buffers = {name for layer in candidates(expert, private).values() for name in layer.buffers.values()}
    parameters = {name for name, _, is_parameter in everything if is_parameter}
    return {name: tensor for name, tensor in private.items() if name in parameters | buffers}


def _without_skipped(task: Task, run: Run) -> Task:
    """A task without the batches that were skipped."""
    skipped = {entry.batch for entry in run.skipped if entry.task == task.name}
    return task.with_batches([number for number in task.batch_numbers if number not in skipped])
