"""The solution of one layer if errors count by direction, differently for each task.

``H_i`` says how much errors in the layer's outputs matter for task i, see :mod:`com_lightning.core.chain.sensitivity`.
The merged weight minimises

    sum_i a_i / N_i  sum_n s_n || H_i^½ (W x̂_n - W_i x_n) ||²  +  l sum_i a_i || H_i^½ (W - W̄) ||²

which for the difference ``D = W - W̄`` to the average is the linear system

    sum_i a_i H_i D (G_i + l I)  =  sum_i a_i H_i [ (W_i - W̄) G_i + D_i ]

with everything else as in :mod:`com_lightning.core.solve.ridge`. If all ``H_i`` are equal, the solution is the one of
that module. If they differ, the system has as many unknowns as the weight has numbers. It is solved by conjugate
gradients, which start at that solution and are preconditioned by ``(sum a_i H_i) ⊗ (sum a_i G_i + l I)``. The equations
are ours. Tam et al., arXiv 2312.04339, solve systems of this form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from com_lightning.core.solve.ridge import Factor

DAMPING = 0.3
"""Multiple of the identity in each ``H_i``, so that errors count in every direction. The diagonal of ``U_i U_iᵀ`` has a
mean of one."""
STEPS, TOLERANCE = 100, 1e-2


def solve_weighted(
    factor: Factor,
    grams: Sequence[Tensor],
    drifts: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    importance: Sequence[float],
    ridge: float,
    roots: Sequence[Tensor],
    start: Tensor,
    anchor: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Solve a layer by conjugate gradients.

    Args:
        factor: as for :func:`~com_lightning.core.solve.ridge.solve`, with one group.
        grams: as for ``solve``.
        drifts: as for ``solve``.
        weights: as for ``solve``.
        importance: as for ``solve``.
        ridge: relative to the mean of the diagonal of the summed Gram matrix, as in
            :func:`~com_lightning.core.solve.ridge.factorize`.
        roots: ``U_i`` of each task, ``(o, r)`` in float64, with ``H_i = U_i U_iᵀ + 0.3 I``.
        start: the solution if all errors count alike, ``(1, o, k)`` in float64.
        anchor: ``(1, o, k)``, takes the place of the average ``W̄``.

    Returns:
        The merged weight, ``(1, o, k)`` in float64, and the number of steps.

    Complexity: for each step, with ``r`` columns in each of ``T`` roots, ``o k² + T r k (2 o + k)`` multiply-adds.
    """
    mean = torch.zeros_like(start[0])
    for weight, share in zip(weights, importance):
        mean.add_(weight[0].double(), alpha=share)
    if anchor is not None:
        mean = anchor[0].double()
    scale = sum(share * float(gram[0].diagonal().double().mean()) for gram, share in zip(grams, importance))
    total, regularised, right = torch.zeros_like(grams[0][0], dtype=torch.float64), [], torch.zeros_like(mean)
    for gram, drift, weight, share, root in zip(grams, drifts, weights, importance, roots):
        matrix = gram[0].double()
        rows = (weight[0].double() - mean) @ matrix
        if drift is not None:
            rows += drift[0].double()
        right.add_(rows, alpha=share * DAMPING).addmm_(root, root.T @ rows, alpha=share)
        matrix = matrix.clone()
        matrix.diagonal().add_(ridge * scale)
        regularised.append(matrix)
        total.add_(matrix, alpha=share)

    def apply(difference: Tensor) -> Tensor:
        result = DAMPING * (difference @ total)
        for matrix, share, root in zip(regularised, importance, roots):
            result.addmm_(root, (root.T @ difference) @ matrix, alpha=share)
        return result

    divide = _divider([share**0.5 * root for root, share in zip(roots, importance)])

    def precondition(residual: Tensor) -> Tensor:
        return divide(torch.cholesky_solve(residual.T, factor.lower[0]).T)

    difference, steps = _conjugate_gradients(apply, precondition, right, start[0] - mean)
    return (mean + difference)[None], steps


def _divider(roots: Sequence[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies by the inverse of ``sum_i U_i U_iᵀ + 0.3 I`` from the left."""
    root = torch.cat(list(roots), dim=1)
    if root.shape[1] >= len(root):
        matrix = root @ root.T
        matrix.diagonal().add_(DAMPING)
        lower = torch.linalg.cholesky(matrix)
        return lambda right: torch.cholesky_solve(right, lower)
    matrix = root.T @ root  # Woodbury's identity
    matrix.diagonal().add_(DAMPING)
    lower = torch.linalg.cholesky(matrix)
    return lambda right: (right - root @ torch.cholesky_solve(root.T @ right, lower)) / DAMPING


def _conjugate_gradients(
    apply: Callable[[Tensor], Tensor], precondition: Callable[[Tensor], Tensor], right: Tensor, start: Tensor
) -> tuple[Tensor, int]:
    """Solve ``apply(x) = right``, to a relative error of :data:`TOLERANCE` in the preconditioner's norm."""
    solution, residual = start.clone(), right - apply(start)
    step = preconditioned = precondition(residual)
    energy = float((residual * preconditioned).sum())
    small = TOLERANCE**2 * float((right * precondition(right)).sum())
    for number in range(STEPS):
        if not energy > small:  # converged, or NaN
            return solution, number
        image = apply(step)
        length = energy / float((step * image).sum())
        solution.add_(step, alpha=length)
        residual.sub_(image, alpha=length)
        preconditioned = precondition(residual)
        before, energy = energy, float((residual * preconditioned).sum())
        step = preconditioned + (energy / before) * step
    return solution, STEPS
