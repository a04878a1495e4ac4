"""What became of each parameter and buffer, and of how many values."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import nn

from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import named_tensors, tied_names
from com_lightning.experts.load import Parameters
from com_lightning.methods import ParameterRecord
from com_lightning.results.report import PRIVATE_REFITTED, PRIVATE_SOLVED


def account(
    experts: Mapping[str, nn.Module],
    parameters: Parameters,
    records: Sequence[LayerRecord],
    by_layer: bool,
    own: Collection[str] = (),
    refitted: Mapping[str, Collection[str]] | None = None,
) -> tuple[dict[str, str], dict[str, int]]:
    """Name of each parameter or buffer -> what became of it, and each kind -> number of values, as in
    :class:`~com_lightning.results.report.MergeReport`. Values that no data reached count as averaged, which they are.

    Args:
        experts: task -> its module.
        parameters: which are shared, private, folded.
        records: of all layers.
        by_layer: whether the method merges layers that calibration data reach.
        own: names of what each task keeps for itself, solved for it.
        refitted: task -> names of what is private to it and was solved for the merged model.
    """
    expert = next(iter(experts.values()))
    ties = tied_names(expert)
    solved: dict[str, int] = {}
    notes = {record.name: record.note for record in records if record.note}
    by_rule = {ties[record.name]: record.kind for record in records if isinstance(record, ParameterRecord)}
    for record in (record for record in records if record.task is None):
        for name, count in record.parameters.items() if not isinstance(record, ParameterRecord) else ():
            reached = count - count * record.idle // max(record.groups, 1)
            solved[ties[name]] = solved.get(ties[name], 0) + reached
            if not reached:
                notes.setdefault(ties[name], "no calibration data reached it")
    result: dict[str, str] = {}
    renewed = {name for record in records for name in record.buffers}
    sizes = {"solved": 0, "averaged": 0, "private": 0, "re-estimated": 0, "buffer": 0}
    shared = set(parameters.shared)
    for name, tensor, is_parameter in named_tensors(expert):
        if name not in shared:
            continue
        if name in own:
            result[name] = PRIVATE_SOLVED
            sizes["private"] += len(experts) * tensor.numel()
            continue
        first, count = ties[name], solved.get(ties[name], 0)
        if not is_parameter:
            result[name] = "re-estimated" if name in renewed else "buffer"
        elif count == tensor.numel():
            result[name] = "solved"
        elif first in by_rule and not count:
            result[name] = f"merged by {by_rule[first]}"
        elif count:
            result[name] = f"solved in part: no calibration data reached {tensor.numel() - count:,} of its values"
        else:
            note = notes.get(first, notes.get(name.rpartition(".")[0], "no calibration forward uses it"))
            result[name] = f"averaged: {note}" if by_layer else "averaged"
        if first == name:
            sizes["solved"] += count
            kind = result[name] if not is_parameter or result[name].startswith("merged") else "averaged"
            sizes[kind] = sizes.get(kind, 0) + tensor.numel() - count
    for task, names in parameters.private.items():
        own = {name: tensor for name, tensor, _ in named_tensors(experts[task])}
        result.update(dict.fromkeys(names, "private"))
        result.update(dict.fromkeys((refitted or {}).get(task, ()), PRIVATE_REFITTED))
        sizes["private"] += sum(own[name].numel() for name in names)
    result.update(dict.fromkeys(parameters.folded, "folded"))
    return result, sizes
