"""LARV: a factor for each layer's task vectors, before any rule merges them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from com_lightning.methods.base import MergingMethod
from com_lightning.methods.on_top import OnTop
from com_lightning.methods.parameterwise import Combine, SharedParameter

_DEPTH = 0.5
"""Exponent of a layer's depth in its score."""
_STEEPNESS = 3.0
"""Slope of the continuous factor at a score of 1, relative to the strength."""


class LARV(OnTop):
    """LARV: task vectors are scaled down in layers where they interfere, and up in others, before they are merged.

    Wang et al., "LARV: Data-Free Layer-wise Adaptive Rescaling Veneer for Model Merging", arXiv 2602.09413, section 3.
    We had the abstract, public summaries and a third party's code of equation 8, but not the full text.

    A layer is a matrix; a convolution is a matrix of its flattened kernels. Layer ``ℓ`` of ``L``, in the order of the
    model's parameters, gets the score ``e d^½ / (1 + softplus(c))`` from three numbers:

    - ``e``, the contrast of effective ranks: that of the base's matrix over that of the task matrix. The effective rank
      is ``exp(−Σ_j p_j log p_j)``, with ``p_j`` the share of singular value ``j`` in the sum of all squares. So
      concentrated task matrices score high.
    - ``c``, the conflict between base ``A`` and task matrix ``B``: the mean of ``‖ABᵀ − BAᵀ‖`` and ``‖AᵀB − BᵀA‖`` over
      ``‖A‖ ‖B‖``, less its mean over layers, over its standard deviation.
    - ``d = ℓ / L``, the depth.

    With tiers, the third of the layers with the lowest scores gets the factor ``1 − strength``, the next one 1, and the
    last one ``1 + strength``. The continuous factor is ``1 + strength tanh(3 (score − 1))``; the paper has it as an
    ablation, with a strength of 0.5. Both ``e`` and ``c`` are means over tasks, so all tasks get the same factor. These
    means, the size of the tiers and their strength are ours; choose the strength on held-out data. Vectors, and
    matrices that no expert has changed, are left as they are.

    Args:
        method: the rule below, such as :class:`IsoC`. It must merge each parameter on its own, or be Average. Its
            importance counts, and weights the means.
        gate: how scores become factors.
        strength: the largest change of a factor, from 0, which changes nothing, to 1.

    Example::

        LARV(IsoC(), strength=0.1)
    """

    def __init__(
        self, method: MergingMethod, gate: Literal["tiers", "continuous"] = "tiers", strength: float = 0.2
    ) -> None:
        super().__init__(method)
        self.gate, self.strength = gate, strength

    def combiner(self, parameters: Sequence[SharedParameter]) -> Combine:
        factors = self.factors(parameters)
        scaled = {p.name: _scaled(p, factors[p.name]) if p.name in factors else p for p in parameters}
        below = self.below(list(scaled.values()))

        def combine(parameter: SharedParameter) -> Tensor | None:
            own = scaled[parameter.name]
            with own.held():
                return below(own)

        return combine

    def factors(self, parameters: Sequence[SharedParameter]) -> dict[str, float]:
        """Name of each layer's parameter -> factor of its task vectors."""
        measured = {p.name: numbers for p in parameters if (numbers := _contrast_and_conflict(p)) is not None}
        if not measured:
            return {}
        contrast, conflict = torch.tensor(list(measured.values()), dtype=torch.float64).T
        spread = conflict.std(correction=0)
        conflict = (conflict - conflict.mean()) / spread.where(spread > 1e-8, 1.0)
        depth = torch.arange(1, len(measured) + 1) / len(measured)
        scores = contrast * depth**_DEPTH / (1 + softplus(conflict))
        if self.gate == "continuous":
            changes = (_STEEPNESS * (scores - 1)).tanh()
        else:
            place = (scores.argsort(stable=True).argsort() + 0.5) / len(scores)
            changes = (place > 2 / 3).double() - (place < 1 / 3).double()
        return dict(zip(measured, (1 + self.strength * changes).tolist()))

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if not 0 <= self.strength <= 1:
            problems.append(f"strength: must be between 0 and 1, got {self.strength}")
        return problems


@dataclass
class _Scaled(SharedParameter):
    """A parameter of experts whose task vectors are ``factor`` times as long."""

    factor: float = 1.0

    def vector(self, task: str) -> Tensor:
        return super().expert(task).sub(self.base()).mul_(self.factor)

    def expert(self, task: str) -> Tensor:
        return self.vector(task).add_(self.base())

    def average(self) -> Tensor:
        return super().average().sub(self.base()).mul_(self.factor).add_(self.base())


def _scaled(parameter: SharedParameter, factor: float) -> _Scaled:
    return _Scaled(**{field.name: getattr(parameter, field.name) for field in fields(parameter)}, factor=factor)


def _contrast_and_conflict(parameter: SharedParameter) -> tuple[float, float] | None:
    """Means over tasks of the contrast of effective ranks and of the conflict; ``None`` for what is no layer."""
    if parameter.target.dim() < 2:
        return None
    matrix = parameter.as_matrix()
    with matrix.held():
        base = _upright(matrix.base())
        base_gram = base.T @ base
        base_size, base_rank = float(base_gram.trace()), effective_rank(base_gram)
        contrast = conflict = total = 0.0
        for task in matrix.tasks:
            vector = _upright(matrix.vector(task))
            gram, mixed = vector.T @ vector, base.T @ vector
            size = float(gram.trace())
            if not size or not base_size:
                continue
            # ‖ABᵀ − BAᵀ‖² from the smaller side: 2 ⟨AᵀA, BᵀB⟩ − 2 ⟨AᵀB, (AᵀB)ᵀ⟩
            crossed = float((mixed * mixed.T).sum())
            squares = (float((base_gram * gram).sum()) - crossed, float(mixed.square().sum()) - crossed)
            weight = matrix.weights[task]
            contrast += weight * base_rank / effective_rank(gram)
            conflict += weight * sum(math.sqrt(max(2 * s, 0.0)) for s in squares) / 2 / math.sqrt(base_size * size)
            total += weight
    return (contrast / total, conflict / total) if total else None


def _upright(matrix: Tensor) -> Tensor:
    """In float64, with no more columns than rows, so that its Gram matrix is small. Both measures are symmetric."""
    return matrix.double() if matrix.shape[0] >= matrix.shape[1] else matrix.double().T


def effective_rank(gram: Tensor) -> float:
    """The exponential of the entropy of a matrix's squared singular values, from its Gram matrix: its effective rank.

    Args:
        gram: ``(n, n)``, not zero.

    Returns:
        From 1 to ``n``.

    Example::

        >>> effective_rank(torch.diag(torch.tensor([2.0, 2.0, 0.0])))
        2.0
    """
    values = torch.linalg.eigvalsh(gram).clamp(min=0)
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())
