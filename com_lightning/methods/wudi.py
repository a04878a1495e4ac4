"""WUDI-Merging: task matrices stand in for the inputs that the tasks were trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.methods.parameterwise import ParameterRule, SharedParameter


class WUDI(ParameterRule):
    """WUDI-Merging: the sum of the task matrices, moved so as to disturb no task's inputs.

    Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task Vectors",
    arXiv 2503.08099, algorithm 1. The rows of a task matrix ``τ_i`` are sums of that task's inputs, and stand in for
    them: ``τ`` starts at ``Σ_i τ_i``, and some steps of Adam lower ``Σ_i ‖(τ − τ_i) τ_iᵀ‖² / ‖τ_i‖²``. Parameters that
    are no matrices are averaged. We take the gradient from ``Σ_i τ_iᵀτ_i / ‖τ_i‖²``, which is summed once, so that a
    step costs the same whatever the number of tasks.

    Adam's steps have the size of the learning rate whatever the size of the weights: a value moves by at most
    ``steps × learning_rate`` or so. Identical experts start at ``T`` times their task vector, so few steps leave them
    there.

    Args:
        steps: of Adam.
        learning_rate: of Adam. The default suits CLIP's weights; raise it where task vectors are larger, as those of
            small models mostly are.
        importance: task -> its weight, relative to the others; uniform by default.
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
        merged = parameter.sum()
        gram, target = merged.new_zeros(merged.shape[1], merged.shape[1]), torch.zeros_like(merged)
        for task in parameter.tasks:
            vector = parameter.vector(task)
            size = vector.square().sum()
            if size > 0:
                own = vector.T @ vector * (parameter.share(task) / size)
                gram += own
                target += vector @ own
        merged.requires_grad_(True)
        adam = torch.optim.Adam([merged], lr=self.learning_rate)
        for _ in range(self.steps):
            merged.grad = (merged.detach() @ gram).sub_(target).mul_(2)
            adam.step()
        return merged.detach().add_(parameter.base())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        found = super().problems(tasks) + self._out_of(0, 1, learning_rate=self.learning_rate)
        if self.steps < 1:
            found.append(f"steps: must be 1 or more, got {self.steps}")
        return found
