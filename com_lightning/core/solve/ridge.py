"""The closed form of one layer.

The merged weight of a layer minimises, over all tasks i with weight W_i, the importance-weighted distillation loss

    sum_i a_i / N_i  sum_n s_n || W x̂_n - W_i x_n ||²  +  l || W - W̄ ||²,        W̄ = sum_i a_i W_i

where x̂ is the layer's input in the model merged so far and x its input in expert i. We solve for the *difference* to
the average. This loses no digits when the experts are close to each other, and reproduces identical experts exactly:

    W = W̄ + ( sum_i a_i [ (W_i - W̄) G_i + D_i ] ) ( sum_i a_i G_i + l I )⁻¹
    G_i = sum_n s x̂ x̂ᵀ / N_i          D_i = W_i sum_n s (x - x̂) x̂ᵀ / N_i

The equations are ours. The idea (sequential, closed-form, importance-weighted layer-wise distillation with
cosine-normalised Gram matrices) comes from Chain of Merges, arXiv 2508.21421. Without D_i, this is the closed form of
RegMean (Jin et al., arXiv 2212.09849, section 3.2), with a ridge towards the average instead of a scaled off-diagonal.

Shapes: a layer is ``g`` independent regressions ("groups") from ``k`` inputs to ``o`` outputs: ``G`` is ``(g, k, k)``,
weights and ``D`` are ``(g, o, k)``. A dense layer has one group; a normalisation has one group per channel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from com_lightning.core.tensors.matmul import times

# A few matrices of this many numbers fit in a processor's cache.
BLOCK_ELEMENTS = 2**16

CAST_ELEMENTS = 2**20
"""How many float32 numbers are added to float64 at a time. They are copied first, and to copy a large matrix as a whole
takes five times as long (measured on a CPU)."""

SAFE_CONDITION = 1e10
"""With a condition number below this, rounding in float64 cannot make a solution worse than the average."""


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a regularised Gram matrix.

    Attributes:
        lower: ``(g, k, k)`` float64, lower triangular.
        condition: estimate of the condition number of the worst group, from the factor's diagonal. It is a lower bound.
        bound: an upper bound of the condition number, from trace and ridge.
        jitter: extra amount that the diagonal needed for the factorisation to succeed, relative to the mean of the
            group's diagonal, for the worst group.
        added: ``(g,)``, the sum of ridge and jitter on the diagonal.
        failed: ``(g,)``, whether the factorisation failed even with jitter. Such groups keep the average.
    """

    lower: Tensor
    condition: float
    bound: float
    jitter: float
    added: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Solution:
    """The result of :func:`solve_or_average`.

    Attributes:
        weight: ``(g, o, k)`` in float64.
        groups_kept_average: number of groups that keep the average because their solution is not better.
        residual: relative residual of the fit, see :func:`residual`, if it was measured.
    """

    weight: Tensor
    groups_kept_average: int
    residual: float | None = None


