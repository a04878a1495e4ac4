"""Rules on task matrices, that is, on task vectors that are matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor

from com_lightning.methods.parameterwise import ParameterRule, SharedParameter, scale_problems


class MatrixRule(ParameterRule):
    """``W_base + scale × merged_vector`` for matrices of ``m`` outputs and ``n`` inputs; the rest is averaged.

    Args:
        scale: factor of what is added to the base, also for the averaged parameters; 0 gives the base.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    needs = frozenset({"base"})
    flattens = False
    """Whether a convolution counts as a matrix ``(m, ...)`` of its flattened kernels. If not, it is averaged."""
    merges_tables = True
    """Whether an embedding's table counts as a matrix ``(entries, n)``. If not, it is averaged."""

    def __init__(self, scale: float, importance: dict[str, float] | None = None) -> None:
        super().__init__(importance)
        self.scale = scale

    @abstractmethod
    def merged_vector(self, parameter: SharedParameter) -> Tensor | None:
        """The merged task matrix, as a new tensor; ``None`` if the rule does not apply."""

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        dimensions = parameter.target.dim()
        counts = dimensions == 2 or (dimensions > 2 and self.flattens)
        if counts and (self.merges_tables or parameter.rows != "entries"):
            merged = self.merged_vector(parameter.as_matrix())
        else:
            merged = None
        if merged is None and self.scale == 1:
            return None
        vector = parameter.sum() / len(parameter.tasks) if merged is None else parameter.from_matrix(merged)
        return vector.mul_(self.scale).add_(parameter.base())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + scale_problems(self.scale)
