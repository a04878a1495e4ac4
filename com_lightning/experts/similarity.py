"""Check that experts come from one base, and have one architecture."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import UninitializedParameter

from com_lightning.core.tensors.modules import all_finite, named_tensors
from com_lightning.experts.state_dicts import some

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FOREIGN = 0.2
"""Share of values without a counterpart above which two modules seem to have different architectures."""
_UNRELATED = 0.2
"""Cosine between weights below which experts seem to be trained from different bases."""
_SAMPLED = 2**16
"""Number of values of a matrix that such a cosine is computed from, which gives it to about 0.01."""


def non_finite_weights(experts: Mapping[str, nn.Module]) -> list[str]:
    """Experts with NaN or infinity in their parameters. Buffers may have it, as masks of minus infinity do."""
    problems = []
    for task, expert in experts.items():
        broken = [
            name for name, tensor, is_parameter in named_tensors(expert) if is_parameter and not is_finite(tensor)
        ]
        if broken:
            problems.append(f"expert '{task}': NaN or infinity in {some(broken)}; its training has diverged")
    return problems


def unmergeable_weights(
    modules: Mapping[str, nn.Module],
    shared: Collection[str],
    stored: Mapping[str, Mapping[str, torch.dtype]] | None = None,
) -> list[str]:
    """Describe shared parameters that no rule can merge: quantised, complex, in float8, or matrices of integers.

    Args:
        modules: name for messages -> module.
        shared: names of the parameters that are to be merged.
        stored: name for messages -> name of each parameter that was converted -> the precision of its source.

    Returns:
        The problems, with what to do.
    """
    problems = []
    for label, module in modules.items():
        precisions = (stored or {}).get(label, {})
        reasons: dict[str, list[str]] = {}
        for name, tensor, is_parameter in named_tensors(module):
            if not is_parameter or name not in shared:
                continue
            if reason := _unmergeable(tensor, precisions.get(name)):
                reasons.setdefault(reason, []).append(name)
        problems += [f"{label}: {some(names)} {reason}" for reason, names in reasons.items()]
    return problems


def _unmergeable(tensor: Tensor, stored: torch.dtype | None) -> str | None:
    dtype = stored or tensor.dtype
    name = str(dtype).removeprefix("torch.")
    if hasattr(tensor, "quant_state") or type(tensor).__module__.startswith(("bitsandbytes", "torchao")):
        return f"is quantised ({type(tensor).__name__}); load the model without quantisation"
    if dtype.is_complex:
        return f"is {name}, which no rule merges; name it in `private`, so that each task keeps its own"
    if dtype.is_floating_point and dtype not in _PRECISIONS:
        return f"is {name}, in which nothing can be computed; convert it to bfloat16, with its scales if it has any"
    if not dtype.is_floating_point and tensor.dim() > 1:
        return f"is {name}, which no rule merges; load the model without quantisation, or name it in `private`"
    return None


def is_finite(tensor: Tensor) -> bool:
    if tensor.dtype not in _PRECISIONS or isinstance(tensor, UninitializedParameter):
        return True
    return all_finite(tensor)


def foreign_values(modules: Mapping[str, nn.Module], expected: Collection[str] = ()) -> list[str]:
    """Warn of modules that have many values that others lack, so that these are not merged.

    Parameters that differ only in their first dimension (mostly heads and embedding tables) count as counterparts.

    Args:
        modules: name for messages -> module.
        expected: names of parameters that need no counterpart.

    Returns:
        The warnings.
    """
    shapes = {
        label: {n: t.shape for n, t, is_parameter in named_tensors(module) if is_parameter and n not in expected}
        for label, module in modules.items()
    }
    foreign: dict[str, tuple[float, list[str], list[str]]] = {}
    for label, ours in shapes.items():
        total = sum(shape.numel() for shape in ours.values())
        for other, theirs in shapes.items():
            alone = [n for n, shape in ours.items() if n not in theirs or theirs[n][1:] != shape[1:]]
            share = sum(ours[n].numel() for n in alone) / max(total, 1)
            if share > _FOREIGN:
                largest, names, others = foreign.get(label, (0.0, alone, []))
                foreign[label] = (max(largest, share), names, [*others, other])
    warnings, pairs = list[str](), set[frozenset[str]]()
    for label, (share, names, others) in sorted(foreign.items(), key=lambda item: -len(item[1][2])):
        if all(frozenset({label, other}) in pairs for other in others):
            continue  # a warning names this pair already
        pairs |= {frozenset({label, other}) for other in others}
        warnings.append(
            f"{100 * share:.0f} % of the values of {label} have no counterpart in {some(others)}, and are not merged: "
            f"{some(names, most=2)}. Is it the same architecture?"
        )
    return warnings


def unrelated_weights(experts: Mapping[str, nn.Module], shared: Collection[str]) -> list[str]:
    """Warn of experts that seem not to come from one base.

    Fine-tuning hardly turns a weight matrix, and two trainings from scratch end at right angles. What counts is the
    cosine between the weight matrices of each expert and the mean of the others.

    Args:
        experts: task -> its module.
        shared: names of what is merged.

    Returns:
        The warnings.
    """
    states = {task: {n: t for n, t, _ in named_tensors(expert)} for task, expert in experts.items()}
    first = next(iter(experts.values()))
    matrices = [n for n, t, is_parameter in named_tensors(first) if n in shared and is_parameter and t.dim() > 1]
    products = {task: torch.zeros(3, dtype=torch.float64) for task in experts}
    for name in matrices:
        values = {task: _sample(state[name]) for task, state in states.items()}
        total = torch.stack(list(values.values())).sum(0)
        share = states[next(iter(states))][name].numel() / max(len(total), 1)
        for task, value in values.items():
            others = total - value
            products[task] += share * torch.stack([value @ others, value @ value, others @ others]).double()
    cosines = {task: _cosine(product) for task, product in products.items()}
    unrelated = {task: cosine for task, cosine in cosines.items() if cosine < _UNRELATED}
    if len(experts) < 2 or not matrices or not unrelated:
        return []
    usual = "fine-tuned siblings are mostly above 0.9"
    if len(unrelated) == len(experts):
        return [f"{_subject(list(unrelated))} share a base: the cosine between {_largest(unrelated)}; {usual}"]
    return [
        f"expert '{task}' seems not to be fine-tuned from the same base as the others: the cosine between its weight "
        f"matrices and the mean of the others' is {cosine:.2f}; {usual}"
        for task, cosine in unrelated.items()
    ]


def unrelated_base(base: Mapping[str, Tensor], experts: Mapping[str, nn.Module], shared: Collection[str]) -> str | None:
    """Say why experts seem not to be fine-tuned from a base: the cosine between its weight matrices and their mean.

    Args:
        base: name of each shared parameter -> its value.
        experts: task -> its module.
        shared: names of what is merged.

    Returns:
        The reason in words; ``None`` if they seem to be fine-tuned from it.
    """
    states = [{n: t for n, t, _ in named_tensors(expert)} for expert in experts.values()]
    products = torch.zeros(3, dtype=torch.float64)
    for name, origin in base.items():
        if name in shared and isinstance(states[0][name], nn.Parameter) and origin.dim() > 1:
            value = _sample(origin)
            mean = torch.zeros_like(value)
            for state in states:
                mean += _sample(state[name]).to(value)
            share = origin.numel() / max(len(value), 1)
            products += share * torch.stack([value @ mean, value @ value, mean @ mean]).double().cpu()
    if products[2] == 0 or (cosine := _cosine(products)) >= _UNRELATED:
        return None
    return (
        f"the experts seem not to be fine-tuned from it: the cosine between its weight matrices and their mean is "
        f"{cosine:.2f}; it is mostly above 0.9"
    )


def _cosine(products: Tensor) -> float:
    """From the inner product of two vectors and that of each with itself."""
    across, one, other = products
    return float(across / (one * other).sqrt().clamp_min(1e-30))


def _sample(matrix: Tensor) -> Tensor:
    """Values from all over a matrix in float32. Two matrices of one shape give values of the same places."""
    step = max(matrix.numel() // _SAMPLED, 1) | 1  # an odd one does not stay in one column
    return matrix.detach().flatten()[::step].float()


def _subject(tasks: Sequence[str]) -> str:
    names = some([f"'{task}'" for task in tasks])
    return f"the two experts {names} seem not to" if len(tasks) == 2 else f"no two of the experts {names} seem to"


def _largest(cosines: Mapping[str, float]) -> str:
    if len(cosines) == 2:
        return f"their weight matrices is {max(cosines.values()):.2f}"
    return f"each one's weight matrices and the mean of the others' is {max(cosines.values()):.2f} at most"
