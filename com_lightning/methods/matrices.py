"""Rules on task matrices, that is, on task vectors that are matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from com_lightning.methods.parameterwise import ParameterRule, SharedParameter, scale_problems


class MatrixRule(ParameterRule):
    """``W_base + scale × merged_vector`` for matrices ``(m, n)``; all other parameters are averaged.

    Args:
        scale: factor of what is added to the base, also for the averaged parameters; 0 gives the base.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    needs = frozenset({"base"})
    flattens = False
    """Whether a convolution ``(m, ...)`` counts as a matrix of its flattened kernels. If not, it is averaged."""

    def __init__(self, scale: float, importance: dict[str, float] | None = None) -> None:
        super().__init__(importance)
        self.scale = scale

    @abstractmethod
    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        """The merged task matrix, as a new tensor; ``None`` if the rule does not apply."""

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        vector, dimensions = None, parameter.target.dim()
        if dimensions == 2:
            vector = self.merged_vector(parameter)
        elif dimensions > 2 and self.flattens:
            vector = self.merged_vector(parameter.as_matrix())
        if vector is None:
            if self.scale == 1:
                return None
            vector = parameter.sum() / len(parameter.tasks)
        return vector.view(parameter.target.shape).mul_(self.scale).add_(parameter.base())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + scale_problems(self.scale)
