"""Rules on the singular vectors of task matrices, that is, of task vectors that are matrices.

All other task vectors (biases, normalisations, convolutions) are averaged, as in the papers. Matrices are ``(m, n)``;
``r = min(m, n)``, and ``T`` is the number of tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.methods.matrices import MatrixRule
from com_lightning.methods.parameterwise import SharedParameter


class TSVM(MatrixRule):
    """TSV-M: the leading singular vectors of each task matrix, made orthogonal to those of the other tasks, summed.

    Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv 2412.00081,
    algorithm 1. Each task matrix keeps its ``r / T`` largest singular values. Let ``U`` and ``V`` hold all left and all
    right singular vectors side by side. The merged task matrix is ``U' S V'ᵀ``, where ``U'`` and ``V'`` are the nearest
    matrices with orthonormal columns (the solution of the orthogonal Procrustes problem). A single expert comes back
    unchanged; identical experts come back with ``r / T`` of their singular values. With more tasks than ``r`` no
    singular value would be kept, so the matrix is averaged. We leave out directions that a task matrix does not have
    (LoRA). The authors' code fills them in arbitrarily, and makes the others orthogonal to them.

    Args:
        scale: ``α``, also for the averaged parameters; 1 in the paper.
        importance: task -> its weight, relative to the others. The default is uniform. It multiplies singular values.
    """

    def __init__(self, scale: float = 1.0, importance: dict[str, float] | None = None) -> None:
        super().__init__(scale, importance)

    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        tasks = parameter.tasks
        rank = min(parameter.target.shape) // len(tasks)
        if not rank:
            return None
        lefts, values, rights = [], [], []
        for task in tasks:
            left, value, right = torch.linalg.svd(parameter.vector(task), full_matrices=False)
            count = min(rank, _rank(value, parameter.target))
            lefts.append(left[:, :count].clone())  # a view would keep the whole matrix in memory
            values.append(value[:count] * parameter.share(task))
            rights.append(right[:count].clone())
        left, right = orthogonal(torch.cat(lefts, 1)), orthogonal(torch.cat(rights))
        merged: Tensor = (left * torch.cat(values)) @ right
        return merged


class IsoC(MatrixRule):
    """Iso-C: the sum of the task matrices, with all its singular values replaced by their mean.

    Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    arXiv 2502.04959, section 4. A single expert does not come back unchanged, because it is made isotropic too. The
    result is arbitrary in directions that no task matrix has (LoRA), as in the authors' code. The paper chooses the
    scale on held-out data.

    Args:
        scale: ``α``, also for the averaged parameters.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(self, scale: float = 1.0, importance: dict[str, float] | None = None) -> None:
        super().__init__(scale, importance)

    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        left, values, right = torch.linalg.svd(parameter.sum(), full_matrices=False)
        merged: Tensor = left @ right
        return merged.mul_(values.mean())


class IsoCTS(MatrixRule):
    """Iso-CTS: like Iso-C, but directions of each task replace the smallest singular directions of the sum.

    Marczak et al., arXiv 2502.04959, section 4. The leading ``k`` singular vectors of the sum span the common subspace.
    The other ``r − k`` directions are shared equally among the tasks. Each task matrix is projected out of the common
    left subspace, and its leading singular vectors are taken. All left and all right vectors are made orthogonal as in
    TSV-M, and all singular values are replaced by their mean.

    Args:
        scale: ``α``, also for the averaged parameters. The paper chooses it on held-out data.
        common: ``k / r``. ``k`` is rounded so that the tasks get equal numbers of directions.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(self, scale: float = 1.0, common: float = 0.8, importance: dict[str, float] | None = None) -> None:
        super().__init__(scale, importance)
        self.common = common

    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        tasks, rank = parameter.tasks, min(parameter.target.shape)
        per_task = min(round((rank - int(rank * self.common)) / len(tasks)), rank // len(tasks))
        left, value, right = torch.linalg.svd(parameter.sum(), full_matrices=False)
        count = rank - per_task * len(tasks)
        left, value, right = left[:, :count], value[:count], right[:count]
        lefts, values, rights = [left], [value], [right]
        for task in tasks if per_task else ():
            vector = parameter.vector(task).mul_(parameter.share(task))
            task_left, task_value, task_right = torch.linalg.svd(vector - left @ (left.T @ vector), full_matrices=False)
            lefts.append(task_left[:, :per_task].clone())
            values.append(task_value[:per_task])
            rights.append(task_right[:per_task].clone())
        merged = orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights))
        return merged.mul_(torch.cat(values).mean())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if not 0 <= self.common <= 1:
            problems.append(f"common: must be between 0 and 1, got {self.common}")
        return problems


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns, or rows if there are fewer of these: the polar factor.

    In directions that ``matrix`` does not have, it is not unique, and is taken to be 0.

    Example::

        >>> orthogonal(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = _rank(values, matrix)
    nearest: Tensor = left[:, :rank] @ right[:rank]
    return nearest


def _rank(values: Tensor, matrix: Tensor) -> int:
    """How many of the singular values, largest first, exceed rounding errors."""
    bound = torch.finfo(values.dtype).eps * max(matrix.shape) * values[:1]
    return int((values > bound).sum())
