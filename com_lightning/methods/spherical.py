"""Rules on the sphere: directions are interpolated along great circles, and lengths separately.

The result is a weighted sum of the experts. Its coefficients depend only on lengths and angles. So one pass computes
the inner products, and another one the sum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from com_lightning.methods.parameterwise import ParameterRule, SharedParameter

_TINY = 1e-7
"""Two directions count as equal or opposite if their sine is below this."""


class SLERP(ParameterRule):
    """Spherical linear interpolation of two experts: ``(sin((1−t)φ) θ_1 + sin(tφ) θ_2) / sin φ``.

    Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, section 3.3. Each parameter is one vector, and
    ``φ`` is the angle between the two experts'. If it is 0 or 180°, or one expert is 0, the result is
    ``(1−t) θ_1 + t θ_2``. mergekit uses this formula from a cosine of 0.9995 on, where the two hardly differ.

    Args:
        t: 0 gives the first task's expert, 1 the second one's.
    """

    def __init__(self, t: float = 0.5) -> None:
        super().__init__()
        self.t = t

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        one, two = parameter.tasks
        products = inner_products(parameter)
        lengths = products.diagonal().sqrt()
        cosine = (products[0, 1] / (lengths[0] * lengths[1]).clamp_min(1e-300)).clamp(-1, 1)
        angle = float(cosine.arccos())
        if not bool((lengths > 0).all()) or math.sin(angle) < _TINY:
            return weighted(parameter, {one: 1 - self.t, two: self.t})
        first, second = (math.sin(part * angle) / math.sin(angle) for part in (1 - self.t, self.t))
        return weighted(parameter, {one: first, two: second})

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if len(tasks) != 2:
            problems.append(f"method: SLERP is between two experts, got {len(tasks)}; KarcherMean takes any number")
        if not 0 <= self.t <= 1:
            problems.append(f"t: must be between 0 and 1, got {self.t}")
        return problems


class KarcherMean(ParameterRule):
    """The Karcher mean of the experts' directions, times the mean of their lengths: SLERP for any number of experts.

    At the direction ``u``, the tangent vectors towards the experts' directions ``u_i`` cancel out:
    ``Σ_i a_i log_u(u_i) = 0``, with ``log_u(v) = φ/sin φ (v − cos φ u)`` for the angle ``φ`` between ``u`` and ``v``
    (Karcher, "Riemannian Center of Mass and Mollifier Smoothing", Comm. Pure Appl. Math. 30, 1977, section 1). The
    iteration starts at the direction of the mean of the ``u_i``, and follows the mean tangent. Each parameter is one
    vector. Experts that are 0 have no direction, but count in the mean length.

    Args:
        steps: the most steps to take.
        tolerance: stop when the experts' coefficients change by less than this.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(self, steps: int = 100, tolerance: float = 1e-10, importance: dict[str, float] | None = None) -> None:
        super().__init__(importance)
        self.steps, self.tolerance = steps, tolerance

    def combine(self, parameter: SharedParameter) -> Tensor | None:
        products = inner_products(parameter)
        lengths = products.diagonal().sqrt()
        weights = torch.tensor([parameter.weights[task] for task in parameter.tasks], dtype=torch.float64)
        nonzero = lengths > 0
        if not bool(nonzero.any()):
            return None
        pointing = weights * nonzero
        units = lengths.where(nonzero, 1)
        direction = self._direction(products / units.outer(units), pointing / pointing.sum())
        coefficients = direction * (weights @ lengths) / units
        return weighted(parameter, dict(zip(parameter.tasks, coefficients.tolist())))

    def _direction(self, cosines: Tensor, weights: Tensor) -> Tensor:
        """Coefficients of the unit vectors in the mean direction."""
        direction = weights
        if _length(weights, cosines) < _TINY:  # they cancel out, and any great circle is as good
            direction = torch.zeros_like(weights)
            direction[int(weights.argmax())] = 1
        direction = direction / _length(direction, cosines)
        for _ in range(self.steps):
            near = (cosines @ direction).clamp(-1, 1)
            angles = near.arccos()
            sines = angles.sin()
            stretch = torch.where(sines > _TINY, angles / sines.clamp_min(_TINY), 1.0) * weights
            tangent = stretch - (stretch @ near) * direction
            length = _length(tangent, cosines)
            before = direction
            direction = math.cos(length) * before + (math.sin(length) / length if length else 1.0) * tangent
            direction = direction / _length(direction, cosines)
            # The length of the tangent would not do: its rounding error is the square root of theirs.
            if float((direction - before).abs().max()) < self.tolerance:
                break
        return direction

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if self.steps < 1:
            problems.append(f"steps: must be 1 or more, got {self.steps}")
        return problems + self._out_of(0, 1, tolerance=self.tolerance)


def inner_products(parameter: SharedParameter) -> Tensor:
    """Inner products of the experts as vectors: ``(T, T)``, float64, on the CPU. Holds two experts at a time."""
    tasks = parameter.tasks
    products = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for i, one in enumerate(tasks):
        first = parameter.expert(one).flatten().to(torch.float64)
        for j, two in enumerate(tasks[: i + 1]):
            products[i, j] = products[j, i] = (first @ parameter.expert(two).flatten().to(torch.float64)).cpu()
    return products


def weighted(parameter: SharedParameter, coefficients: Mapping[str, float]) -> Tensor:
    """The sum of the experts, each times its coefficient."""
    total = torch.zeros_like(parameter.expert(parameter.tasks[0]))
    for task, coefficient in coefficients.items():
        total.add_(parameter.expert(task), alpha=coefficient)
    return total


def _length(coefficients: Tensor, products: Tensor) -> float:
    return math.sqrt(max(float(coefficients @ products @ coefficients), 0.0))