def factorize(grams: Sequence[Tensor], importance: Sequence[float], ridge: float) -> Factor:
    """Sum the Gram matrices of the tasks, add the ridge and factorise, in float64.

    Args:
        grams: one ``(g, k, k)`` per task, each divided by its number of rows.
        importance: one weight per task.
        ridge: relative to the mean of the diagonal of the summed matrix, over all groups.

    Returns:
        The factor.

    Raises:
        ValueError: if a Gram matrix holds NaN or infinity.

    Complexity: ``g k³ / 3`` multiply-adds.

    Example::

        >>> factorize([torch.eye(2)[None] * 4], [1.0], ridge=0.0).lower[0].diag().tolist()
        [2.0, 2.0]
    """
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    for block in _blocks(total):
        rows = max(CAST_ELEMENTS // total[block, :1].numel(), 1)
        for start in range(0, total.shape[1], rows):
            sums = total[block, start : start + rows]
            for gram, weight in zip(grams, importance):
                sums.add_(gram[block, start : start + rows], alpha=weight)
    diagonal = total.diagonal(dim1=-2, dim2=-1)
    scale = float(diagonal.mean())
    if not math.isfinite(scale):
        raise ValueError("the statistics of a layer hold NaN or infinity")
    if scale <= 0.0:  # all inputs are zero, so any weight fits: the ridge keeps the average
        scale, ridge = 1.0, max(ridge, 1.0)
    group_scale = diagonal.mean(-1, keepdim=True)
    group_scale = torch.where(group_scale > 0, group_scale, scale)  # zero for a group without data
    added = torch.full_like(group_scale[:, 0], ridge * scale)
    diagonal.add_(ridge * scale)
    jitter = 0.0
    lower, info = torch.linalg.cholesky_ex(total)
    while bool((failed := info != 0).any()) and jitter < 1.0:
        step = 9 * jitter if jitter else 1e-12
        diagonal.add_(step * group_scale * failed[:, None])
        added += step * group_scale[:, 0] * failed
        jitter += step
        lower, info = torch.linalg.cholesky_ex(total)
    if bool(failed.any()):
        lower[failed] = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    condition = float((pivots.amax(-1) / pivots.amin(-1)).square().amax())
    bound = float(group_scale.amax()) * lower.shape[-1] / (ridge * scale) if ridge and not jitter else math.inf
    return Factor(lower, condition, bound, jitter, added, failed)


def solve(
    factor: Factor,
    grams: Sequence[Tensor],
    drifts: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    importance: Sequence[float],
) -> Tensor:
    """Solve a layer, by the equation at the top of this module.

    Args:
        factor: the factor of the Gram matrices, see :func:`factorize`.
        grams: one ``(g, k, k)`` per task, each divided by its number of rows.
        drifts: one ``(g, o, k)`` per task, ``D_i`` above. ``None``: the target is computed on the merged model's input.
        weights: the experts' weights, one ``(g, o, k)`` per task, with the bias as last input.
        importance: one weight per task, summing to one.

    Returns:
        The merged weight, ``(g, o, k)`` in float64.

    Complexity: ``(T + 2) g o k²`` multiply-adds for ``T`` tasks.

    Example: two experts with one input. The input of the second is three times as large, so it counts nine times.

        >>> grams = [torch.tensor([[[1.0]]]), torch.tensor([[[9.0]]])]
        >>> factor = factorize(grams, [0.5, 0.5], ridge=0.0)
        >>> weights = [torch.tensor([[[0.0]]]), torch.tensor([[[10.0]]])]
        >>> solve(factor, grams, [None, None], weights, [0.5, 0.5]).item()
        9.0
    """
    return solve_or_average(factor, grams, drifts, weights, importance).weight


def solve_or_average(
    factor: Factor,
    grams: Sequence[Tensor],
    drifts: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    importance: Sequence[float],
    anchor: Tensor | None = None,
    measured: bool = False,
) -> Solution:
    """Solve a layer as :func:`solve` does. Groups whose solution is not better than the average keep the average.

    With ``R`` the right-hand side and ``A = L Lᵀ`` the regularised Gram matrix, a difference ``D`` to the average
    lowers the loss by ``2 tr(R Dᵀ) - ||D L||²``. For the exact solution, this is never negative. Products of weights
    and Gram matrices are computed in the precision of the Gram matrices, which have no more digits.

    Args:
        factor: as for :func:`solve`.
        grams: as for :func:`solve`.
        drifts: as for :func:`solve`.
        weights: as for :func:`solve`.
        importance: as for :func:`solve`.
        anchor: ``(g, o, k)``, takes the place of the average ``W̄``.
        measured: also compute the residual. All targets must be computed on the merged model's input. It costs one more
            product: the loss of ``W̄`` consists of the terms of ``R``, and so does ``sum a ||W_i x̂||²``, except for
            ``||W̄ L||²``.

    Returns:
        The solution.
    """
    solution = torch.empty_like(weights[0], dtype=torch.float64)
    groups_kept, error, energy = 0, 0.0, 0.0
    for block in _blocks(solution):
        mean = torch.zeros_like(solution[block])
        for weight, share in zip(weights, importance):
            mean.add_(weight[block].to(torch.float64), alpha=share)
        if anchor is not None:
            mean = anchor[block].to(torch.float64)
        right = torch.zeros_like(mean)
        mean_error = 0.0
        for gram, drift, weight, share in zip(grams, drifts, weights, importance):
            deviation = weight[block].to(torch.float64) - mean
            product = times(deviation.to(gram.dtype), gram[block].mT)
            right.add_(product, alpha=share)
            if drift is not None:
                right.add_(drift[block].to(torch.float64), alpha=share)
            if measured:
                mean_error += share * _dot(product, deviation)
        lower = factor.lower[block]
        difference = _divide(right, lower)
        gain = (right * difference).sum((1, 2))  # of the exact solution
        if not factor.bound < SAFE_CONDITION:
            gain = 2.0 * gain - times(difference, lower).square().sum((1, 2))
        is_worse = factor.failed[block] | ~(gain >= 0.0)
        groups_kept += int(is_worse.sum())
        difference.masked_fill_(is_worse[:, None, None], 0.0)
        if measured:
            added = factor.added[block]
            lengths = times(mean.to(grams[0].dtype), lower.to(grams[0].dtype))
            energy += mean_error + 2.0 * _dot(mean, right) + _dot(lengths, lengths)
            energy -= float((added * mean.square().sum((1, 2))).sum())
            ridge = added * difference.square().sum((1, 2))
            error += mean_error - float((gain.masked_fill(is_worse, 0.0) + ridge).sum())
        solution[block] = mean + difference
    relative = max(error, 0.0) / energy if energy > 0 else 0.0
    return Solution(solution, groups_kept, relative if measured else None)


def residual(grams: Sequence[Tensor], weights: Sequence[Tensor], merged: Tensor, importance: Sequence[float]) -> float:
    """Return the residual of any weights, relative to the outputs: ``sum a ||(W - W_i) x̂||² / sum a ||W_i x̂||²``.

    Example::

        >>> gram, weight = torch.eye(2)[None], torch.ones(1, 1, 2)
        >>> residual([gram], [weight], weight.double() / 2, [1.0])
        0.25
    """
    error = energy = 0.0
    for block in _blocks(merged):
        total = torch.zeros_like(grams[0][block])
        for all_grams, weight, share in zip(grams, weights, importance):
            gram = all_grams[block]
            total.add_(gram, alpha=share)
            expert = weight[block].to(gram.dtype)
            product = times(expert, gram.mT)
            task_energy = share * _dot(product, expert)
            energy += task_energy
            error += task_energy - 2.0 * share * _dot(product, merged[block])
        solution = merged[block].to(total.dtype)
        error += _dot(times(solution, total.mT), solution)
    return max(error, 0.0) / energy if energy > 0 else 0.0


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))


def _divide(right: Tensor, lower: Tensor) -> Tensor:
    """Multiply ``(g, o, k)`` by the inverse of the matrix whose Cholesky factor is ``lower``, ``(g, k, k)``."""
    # Many groups with one input (embedding tables) are slow as matrix products, see `times`.
    return right / lower / lower if lower.shape[-1] == 1 else torch.cholesky_solve(right.mT, lower).mT


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Groups to work on at a time. Embedding tables have a group for each row, and to copy a table takes a second."""
    size = max(BLOCK_ELEMENTS // weight[0].numel(), 1)
    return (slice(start, start + size) for start in range(0, len(weight), size))
