"""ACTMat and TACT: RegMean without data, with task matrices in place of the inputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.methods.matrices import MatrixRule
from com_lightning.methods.parameterwise import SharedParameter
from com_lightning.methods.task_vectors import trimmed
from com_lightning.methods.trimming import kth_largest


class ACTMat(MatrixRule):
    """ACTMat: each task matrix is also the estimate of its own task's inputs, and layers are merged by regression.

    Hameed et al., "Model Merging via Data-Free Covariance Estimation", arXiv 2604.01329, section 3. The merge that
    interferes least with each task's outputs is a regression on the covariances ``C_i`` of the layer's inputs, as in
    :class:`RegMean`. The rows of a task matrix ``τ_i`` of shape ``(m, n)`` are sums of inputs, so the paper estimates
    ``C_i = τ_iᵀτ_i``, up to a factor, and ``W = W_base + (Σ_i τ_i C_i) (Σ_i C_i)⁺``, with the pseudo-inverse ``⁺``.
    Input directions that no task matrix has stay as in the base. A single expert and identical experts come back
    unchanged, but for the directions below ``rtol``. We had the abstract and the authors' code, not the full text.

    A convolution is a matrix of its flattened kernels, which act on patches. Other parameters that are no matrices are
    averaged, and so are embedding tables, whose inputs are tokens. The authors' code averages convolutions, and
    matrices with a side of 20,000 or more. We compute in float64: the covariances square the task matrices' condition.

    Args:
        scale: factor of what is added to the base, also for the averaged parameters; 1 in the paper.
        rtol: directions are dropped if their eigenvalue in ``Σ_i C_i`` is at most this share of the largest one. The
            default is ``n`` times the precision of float32 (1.2e-7), which is what the authors' code drops.
        importance: task -> its weight, relative to the others. The default is uniform. It multiplies ``C_i``.
    """

    flattens, merges_tables = True, False

    def __init__(
        self, scale: float = 1.0, rtol: float | None = None, importance: dict[str, float] | None = None
    ) -> None:
        super().__init__(scale, importance)
        self.rtol = rtol

    def inputs(self, vector: Tensor) -> Tensor:
        """The rows in place of a task's inputs, from its task matrix; both ``(m, n)``."""
        return vector

    def merged_vector(self, parameter: SharedParameter) -> Tensor:
        size = parameter.target.shape[1]
        total, target = (
            torch.zeros(rows, size, dtype=torch.float64, device=parameter.device)
            for rows in (size, len(parameter.target))
        )
        for task in parameter.tasks:
            vector = parameter.vector(task).double()
            inputs = self.inputs(vector)
            covariance = (inputs.T @ inputs).mul_(parameter.share(task))
            total += covariance
            target += vector @ covariance
        rtol = size * torch.finfo(torch.float32).eps if self.rtol is None else self.rtol
        merged: Tensor = target @ torch.linalg.pinv(total, rtol=rtol, hermitian=True)
        return merged.to(parameter.dtype)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if self.rtol is not None and not 0 <= self.rtol < 1:
            problems.append(f"rtol: must be 0 or more and below 1, got {self.rtol}")
        return problems


class TACT(ACTMat):
    """TACT: ACTMat with covariances of trimmed task matrices, without their many small and noisy values.

    ``C_i = trim(τ_i)ᵀ trim(τ_i)``; the ``τ_i`` that are merged stay whole. See :class:`ACTMat` for the rest. TACT is
    later than arXiv 2604.01329; we had the authors' code (algorithm 1 with the variant of appendix C, as it says), not
    the text. Values equal to the smallest kept value are kept, too.

    Args:
        density: share of each task matrix that counts, the largest values; above 0. The authors choose it on held-out
            data between 0.1 and 0.7.
        scale: factor of what is added to the base, also for the averaged parameters; 1 in the authors' code.
        rtol: as in :class:`ACTMat`.
        importance: task -> its weight, relative to the others. The default is uniform. It multiplies ``C_i``.
    """

    def __init__(
        self,
        density: float = 0.5,
        scale: float = 1.0,
        rtol: float | None = None,
        importance: dict[str, float] | None = None,
    ) -> None:
        super().__init__(scale, rtol, importance)
        self.density = density

    def inputs(self, vector: Tensor) -> Tensor:
        count = max(round(self.density * vector.numel()), 1)
        return trimmed(vector.clone(), kth_largest(lambda: [vector], count))

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + self._out_of(0, 1, density=self.density)
