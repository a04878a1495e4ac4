"""Whether experts descend from one base, and have one architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter

from com_lightning.core.tensors.modules import all_finite, named_tensors
from com_lightning.experts.state_dicts import some

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOREIGN = 0.2
"""Share of values without a counterpart above which modules are taken for different architectures."""
_UNRELATED = 0.2
"""Cosine between weights below which experts are taken for trainings of their own."""
_LOOKED_AT = 2**16
"""Values of a matrix that such a cosine is made of: it is then known to about 0.01."""


def non_finite_weights(experts: Mapping[str, nn.Module]) -> list[str]:
    """Experts whose parameters hold NaN or infinity, shared or private. (Buffers may: masks of minus infinity.)"""
    problems = []
    for task, expert in experts.items():
        broken = [name for name, tensor, is_parameter in named_tensors(expert) if is_parameter and not _finite(tensor)]
        if broken:
            problems.append(f"expert '{task}': NaN or infinity in {some(broken)}; its training has diverged")
    return problems


def _finite(tensor: Tensor) -> bool:
    if tensor.dtype not in _PRECISIONS or isinstance(tensor, UninitializedParameter):
        return True
    return all_finite(tensor)


def foreign_values(modules: Mapping[str, nn.Module], expected: Collection[str] = ()) -> list[str]:
    """Warn of modules that have much which others lack, so that it is not merged.

    Parameters that differ in their first dimension only, heads and embedding tables mostly, count as counterparts.

    Args:
        modules: name for messages -> module.
        expected: names of parameters that need no counterpart.
    """
    shapes = {
        who: {n: t.shape for n, t, is_parameter in named_tensors(module) if is_parameter and n not in expected}
        for who, module in modules.items()
    }
    told: dict[str, tuple[float, list[str], list[str]]] = {}
    for who, own in shapes.items():
        total = sum(shape.numel() for shape in own.values())
        for other, theirs in shapes.items():
            alone = [n for n, shape in own.items() if n not in theirs or theirs[n][1:] != shape[1:]]
            share = sum(own[n].numel() for n in alone) / max(total, 1)
            if share > _FOREIGN:
                most, names, others = told.get(who, (0.0, alone, []))
                told[who] = (max(most, share), names, [*others, other])
    warnings, pairs = list[str](), set[frozenset[str]]()
    for who, (share, names, others) in sorted(told.items(), key=lambda item: -len(item[1][2])):
        if all(frozenset({who, other}) in pairs for other in others):
            continue  # it has been said of the other one
        pairs |= {frozenset({who, other}) for other in others}
        warnings.append(
            f"{100 * share:.0f} % of the values of {who} have no counterpart in {some(others)}, and are not merged: "
            f"{some(names, most=2)}. Is it the same architecture?"
        )
    return warnings


def unrelated_weights(experts: Mapping[str, nn.Module], shared: Collection[str]) -> list[str]:
    """Warn of experts that seem not to descend from one base: fine-tuning hardly turns a weight matrix, and two
    trainings from scratch end at right angles. Judged by the cosine between each expert and the mean of the others."""
    states = {task: {n: t for n, t, _ in named_tensors(expert)} for task, expert in experts.items()}
    first = next(iter(experts.values()))
    matrices = [n for n, t, is_parameter in named_tensors(first) if n in shared and is_parameter and t.dim() > 1]
    products = {task: torch.zeros(3, dtype=torch.float64) for task in experts}
    for name in matrices:
        values = {task: _some_of(state[name]) for task, state in states.items()}
        total = torch.stack(list(values.values())).sum(0)
        share = states[next(iter(states))][name].numel() / max(len(total), 1)
        for task, own in values.items():
            others = total - own
            products[task] += share * torch.stack([own @ others, own @ own, others @ others]).double()
    cosines = {
        t: float(across / (own * others).sqrt().clamp_min(1e-30)) for t, (across, own, others) in products.items()
    }
    odd = {task: cosine for task, cosine in cosines.items() if cosine < _UNRELATED}
    if len(experts) < 2 or not matrices or not odd:
        return []
    judged = "fine-tuned siblings are mostly above 0.9"
    if len(odd) == len(experts):
        return [f"{_whose(list(odd))} share a base: the cosine between {_pairs(odd)}; {judged}"]
    return [
        f"expert '{task}' seems not to be fine-tuned from the same base as the others: the cosine between its weight "
        f"matrices and the mean of the others' is {cosine:.2f}; {judged}"
        for task, cosine in odd.items()
    ]


def unrelated_base(base: Mapping[str, Tensor], experts: Mapping[str, nn.Module], shared: Collection[str]) -> str | None:
    """Why experts seem not to be fine-tuned from a base: the cosine between it and their mean, over weight matrices.

    Args:
        base: name of each shared parameter -> its value.
        experts: task -> its module.
        shared: names of what is merged.
    """
    states = [{n: t for n, t, _ in named_tensors(expert)} for expert in experts.values()]
    products = torch.zeros(3, dtype=torch.float64)
    for name, origin in base.items():
        if name in shared and isinstance(states[0][name], nn.Parameter) and origin.dim() > 1:
            own = _some_of(origin)
            mean = torch.zeros_like(own)
            for state in states:
                mean += _some_of(state[name]).to(own)
            share = origin.numel() / max(len(own), 1)
            products += share * torch.stack([own @ mean, own @ own, mean @ mean]).double().cpu()
    across, own, mean = products
    if mean == 0 or (cosine := float(across / (own * mean).sqrt().clamp_min(1e-30))) >= _UNRELATED:
        return None
    return (
        f"the experts seem not to be fine-tuned from it: the cosine between its weight matrices and their mean is "
        f"{cosine:.2f}; it is mostly above 0.9"
    )


def _some_of(matrix: Tensor) -> Tensor:
    """Values from all over a matrix, always the same ones, in float32."""
    step = max(matrix.numel() // _LOOKED_AT, 1) | 1  # an odd one does not stay in one column
    return matrix.detach().flatten()[::step].float()


def _whose(tasks: Sequence[str]) -> str:
    names = some([f"'{task}'" for task in tasks])
    return f"the two experts {names} seem not to" if len(tasks) == 2 else f"no two of the experts {names} seem to"


def _pairs(cosines: Mapping[str, float]) -> str:
    if len(cosines) == 2:
        return f"their weight matrices is {max(cosines.values()):.2f}"
    return f"each one's weight matrices and the mean of the others' is {max(cosines.values()):.2f} at most"
