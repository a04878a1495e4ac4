"""What became of each parameter and buffer in a merge, and of how many values.

A merge leaves three traces: the records of its layers, the records of parameters that a rule merged one by one, and the
sorting of all names into shared and private. :func:`summarize_parameters` joins them by name. Tied parameters have
several names; their values are counted once, under the first one. :func:`describe_private` says in words what became of
the private layers of each task.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import alike_in_all, named_tensors, tied_names
from com_lightning.errors import some
from com_lightning.experts.parameters import Parameters
from com_lightning.methods import ParameterRecord
from com_lightning.results.outcome import ParameterOutcome


def summarize_parameters(
    experts: Mapping[str, nn.Module],
    parameters: Parameters,
    records: Sequence[LayerRecord],
    by_layer: bool,
    refitted: Mapping[str, Collection[str]] | None = None,
) -> tuple[dict[str, ParameterOutcome], dict[str, int]]:
    """Say what became of each parameter and buffer.

    Args:
        experts: Task -> its module.
        parameters: Which names are shared, private, or part of a merged adapter.
        records: Records of all layers and parameters.
        by_layer: Whether the method merges layers that calibration data reach.
        refitted: Task -> its private names that were solved for the merged model.

    Returns:
        Name -> what became of it, and the sizes, as in :class:`~com_lightning.results.report.MergeReport`.
    """
    expert = next(iter(experts.values()))
    ties, shared = tied_names(expert), set(parameters.shared)
    solved, notes = _solved_values(records, ties)
    has_zeros = {ties[name] for record in records for name in record.kept if name in ties}
    rules = {ties[record.name]: record.layer_type for record in records if isinstance(record, ParameterRecord)}
    estimated = {name for record in records for name in record.buffers}
    ranks = {name: record.rank for record in records for name in record.of_tasks}
    of_tasks = Counter[str]()
    for record in records:
        of_tasks.update(record.of_tasks)
    outcomes: dict[str, ParameterOutcome] = {}
    sizes, corrections = {"solved": 0, "averaged": 0, "private": 0, "re-estimated": 0, "buffer": 0}, 0
    for name, tensor, is_parameter in named_tensors(expert):
        if name not in shared:
            continue
        corrected = bool(ranks.get(name)) and tensor.dim() > 1
        if name in of_tasks and not corrected:
            outcomes[name] = ParameterOutcome("private, solved for each task")
            sizes["private"] += len(experts) * tensor.numel()
            continue
        first, count = ties[name], solved.get(ties[name], 0)
        if not is_parameter and name not in estimated and _is_averaged(name, experts):
            outcome = ParameterOutcome("averaged", "a buffer")
        elif not is_parameter:
            outcome = ParameterOutcome("re-estimated" if name in estimated else "buffer")
        elif count == tensor.numel():
            outcome = ParameterOutcome("solved")
        elif count:
            missed = f"no calibration data reached {tensor.numel() - count:,} of its values"
            if first in has_zeros:
                missed = f"calibration gave {tensor.numel() - count:,} of its values no inputs, or only zeros"
            outcome = ParameterOutcome("solved in part", missed)
        elif first in rules:
            outcome = ParameterOutcome("merged", rules[first])
        else:
            layer = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
            note = notes.get(first, notes.get(layer, "no calibration forward uses it"))
            outcome = ParameterOutcome("averaged", note if by_layer else None)
        outcomes[name] = outcome
        if first == name:
            named = outcome.status == "merged" or (not is_parameter and outcome.status != "averaged")
            others = str(outcome) if named else "averaged"
            sizes["solved"] += count
            sizes[others] = sizes.get(others, 0) + tensor.numel() - count
        if corrected:
            words = [outcome.detail, f"with a correction of rank {ranks[name]} for each task"]
            outcomes[name] = replace(outcome, detail=", ".join(word for word in words if word))
            corrections += len(experts) * of_tasks[name]
    for task, names in parameters.private.items():
        tensors = {name: tensor for name, tensor, _ in named_tensors(experts[task])}
        sizes["private"] += sum(tensors[name].numel() for name in names)
        outcomes.update(dict.fromkeys(names, ParameterOutcome("private")))
        solved_heads = (refitted or {}).get(task, ())
        outcomes.update(dict.fromkeys(solved_heads, ParameterOutcome("private, solved for the merged model")))
    outcomes.update(dict.fromkeys(parameters.merged_adapters, ParameterOutcome("folded")))
    return outcomes, {**sizes, "correction": corrections} if corrections else sizes


def describe_private(
    experts: Mapping[str, nn.Module],
    private: Mapping[str, Sequence[str]],
    heads: Mapping[str, Collection[str]],
    records: Sequence[LayerRecord],
) -> list[str]:
    """Say which private parameters were solved for the merged model, and why the others were not.

    Args:
        experts: Task -> its module.
        private: Task -> names of its private parameters and buffers.
        heads: Task -> those of them that were solved.
        records: Records of all layers and parameters.

    Returns:
        One line for all tasks for which it is the same.
    """
    lines: dict[str, list[str]] = {}
    alike = alike_in_all(list(experts.values()), next(iter(private.values()), ()))
    for task, expert in experts.items():
        notes = {r.name.removesuffix(f" of {task}"): r.note for r in records if r.task == task and r.note}
        parameters = {name for name, _, is_parameter in named_tensors(expert) if is_parameter}
        solved = [name for name in private.get(task, ()) if name in parameters and name in heads[task]]
        kept: dict[str, list[str]] = {}
        for name in private.get(task, ()):
            if name in parameters and name not in heads[task]:
                unused = "the same in all experts" if name in alike else "no calibration forward uses it"
                why = notes.get(name, notes.get(name.rpartition(".")[0], unused))
                kept.setdefault(why, []).append(name)
        parts = [f"{some(solved)} solved for the merged model's features"] * bool(solved)
        parts += [f"{some(names)} left as in the expert ({why})" for why, names in kept.items()]
        lines.setdefault("; ".join(parts) or "none", []).append(task)
    return [f"{'all tasks' if len(lines) == 1 else some(tasks)}: {line}" for line, tasks in lines.items()]


def _is_averaged(name: str, experts: Mapping[str, nn.Module]) -> bool:
    """Whether a shared buffer is averaged: one of numbers with a fraction that is not the same in all experts."""
    first, *others = (expert.get_buffer(name) for expert in experts.values())
    return first.is_floating_point() and any(not torch.equal(first, other.to(first)) for other in others)


def _solved_values(records: Sequence[LayerRecord], ties: Mapping[str, str]) -> tuple[dict[str, int], dict[str, str]]:
    """First name of each parameter -> how many of its values were solved; layer or parameter -> why not."""
    solved: dict[str, int] = {}
    notes = {record.name: record.note for record in records if record.note}
    for record in records:
        if record.task is not None or isinstance(record, ParameterRecord):
            continue
        for name, count in record.parameters.items():
            zeros = record.kept.get(name, 0)
            reached = count - zeros - count * record.groups_without_data // max(record.groups, 1)
            solved[ties[name]] = solved.get(ties[name], 0) + reached
            if not reached:
                why = "its calibration inputs are all zero" if zeros else "no calibration data reached it"
                notes.setdefault(ties[name], why)
    return solved, notes
