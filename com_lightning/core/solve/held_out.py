"""The ridge of a layer, chosen on rows that it was not solved with.

The batches of each task are dealt into two halves. For each candidate the layer is solved with the statistics of one
half, and its loss is taken on the other, both ways; the loss needs no rows, only that half's statistics:

    || W x̂ - W_i x ||²  =  tr (W - W_i) G_i (W - W_i)ᵀ  -  2 tr (W - W_i) D_iᵀ  +  what does not depend on W

with ``D_i`` the drift, multiplied by the expert's weight. The layer is then solved with both. Halves ask for a somewhat
larger ridge than all rows do. Two-fold cross-validation of a ridge is textbook; that it takes no second pass over the
data is what statistics that add up give.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.core.solve.ridge import factorize, solve
from com_lightning.core.solve.statistics import InputStatistics
from com_lightning.core.solve.task_biases import centred

CANDIDATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FALLBACK = 0.01
"""Where a task has no rows in one of the halves, or the layer makes up for its stream and all errors count alike."""

Half = tuple[list[Tensor], list[Tensor | None]]


def choose_ridge(
    even: Sequence[InputStatistics],
    odd: Sequence[InputStatistics],
    weights: Sequence[Tensor],
    importance: Sequence[float],
    own_biases: bool = False,
) -> float | None:
    """The candidate with the least loss on held-out rows; ``None`` if a task has none.

    Args:
        even, odd: statistics of the two halves, one per task; not changed.
        weights: the experts', ``(g, o, k)``.
        importance: one weight per task.
        own_biases: whether each task has a bias of its own.

    Complexity: that of 14 solves.
    """
    if any(entry.gram is None or not entry.rows for entry in (*even, *odd)):
        return None
    halves = [_half(statistics, weights) for statistics in (even, odd)]
    if own_biases:
        halves = [centred(*half, weights)[:2] for half in halves]
        weights = [weight[..., :-1] for weight in weights]
    losses = []
    for ridge in CANDIDATES:
        loss = 0.0
        for (grams, drifts), held_out in (halves, halves[::-1]):
            factor = factorize(grams, importance, ridge)
            solution = solve(factor, grams, drifts, weights, importance)
            loss += _loss(solution, held_out, weights, importance)
        losses.append(loss)
    return CANDIDATES[losses.index(min(losses))]


def _half(statistics: Sequence[InputStatistics], weights: Sequence[Tensor]) -> Half:
    """Means, as the solver takes them, in matrices of their own."""
    grams, drifts = [], list[Tensor | None]()
    for entry, weight in zip(statistics, weights):
        gram = entry.complete()
        assert gram is not None
        grams.append(gram / entry.rows)
        drift = entry.drift
        if drift is not None and not entry.multiply:
            drift = torch.matmul(weight[..., : drift.shape[1]].to(drift.dtype), drift)
        drifts.append(None if drift is None else drift / entry.rows)
    return grams, drifts


def _loss(solution: Tensor, half: Half, weights: Sequence[Tensor], importance: Sequence[float]) -> float:
    total = 0.0
    for gram, drift, weight, share in zip(*half, weights, importance):
        gap = solution - weight.double()
        loss = (torch.matmul(gap, gram.double()) * gap).sum()
        if drift is not None:
            loss = loss - 2 * (gap * drift.double()).sum()
        total += share * float(loss)
    return total
