"""Biases and normalisation parameters that are solved for each task.

A merged model with a head for each task knows the task of its input. So a layer may share its matrix between tasks and
have one bias for each task. The matrix is solved on inputs and outputs that are centred for each task,

    W = argmin sum_i a_i / N_i  sum_n s_n || W (x̂_n - m_i) - (W_i x_n - t_i) ||²,    b_i = t_i - W m_i

with ``m_i`` and ``t_i`` the weighted means of task i's inputs and targets. Scale and offset per channel, with their
running statistics, are solved for each task alone. This goes beyond Chain of Merges.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.core.solve.ridge import factorize, solve_or_average


def centred(
    grams: Sequence[Tensor], drifts: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
    """Centre the statistics of a layer with a bias at the means of each task, and remove the bias from its weights.

    Args:
        grams: ``(g, k, k)`` of each task.
        drifts: ``(g, o, k)`` of each task, or ``None``.
        weights: ``(g, o, k)`` of each expert.

    Returns:
        The same three for the regression without the bias, in float64.

    Example: the inputs 1 and 3 have a variance of one.

        >>> centred([torch.tensor([[[5.0, 2.0], [2.0, 1.0]]])], [None], [torch.ones(1, 1, 2)])[0][0].item()
        1.0
    """
    means = [_mean(gram) for gram in grams]
    centred_grams = [
        gram.double()[..., :-1, :-1] - gram.double()[..., :-1, -1:] * mean.mT for gram, mean in zip(grams, means)
    ]
    centred_drifts: list[Tensor | None] = [
        None if drift is None else drift.double()[..., :-1] - drift.double()[..., -1:] * mean.mT
        for drift, mean in zip(drifts, means)
    ]
    return centred_grams, centred_drifts, [weight[..., :-1] for weight in weights]


def with_task_biases(
    matrices: Sequence[Tensor], grams: Sequence[Tensor], drifts: Sequence[Tensor | None], weights: Sequence[Tensor]
) -> list[Tensor]:
    """Compute the bias of each task from its matrix.

    Args:
        matrices: of each task, the solution ``W``, ``(g, o, k - 1)``, of the regression that :func:`centred` makes of
            the other arguments.
        grams: as for :func:`centred`.
        drifts: as for :func:`centred`.
        weights: as for :func:`centred`.

    Returns:
        ``[W, b_i]`` for each task, ``(g, o, k)``.
    """
    result = []
    for matrix, gram, drift, weight in zip(matrices, grams, drifts, weights):
        weight = weight.double()
        bias = weight[..., -1:] + (weight[..., :-1] - matrix) @ _mean(gram)
        if drift is not None:
            total = gram[..., -1:, -1:].double()
            bias = bias + torch.where(total > 0, drift[..., -1:].double() / total, 0.0)
        result.append(torch.cat([matrix, bias], -1))
    return result


def solve_each(
    grams: Sequence[Tensor], drifts: Sequence[Tensor | None], weights: Sequence[Tensor], anchor: Tensor, ridge: float
) -> list[Tensor]:
    """Solve a layer for each task alone.

    Args:
        grams: ``(g, k, k)`` of each task.
        drifts: ``(g, o, k)`` of each task, or ``None``.
        weights: ``(g, o, k)`` of each expert.
        anchor: ``(g, o, k)``. The ridge pulls towards it, and groups without data keep it.
        ridge: relative to the mean of the diagonal of the Gram matrix.

    Returns:
        The weight of each task, ``(g, o, k)``.
    """
    result = []
    for gram, drift, weight in zip(grams, drifts, weights):
        factor = factorize([gram], [1.0], ridge)
        solution = solve_or_average(factor, [gram], [drift], [weight], [1.0], anchor).weight
        reached = gram.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        result.append(torch.where(reached[:, None, None], solution, anchor.double()))
    return result


def _mean(gram: Tensor) -> Tensor:
    """Weighted mean of the inputs, ``(g, k - 1, 1)``."""
    gram = gram.double()
    total = gram[..., -1:, -1:]
    return torch.where(total > 0, gram[..., :-1, -1:] / total, 0.0)
