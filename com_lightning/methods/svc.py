"""SVC: singular values that several tasks add up to are scaled down."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.methods.base import MergingMethod
from com_lightning.methods.on_top import OnTop
from com_lightning.methods.parameterwise import Combine, SharedParameter

_ROUNDING = 1e3
"""Answers below this many units of rounding of a task's matrix are taken for zero."""


class SVC(OnTop):
    """SVC, singular value calibration: what tasks share counts once in the merged matrix, not once for each task.

    Li et al., "When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging", arXiv 2602.05536, algorithm
    1, equations 4, 8 and 17 to 23. Any rule merges the task matrices ``τ_i`` into ``Δ = Σ_r σ_r u_r v_rᵀ``. In output
    direction ``u_r``, the merged matrix answers with ``a_r = u_rᵀΔ``, and task ``i`` with ``a_ri = u_rᵀτ_i``. The
    coefficient ``s_ri = ⟨a_r, a_ri⟩ / ‖a_ri‖²`` is above 1 where other tasks add to this task's own answer. Each
    singular value is divided by the mean over tasks of ``max(α, s_ri)``; singular vectors stay.

    With ``α`` of 1, singular values can only shrink. Below 1, those that the merge has weakened grow, by up to ``1/α``,
    and so the scale of the rule below matters less. Identical experts come back if the rule below keeps their
    direction. Vectors and embedding tables stay as the rule below merges them, as in the authors' code. A convolution
    is a matrix of its flattened kernels; the authors' code leaves these out, too. Where a rule makes all singular
    values equal (:class:`IsoC`, :class:`IsoCTS`), the directions ``u_r`` are arbitrary, and so is the result.

    Args:
        method: the rule below, such as :class:`TaskArithmetic`. It must merge each parameter on its own, or be Average.
            Its importance counts, and weights the mean.
        floor: ``α``, above 0 and at most 1. The default is one over the number of tasks, as in the paper. It takes 1
            for :class:`TSVM`.

    Example::

        SVC(TSVM(), floor=1.0)
    """

    def __init__(self, method: MergingMethod, floor: float | None = None) -> None:
        super().__init__(method)
        self.floor = floor

    def combiner(self, parameters: Sequence[SharedParameter]) -> Combine:
        below = self.below(parameters)

        def combine(parameter: SharedParameter) -> Tensor:
            merged, base = below(parameter), parameter.base()
            if merged.dim() < 2 or parameter.rows == "entries":
                return merged
            change = self._calibrated(parameter.to_matrix(merged - base), parameter.as_matrix())
            return parameter.from_matrix(change).add_(base)

        return combine

    def _calibrated(self, change: Tensor, parameter: SharedParameter) -> Tensor:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        floor = 1 / len(parameter.tasks) if self.floor is None else self.floor
        answers = values[:, None] * right
        divisor = torch.zeros_like(values)
        for task in parameter.tasks:
            vector = parameter.vector(task)
            own = left.T @ vector
            size = own.square().sum(1)
            # What is rounding alone is no answer, and to divide by its square would leave nothing of the direction.
            smallest = _ROUNDING * torch.finfo(own.dtype).eps * torch.linalg.vector_norm(vector)
            coefficient = ((answers * own).sum(1) / size).where(size > smallest.square(), 0.0)
            divisor.add_(coefficient.clamp_(min=floor), alpha=parameter.weights[task])
        result: Tensor = (left * (values / divisor)) @ right
        return result

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + ([] if self.floor is None else self._out_of(0, 1, floor=self.floor))
