"""Rules on the singular vectors of task matrices.

A task vector that is a matrix is merged as one. All others (biases, normalisations, convolutions) are averaged, as in
the papers. Matrices are ``(m, n)``; ``r = min(m, n)``, and ``T`` is the number of tasks.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.methods.parameterwise import ParameterRule, SharedParameter, scale_problems


class _Spectral(ParameterRule):
    needs = frozenset({"base"})

    def __init__(self, scale: float, importance: dict[str, float] | None = None) -> None:
        super().__init__(importance)
        self.scale = scale

    @abstractmethod
    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        """The merged task matrix; ``None`` where the rule has no say."""

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        vector = self.merged_vector(parameter) if len(parameter.target.shape) == 2 else None
        if vector is None:
            if self.scale == 1:
                return None
            vector = parameter.sum() / len(parameter.tasks)
        return vector.mul_(self.scale).add_(parameter.base())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + scale_problems(self.scale)


class TSVM(_Spectral):
    """TSV-M: the leading singular vectors of each task matrix, made orthogonal to those of the other tasks, summed.

    Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model Merging", arXiv 2412.00081,
    algorithm 1. Of each task matrix the ``r / T`` largest singular values stay. With all left and all right singular
    vectors side by side in ``U`` and ``V``, the merged task matrix is ``U' S V'ᵀ``, where ``U'`` is the matrix with
    orthonormal columns nearest to ``U`` (the solution of the orthogonal Procrustes problem), and ``V'`` that to ``V``.
    One expert is given back; identical ones are, with ``r / T`` of their singular values. Where there are more tasks
    than ``r``, no singular value would stay, and the average does. Directions that a task matrix does not have (LoRA)
    are left out, where the authors' code fills in arbitrary ones, to which the others are made orthogonal.

    Args:
        scale: ``α``, of the averaged parameters too; 1 in the paper.
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
            own = min(rank, _rank(value, parameter.target))
            lefts.append(left[:, :own].clone())  # not a view of all of it
            values.append(value[:own] * parameter.share(task))
            rights.append(right[:own].clone())
        left, right = orthogonal(torch.cat(lefts, 1)), orthogonal(torch.cat(rights))
        merged: Tensor = (left * torch.cat(values)) @ right
        return merged


class IsoC(_Spectral):
    """Iso-C: the sum of the task matrices, with all its singular values replaced by their mean.

    Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces",
    arXiv 2502.04959, section 4. One expert is not given back, but made isotropic too; in directions that no task matrix
    has (LoRA), what this adds is arbitrary, as in the authors' code. The paper chooses the scale on held-out data.

    Args:
        scale: ``α``, of the averaged parameters too.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(self, scale: float = 1.0, importance: dict[str, float] | None = None) -> None:
        super().__init__(scale, importance)

    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        left, values, right = torch.linalg.svd(parameter.sum(), full_matrices=False)
        merged: Tensor = left @ right
        return merged.mul_(values.mean())


class IsoCTS(_Spectral):
    """Iso-CTS: as Iso-C, with the least singular directions of the sum replaced by those of each task alone.

    Marczak et al., arXiv 2502.04959, section 4. The leading ``k`` singular vectors of the sum are the common subspace.
    The other ``r − k`` places go to the tasks in equal parts, each to the leading singular vectors of its task matrix
    less that matrix's part in the common left subspace. All left and all right vectors are made orthogonal as in TSV-M,
    and all singular values replaced by their mean.

    Args:
        scale: ``α``, of the averaged parameters too. The paper chooses it on held-out data.
        common: ``k / r``, of which ``k`` is as near as the equal parts let it be.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(self, scale: float = 1.0, common: float = 0.8, importance: dict[str, float] | None = None) -> None:
        super().__init__(scale, importance)
        self.common = common

    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        tasks, rank = parameter.tasks, min(parameter.target.shape)
        each = min(round((rank - int(rank * self.common)) / len(tasks)), rank // len(tasks))
        left, value, right = torch.linalg.svd(parameter.sum(), full_matrices=False)
        count = rank - each * len(tasks)
        left, value, right = left[:, :count], value[:count], right[:count]
        lefts, values, rights = [left], [value], [right]
        for task in tasks if each else ():
            vector = parameter.vector(task).mul_(parameter.share(task))
            own, own_value, own_right = torch.linalg.svd(vector - left @ (left.T @ vector), full_matrices=False)
            lefts.append(own[:, :each].clone())
            values.append(own_value[:each])
            rights.append(own_right[:each].clone())
        merged = orthogonal(torch.cat(lefts, 1)) @ orthogonal(torch.cat(rights))
        return merged.mul_(torch.cat(values).mean())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        found = super().problems(tasks)
        if not 0 <= self.common <= 1:
            found.append(f"common: must be between 0 and 1, got {self.common}")
        return found


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
    """How many singular values, largest first, are more than rounding."""
    bound = torch.finfo(values.dtype).eps * max(matrix.shape) * values[:1]
    return int((values > bound).sum())
