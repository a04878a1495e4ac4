"""The rank of each layer's corrections, by what it brings, within a budget.

Layers differ in how much a correction of them brings. A first chain, with corrections of rank 1, measures it: the
further ranks of a layer's corrections lower the effect of its errors on the predictions by the squared singular values
of ``Sᵀ B L`` (see :mod:`com_lightning.core.solve.task_adapters`), times the trace of the layer's sensitivity. Ranks go
to the layers in the order of that gain for each value that is stored. This goes beyond Chain of Merges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.task_tensors import task_tensors
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import writable_copy

SUFFIX = " (ranks)"


def with_ranks(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    importance: Sequence[float],
    options: ChainOptions,
    context: Context,
) -> ChainOptions:
    """Choose the rank of each layer for ``task_share``. This merges once more; nothing of that is kept.

    Layers whose effect on the predictions is not known get the largest rank that all layers could have.

    Args:
        tasks: the experts and their calibration data.
        merged: as for :func:`~com_lightning.core.chain.chain.merge_layers`. It is not changed.
        importance: one weight per task.
        options: with ``task_share``.
        context: how it is carried out. It gets a warning if nothing fits the budget.

    Returns:
        The options, with ranks in place of the share.
    """
    copies = {id(tensor): writable_copy(tensor) for tensor in merged.values()}
    trial = {name: copies[id(tensor)] for name, tensor in merged.items()}
    own = task_tensors(tasks, trial, weights=True)
    first = replace(options, task_rank=1, records_gains=True)
    alone = replace(context.with_suffix(SUFFIX), warnings=[])
    records = merge_layers(tasks, trial, importance, first, alone, task_tensors=own)
    costs: dict[str, int] = {}
    for record in records:
        record.name = record.name.removesuffix(SUFFIX)
        matrices = [size for name, size in record.of_tasks.items() if merged[name].dim() > 1]
        if record.rank:
            costs[record.name] = sum(matrices)
    vectors = sum(sum(record.of_tasks.values()) for record in records) - sum(costs.values())
    budget = int(options.task_share * sum(tensor.numel() for tensor in copies.values())) - vectors
    ranks = spread({r.name: r.gains for r in records if r.name in costs}, costs, budget)
    if not any(ranks.values()):
        context.warnings.append(
            f"task_share={options.task_share}: no correction of any layer fits, because the biases and normalisations "
            f"of a task have {vectors:,} values already; give a larger share"
        )
    return replace(options, ranks=ranks)


def spread(gains: Mapping[str, Sequence[float]], costs: Mapping[str, int], budget: int) -> dict[str, int]:
    """Spread a budget over layers, in the order of gain for each value.

    Args:
        gains: layer -> the gain of each further rank, in falling order. If it is empty, the layer gets the largest rank
            that all layers could have.
        costs: layer -> values of each rank.
        budget: values in all.

    Returns:
        Layer -> rank.

    Example::

        >>> spread({"a": [9.0, 4.0, 1.0], "b": [6.0, 0.5]}, {"a": 1, "b": 2}, 4)
        {'a': 2, 'b': 1}
    """
    uniform = max(budget, 0) // max(sum(costs.values()), 1)
    ranks = {name: 0 if gains[name] else uniform for name in costs}
    left = budget - sum(ranks[name] * costs[name] for name in costs)
    steps = [(gain / costs[name], name) for name, each in gains.items() for gain in each if costs[name]]
    for _, name in sorted(steps, key=lambda step: -step[0]):
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks
