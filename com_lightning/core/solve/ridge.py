"""The closed form of one layer.

The merged weight of a layer minimises, over all tasks i with weight W_i, the importance-weighted distillation loss

    sum_i a_i / N_i  sum_n s_n || W x̂_n - W_i x_n ||²  +  l || W - W̄ ||²,        W̄ = sum_i a_i W_i

where x̂ is the layer's input in the model merged so far and x its input in expert i. It is solved for the *difference*
to the average, which loses no digits when the experts are close to each other and gives identical experts back exactly:

    W = W̄ + ( sum_i a_i [ (W_i - W̄) G_i + D_i ] ) ( sum_i a_i G_i + l I )⁻¹
    G_i = sum_n s x̂ x̂ᵀ / N_i          D_i = W_i sum_n s (x - x̂) x̂ᵀ / N_i

The equations are ours; the idea (sequential, closed-form, importance-weighted layer-wise distillation with
cosine-normalised Gram matrices) is that of Chain of Merges, arXiv 2508.21421. Without D_i it is RegMean's closed form
(Jin et al., arXiv 2212.09849, section 3.2) with a ridge towards the average in place of their scaled off-diagonal.

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

# A few matrices of this many numbers stay in a processor's cache.
PART_ELEMENTS = 2**16

CAST_ELEMENTS = 2**20
"""So much float32 is added to float64 at a time: it is copied first, and a copy of all of a large matrix takes five
times as long (tried, on a CPU)."""

SAFE_CONDITION = 1e10
"""Where a matrix is better conditioned than this, float64 cannot make a solution worse than what it starts from."""


@dataclass(frozen=True)
class Factor:
    """Cholesky factor of a regularised Gram matrix.

    Attributes:
        lower: ``(g, k, k)`` float64, lower triangular.
        condition: estimate of the condition number, from the factor's diagonal (a lower bound), worst group.
        bound: an upper bound of it, from trace and ridge.
        jitter: what had to be added to the diagonal for the factorisation to succeed, relative to its mean in the
            group, worst group.
        added: ``(g,)``, ridge and jitter as they were added to the diagonal.
        failed: ``(g,)``, groups whose matrix has no factor even so; they keep the average.
    """

    lower: Tensor
    condition: float
    bound: float
    jitter: float
    added: Tensor
    failed: Tensor


@dataclass(frozen=True)
class Solution:
    """What :func:`solve_or_average` has found.

    Attributes:
        weight: ``(g, o, k)`` in float64.
        kept: how many groups keep the average because their solution is not better than that.
        residual: relative residual of the fit, see :func:`residual`, if it was asked for.
    """

    weight: Tensor
    kept: int
    residual: float | None = None


def factorize(grams: Sequence[Tensor], importance: Sequence[float], ridge: float) -> Factor:
    """Sum the Gram matrices of the tasks, add the ridge and factorise, in float64.

    Args:
        grams: one ``(g, k, k)`` per task, each divided by its number of rows.
        importance: one weight per task.
        ridge: relative to the mean of the diagonal of the summed matrix, over all groups.

    Returns:
        The factor, and what was factorised.

    Raises:
        ValueError: if a Gram matrix holds NaN or infinity.

    Complexity: ``g k³ / 3`` multiply-adds.

    Example::

        >>> factorize([torch.eye(2)[None] * 4], [1.0], ridge=0.0).lower[0].diag().tolist()
        [2.0, 2.0]
    """
    total = torch.zeros_like(grams[0], dtype=torch.float64)
    for part in _parts(total):
        rows = max(CAST_ELEMENTS // total[part, :1].numel(), 1)
        for start in range(0, total.shape[1], rows):
            sums = total[part, start : start + rows]
            for gram, weight in zip(grams, importance):
                sums.add_(gram[part, start : start + rows], alpha=weight)
    diagonal = total.diagonal(dim1=-2, dim2=-1)
    scale = float(diagonal.mean())
    if not math.isfinite(scale):
        raise ValueError("the statistics of a layer hold NaN or infinity")
    if scale <= 0.0:  # no row carries anything: any solution fits, and the average is kept
        scale, ridge = 1.0, max(ridge, 1.0)
    own = diagonal.mean(-1, keepdim=True)
    own = torch.where(own > 0, own, scale)  # a group without data
    added = torch.full_like(own[:, 0], ridge * scale)
    diagonal.add_(ridge * scale)
    jitter = 0.0
    lower, info = torch.linalg.cholesky_ex(total)
    while bool((failed := info != 0).any()) and jitter < 1.0:
        step = 9 * jitter if jitter else 1e-12
        diagonal.add_(step * own * failed[:, None])
        added += step * own[:, 0] * failed
        jitter += step
        lower, info = torch.linalg.cholesky_ex(total)
    if bool(failed.any()):
        lower[failed] = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device)
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    condition = float((pivots.amax(-1) / pivots.amin(-1)).square().amax())
    bound = float(own.amax()) * lower.shape[-1] / (ridge * scale) if ridge and not jitter else math.inf
    return Factor(lower, condition, bound, jitter, added, failed)


def solve(
    factor: Factor,
    grams: Sequence[Tensor],
    drifts: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    importance: Sequence[float],
) -> Tensor:
    """Return the merged weight of a layer, ``(g, o, k)`` in float64 (equation at the top of this module).

    Args:
        factor: of the same Gram matrices, see :func:`factorize`.
        grams: one ``(g, k, k)`` per task, each divided by its number of rows.
        drifts: one ``(g, o, k)`` per task, ``D_i`` above; ``None`` where targets are taken on the merged model's input.
        weights: the experts' weights, one ``(g, o, k)`` per task, biases appended as last input.
        importance: one weight per task, summing to one.

    Complexity: ``(T + 2) g o k²`` multiply-adds for ``T`` tasks.

    Example: two experts with one input; the one whose input is three times as large counts nine times.

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
    """Return the solution of :func:`solve`, or the average for groups whose solution is not better.

    With an ``anchor``, ``(g, o, k)``, it takes the place of the average ``W̄``.

    With ``R`` the right-hand side and ``A = L Lᵀ`` the regularised Gram matrix, a difference ``D`` to the average
    lowers the loss by ``2 tr(R Dᵀ) - ||D L||²``. That is never negative for the exact solution. Products of weights and
    Gram matrices are made in the precision of these, which have no more digits.

    If it is ``measured``, with targets on the merged model's input, the residual comes for one more product: the loss
    of ``W̄`` is made of what ``R`` is made of, and so is ``sum a ||W_i x̂||²`` beside ``||W̄ L||²``.
    """
    solution = torch.empty_like(weights[0], dtype=torch.float64)
    kept, error, energy = 0, 0.0, 0.0
    for part in _parts(solution):
        mean = torch.zeros_like(solution[part])
        for weight, share in zip(weights, importance):
            mean.add_(weight[part].to(torch.float64), alpha=share)
        if anchor is not None:
            mean = anchor[part].to(torch.float64)
        right = torch.zeros_like(mean)
        spread = 0.0
        for gram, drift, weight, share in zip(grams, drifts, weights, importance):
            gap = weight[part].to(torch.float64) - mean
            product = times(gap.to(gram.dtype), gram[part].mT)
            right.add_(product, alpha=share)
            if drift is not None:
                right.add_(drift[part].to(torch.float64), alpha=share)
            if measured:
                spread += share * _dot(product, gap)
        lower = factor.lower[part]
        difference = _divided(right, lower)
        gain = (right * difference).sum((1, 2))  # of the exact solution
        if not factor.bound < SAFE_CONDITION:
            gain = 2.0 * gain - times(difference, lower).square().sum((1, 2))
        worse = factor.failed[part] | ~(gain >= 0.0)
        kept += int(worse.sum())
        difference.masked_fill_(worse[:, None, None], 0.0)
        if measured:
            added = factor.added[part]
            lengths = times(mean.to(grams[0].dtype), lower.to(grams[0].dtype))
            energy += spread + 2.0 * _dot(mean, right) + _dot(lengths, lengths)
            energy -= float((added * mean.square().sum((1, 2))).sum())
            ridge = added * difference.square().sum((1, 2))
            error += spread - float((gain.masked_fill(worse, 0.0) + ridge).sum())
        solution[part] = mean + difference
    relative = max(error, 0.0) / energy if energy > 0 else 0.0
    return Solution(solution, kept, relative if measured else None)


def residual(grams: Sequence[Tensor], weights: Sequence[Tensor], merged: Tensor, importance: Sequence[float]) -> float:
    """Return the residual of any weights, relative to the outputs: ``sum a ||(W - W_i) x̂||² / sum a ||W_i x̂||²``.

    Example::

        >>> gram, weight = torch.eye(2)[None], torch.ones(1, 1, 2)
        >>> residual([gram], [weight], weight.double() / 2, [1.0])
        0.25
    """
    error = energy = 0.0
    for part in _parts(merged):
        total = torch.zeros_like(grams[0][part])
        for all_grams, weight, share in zip(grams, weights, importance):
            gram = all_grams[part]
            total.add_(gram, alpha=share)
            exact = weight[part].to(gram.dtype)
            rows = times(exact, gram.mT)
            own = share * _dot(rows, exact)
            energy += own
            error += own - 2.0 * share * _dot(rows, merged[part])
        solution = merged[part].to(total.dtype)
        error += _dot(times(solution, total.mT), solution)
    return max(error, 0.0) / energy if energy > 0 else 0.0


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))


def _divided(right: Tensor, lower: Tensor) -> Tensor:
    """``(g, o, k)`` times the inverse of the matrix whose Cholesky factor is ``lower``, ``(g, k, k)``."""
    # Of tables, as in `times`.
    return right / lower / lower if lower.shape[-1] == 1 else torch.cholesky_solve(right.mT, lower).mT


def _parts(weight: Tensor) -> Iterator[slice]:
    """Groups to work on at a time: a table has as many as it has rows, and each copy of all of it costs a second."""
    size = max(PART_ELEMENTS // weight[0].numel(), 1)
    return (slice(start, start + size) for start in range(0, len(weight), size))
