"""Low-rank corrections of a layer for each task: one shared matrix, and a small adapter per task.

A merged model that knows the task of its input may add a correction of rank r to the shared weight. For a shared weight
``W``, the correction of full rank that is best for task i alone is the ridge regression

    B = [ (W_i - W) G_i + D_i ] (G_i + l_i I)⁻¹

and the best one of rank r keeps the r directions of the outputs in which ``B`` changes the layer's outputs most
(reduced-rank regression, Izenman 1975):

    D = P B,    P the projector on the r leading left singular vectors of B L,    L Lᵀ = G_i + l_i I

If errors in the outputs count by a matrix ``H = S Sᵀ`` (see :mod:`com_lightning.core.solve.weighted_ridge`), then
``D = S⁻ᵀ P Sᵀ B`` with the singular vectors of ``Sᵀ B L``. ``G_i``, ``D_i`` and all shapes are those of
:mod:`com_lightning.core.solve.ridge`. This goes beyond Chain of Merges. The equations are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.core.solve.ridge import factorize
from com_lightning.core.solve.weighted_ridge import DAMPING

RIDGE = 0.01
"""``l_i``, relative to the mean of the diagonal of ``G_i``."""


def low_rank_corrections(
    grams: Sequence[Tensor],
    drifts: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    shared: Tensor,
    rank: int,
    roots: Sequence[Tensor] = (),
    ridge: float = RIDGE,
) -> list[Tensor]:
    """Find the best correction of a shared weight for each task.

    Args:
        grams: ``(g, k, k)`` of each task.
        drifts: ``(g, o, k)`` of each task, or ``None``.
        weights: ``(g, o, k)`` of each expert.
        shared: the shared weight, ``(g, o, k)`` in float64.
        rank: of each correction. With ``min(o, k)`` or more it is the ridge regression of the task itself.
        roots: for each task, the root of the matrix by which errors count, ``(o, r)``, for a layer with one group.
            Without any, all errors count alike.
        ridge: see :data:`RIDGE`.

    Returns:
        The correction of each task, ``(g, o, k)`` in float64. It is zero for groups that no data reached.

    Complexity: for each task, ``g (k³ / 3 + 3 o k² + 9 min(o, k)³)`` multiply-adds.

    Example: with one direction, the larger of two differences is corrected.

        >>> weight = torch.diag(torch.tensor([3.0, 1.0]))[None]
        >>> zero = torch.zeros(1, 2, 2, dtype=torch.float64)
        >>> low_rank_corrections([torch.eye(2)[None]], [None], [weight], zero, 1, ridge=0.0)[0].round(decimals=6)
        tensor([[[3., 0.],
                 [0., 0.]]], dtype=torch.float64)
    """
    corrections = []
    for number, (gram, drift, weight) in enumerate(zip(grams, drifts, weights)):
        best, lower = _best(gram, drift, weight, shared, ridge)
        corrections.append(nearest_of_rank(best, rank, lower, _metric(roots[number]) if roots else None))
    return corrections


def rank_gains(
    grams: Sequence[Tensor],
    drifts: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    shared: Tensor,
    scales: Sequence[float],
    roots: Sequence[Tensor] = (),
    ridge: float = RIDGE,
) -> list[float]:
    """Return how much each further rank of the corrections lowers the loss, summed over tasks.

    These are the squared singular values of ``Sᵀ B L``, see the top of this module.

    Args:
        grams: as for :func:`low_rank_corrections`.
        drifts: as for :func:`low_rank_corrections`.
        weights: as for :func:`low_rank_corrections`.
        shared: as for :func:`low_rank_corrections`.
        scales: of each task, by which its loss counts.
        roots: as for :func:`low_rank_corrections`.
        ridge: as for :func:`low_rank_corrections`.

    Returns:
        The gains of ranks 1, 2, ... in falling order.
    """
    total = torch.zeros(min(shared.shape[1:]), dtype=torch.float64, device=shared.device)
    for number, (gram, drift, weight, scale) in enumerate(zip(grams, drifts, weights, scales)):
        best, lower = _best(gram, drift, weight, shared, ridge)
        image = (_metric(roots[number]).mT @ best if roots else best) @ lower
        product = image @ image.mT if image.shape[1] <= image.shape[2] else image.mT @ image
        total += scale * torch.linalg.eigvalsh(product).clamp(min=0.0).flip(-1).sum(0)
    gains: list[float] = total.tolist()
    return gains


def _best(gram: Tensor, drift: Tensor | None, weight: Tensor, shared: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The correction of full rank ``B``, and ``L``."""
    wide = gram.double()
    right = (weight.double() - shared) @ wide
    if drift is not None:
        right = right + drift.double()
    factor = factorize([gram], [1.0], ridge)
    best = torch.cholesky_solve(right.mT, factor.lower).mT
    reached = (wide.diagonal(dim1=-2, dim2=-1).sum(-1) > 0) & ~factor.failed
    return torch.where(reached[:, None, None], best, 0.0), factor.lower


def nearest_of_rank(matrix: Tensor, rank: int, lower: Tensor | None = None, metric: Tensor | None = None) -> Tensor:
    """Return the matrix of a rank that is nearest to a matrix, by default from its singular value decomposition.

    Args:
        matrix: ``(g, o, k)``.
        rank: of the result.
        lower: ``L``, ``(g, k, k)``, if distances are ``|| Sᵀ · L ||``.
        metric: ``S``, ``(o, o)`` and lower triangular, for a matrix with one group.

    Returns:
        The nearest matrix, ``(g, o, k)``.

    Example::

        >>> nearest_of_rank(torch.diag(torch.tensor([3.0, 1.0]))[None], 1).round(decimals=6)
        tensor([[[3., 0.],
                 [0., 0.]]])
    """
    if rank >= min(matrix.shape[1:]):
        return matrix
    weighed = matrix if metric is None else metric.mT @ matrix
    image = weighed if lower is None else weighed @ lower
    if image.shape[1] <= image.shape[2]:
        directions = torch.linalg.eigh(image @ image.mT).eigenvectors[..., -rank:]
    else:  # the same directions, from the smaller of the two products
        inner = torch.linalg.eigh(image.mT @ image).eigenvectors[..., -rank:]
        directions = torch.linalg.qr(image @ inner).Q
    projected = directions @ (directions.mT @ weighed)
    result: Tensor = projected if metric is None else torch.linalg.solve_triangular(metric.mT, projected, upper=True)
    return result


def _metric(root: Tensor) -> Tensor:
    """``S`` with ``S Sᵀ = U Uᵀ + 0.3 I``, ``(o, o)`` and lower triangular."""
    matrix = root.double() @ root.double().mT
    matrix.diagonal().add_(DAMPING)
    lower: Tensor = torch.linalg.cholesky(matrix)
    return lower
