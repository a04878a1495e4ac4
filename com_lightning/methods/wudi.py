"""WUDI-Merging: task matrices in place of the inputs that the tasks were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.methods.parameterwise import ParameterRule, SharedParameter


class WUDI(ParameterRule):
    """WUDI-Merging: the sum of the task matrices, moved so that it disturbs no task's inputs.

    Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
    arXiv 2503.08099, algorithm 1. The rows of a task matrix ``τ_i`` are sums of that task's inputs, so they are used in
    place of these inputs. ``τ`` starts at ``Σ_i τ_i``, and some steps of Adam lower
    ``Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖²``. Parameters that are not matrices are averaged. We compute the gradient from
    ``Σ_i τ_iᵀτ_i / ‖τ_i‖²``. This matrix is summed once, so a step costs the same for any number of tasks.

    The size of Adam's steps is the learning rate, and does not depend on the size of the weights. A value moves by at
    most about ``steps × learning_rate``. ``T`` identical experts start at ``T`` times their task vector, and stay near
    it with few steps.

    Args:
        steps: number of Adam's steps.
        learning_rate: Adam's learning rate. The default suits CLIP's weights. Task vectors of small models are mostly
            larger; raise it for these.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    needs = frozenset({"base"})

    def __init__(
        self, steps: int = 300, learning_rate: float = 1e-5, importance: dict[str, float] | None = None
    ) -> None:
        super().__init__(importance)
        self.steps, self.learning_rate = steps, learning_rate

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        if parameter.target.dim() != 2:
            return None
        return parameter.from_matrix(self._merged_vector(parameter.as_matrix())).add_(parameter.base())

    def _merged_vector(self, parameter: SharedParameter) -> Tensor:
        merged = parameter.sum()
        gram, target = merged.new_zeros(merged.shape[1], merged.shape[1]), torch.zeros_like(merged)
        for task in parameter.tasks:
            vector = parameter.vector(task)
            size = vector.square().sum()
            if size > 0:
                task_gram = vector.T @ vector * (parameter.share(task) / size)
                gram += task_gram
                target += vector @ task_gram
        merged.requires_grad_(True)
        adam = torch.optim.Adam([merged], lr=self.learning_rate)
        for _ in range(self.steps):
            merged.grad = (merged.detach() @ gram).sub_(target).mul_(2)
            adam.step()
        return merged.detach()

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks) + self._out_of(0, 1, learning_rate=self.learning_rate)
        if self.steps < 1:
            problems.append(f"steps: must be 1 or more, got {self.steps}")
        return problems
