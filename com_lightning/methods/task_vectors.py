"""Rules that add the experts' task vectors ``τ_i = θ_i − θ_base`` to the base: what each expert has learned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from com_lightning.methods.parameterwise import Combine, ParameterRule, SharedParameter, scale_problems
from com_lightning.methods.trimming import kth_largest


class TaskVectorRule(ParameterRule):
    """``θ_base + scale Σ_i sparse(τ_i)``, or the elected mean (see :func:`elected_mean`) in place of the sum.

    A task vector's importance is relative to the mean importance, so equal importances change nothing.

    Args:
        scale: factor of what is added to the base; 0 gives the base.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    needs = frozenset({"base"})
    elects = False

    def __init__(self, scale: float, importance: dict[str, float] | None = None) -> None:
        super().__init__(importance)
        self.scale = scale

    def sparse(self, parameter: SharedParameter, task: str) -> Tensor:
        """The part of a task vector that is kept; each call returns the same."""
        return parameter.vector(task)

    def combine(self, parameter: SharedParameter) -> Tensor:
        return self.added(parameter, lambda task: self.sparse(parameter, task))

    def added(self, parameter: SharedParameter, vector: Callable[[str], Tensor]) -> Tensor:
        """The base plus the scaled sum, or elected mean, of these task vectors."""
        merged = elected_mean(parameter, vector) if self.elects else parameter.sum(vector)
        return merged.mul_(self.scale).add_(parameter.base())

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + scale_problems(self.scale)


class TaskArithmetic(TaskVectorRule):
    """Task arithmetic: the sum of the task vectors, scaled, on top of the base: ``θ_base + λ Σ_i τ_i``.

    Ilharco et al., "Editing Models with Task Arithmetic", arXiv 2212.04089, sections 2 and 4. The paper chooses the
    scale on held-out data; comparisons on eight tasks mostly use 0.3. One over the number of tasks gives the average.

    Args:
        scale: ``λ``.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(self, scale: float = 0.3, importance: dict[str, float] | None = None) -> None:
        super().__init__(scale, importance)

    def combine(self, parameter: SharedParameter) -> Tensor:
        return parameter.by_parts(super().combine)


class TIES(TaskVectorRule):
    """TIES: task vectors are trimmed to their largest values, and averaged where they agree on the sign.

    Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", arXiv 2306.01708, algorithm 1, with the
    settings that the paper recommends without validation data. Values equal to the smallest kept value are kept, too.
    If both signs weigh the same, none is elected and the base stays, as in the algorithm. The authors' code then takes
    the majority sign of all parameters.

    Args:
        density: share of each task vector that is kept, above 0.
        scale: ``λ``.
        trim: ``"model"``: keep the largest values of all shared parameters of an expert, as in the paper;
            ``"parameter"``: keep the largest values of each parameter, as in mergekit.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    elects = True

    def __init__(
        self,
        density: float = 0.2,
        scale: float = 1.0,
        trim: Literal["model", "parameter"] = "model",
        importance: dict[str, float] | None = None,
    ) -> None:
        super().__init__(scale, importance)
        self.density, self.trim = density, trim

    def combiner(self, parameters: Sequence[SharedParameter]) -> Combine:
        limits = self.limits(parameters)

        def combine(parameter: SharedParameter) -> Tensor:
            least = limits(parameter)
            return parameter.by_parts(
                lambda part: self.added(part, lambda task: trimmed(part.vector(task), least[task]))
            )

        return combine

    def limits(self, parameters: Sequence[SharedParameter]) -> Callable[[SharedParameter], Mapping[str, float]]:
        """For each parameter: task -> the smallest magnitude in its task vector that is kept."""
        if self.trim == "parameter":
            return lambda parameter: _limits([parameter], self.density)
        limits = _limits(parameters, self.density)
        return lambda parameter: limits

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + self._out_of(0, 1, density=self.density)


class DARE(TaskVectorRule):
    """DARE: most of each task vector is dropped at random, and the rest is scaled up to compensate.

    Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", arXiv
    2311.03099, section 3: each value is kept with probability ``1 − p``, and divided by it. The paper merges the result
    by other rules. Here it is merged by task arithmetic, or with ``ties`` by the elected mean of TIES without trimming.

    Args:
        drop_rate: ``p``, below 1. The paper goes up to 0.99, and shows 0.9 most.
        scale: factor of what is added to the base. The default is 0.3, and 1 with ``ties``.
        ties: average the values that agree with the elected sign, in place of the sum.
        rescale: divide by the probability of being kept. The paper advises against leaving this out.
        seed: seed of the random choice. The choice does not depend on the order of tasks or on the device.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(
        self,
        drop_rate: float = 0.9,
        scale: float | None = None,
        ties: bool = False,
        rescale: bool = True,
        seed: int = 0,
        importance: dict[str, float] | None = None,
    ) -> None:
        super().__init__((1.0 if ties else 0.3) if scale is None else scale, importance)
        self.drop_rate, self.ties, self.rescale, self.seed = drop_rate, ties, rescale, seed
        self.elects = ties

    def sparse(self, parameter: SharedParameter, task: str) -> Tensor:
        keep = 1 - self.drop_rate
        kept = parameter.vector(task).mul_(parameter.uniform(task, self.seed) < keep)
        return kept.div_(keep) if self.rescale else kept

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = (
            [] if 0 <= self.drop_rate < 1 else [f"drop_rate: must be 0 or more and below 1, got {self.drop_rate}"]
        )
        return super().problems(tasks) + problems


class Breadcrumbs(TaskVectorRule):
    """Model Breadcrumbs: task vectors without their smallest values and without their few largest ones, summed.

    Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", arXiv 2312.06795,
    section 3. The paper's ``β`` is ``1 − outliers − density``, and its ``γ`` is ``1 − outliers``. Masks are per
    parameter. The paper searches for the settings; the defaults are the start of the search in the authors' code.

    Args:
        density: share of the values that is kept, above 0: the largest values after the outliers.
        outliers: share of the values that is dropped because they are the largest.
        scale: ``α``.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    def __init__(
        self,
        density: float = 0.15,
        outliers: float = 0.006,
        scale: float = 0.2,
        importance: dict[str, float] | None = None,
    ) -> None:
        super().__init__(scale, importance)
        self.density, self.outliers = density, outliers

    def sparse(self, parameter: SharedParameter, task: str) -> Tensor:
        vector = parameter.vector(task)
        total = vector.numel()
        kept = max(int(self.density * total), 1)
        dropped = min(int(self.outliers * total), total - kept)
        order = vector.flatten().abs().sort(descending=True, stable=True).indices[dropped : dropped + kept]
        result = torch.zeros_like(vector).flatten()
        result[order] = vector.flatten()[order]
        return result.view_as(vector)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks) + self._out_of(0, 1, density=self.density)
        if not 0 <= self.outliers < 1:
            problems.append(f"outliers: must be 0 or more and below 1, got {self.outliers}")
        return problems


class DELLA(TaskVectorRule):
    """DELLA: like DARE, but smaller values are dropped more often, and signs are elected as in TIES.

    Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", arXiv
    2406.11617, section 3. The values of a row are ranked, smallest first. The value of rank ``r`` of ``n`` is kept with
    probability ``1 − drop_rate − window / 2 + window (r − 1) / (n − 1)``, and divided by it. A row is what belongs to
    one index of the first dimension; a vector is one row. The defaults are those of the authors' example.

    Args:
        drop_rate: ``p``, the mean probability of being dropped.
        window: ``ε``, the probability of the smallest value minus that of the largest.
        scale: ``λ``.
        seed: seed of the random choice. The choice does not depend on the order of tasks or on the device.
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    elects = True

    def __init__(
        self,
        drop_rate: float = 0.3,
        window: float = 0.14,
        scale: float = 1.1,
        seed: int = 0,
        importance: dict[str, float] | None = None,
    ) -> None:
        super().__init__(scale, importance)
        self.drop_rate, self.window, self.seed = drop_rate, window, seed

    def sparse(self, parameter: SharedParameter, task: str) -> Tensor:
        vector = parameter.vector(task)
        probability = self.keep_probability(vector)
        return vector.mul_(parameter.uniform(task, self.seed) < probability).div_(probability)

    def keep_probability(self, vector: Tensor) -> Tensor:
        """The probability with which each value is kept, in the shape of ``vector``."""
        rows = vector.reshape(len(vector), -1) if vector.dim() > 1 else vector.reshape(1, -1)
        last = rows.shape[1] - 1
        ranks = torch.empty_like(rows)
        order = rows.abs().sort(dim=1, stable=True).indices
        ranks.scatter_(1, order, torch.arange(last + 1, device=rows.device, dtype=rows.dtype).expand_as(rows))
        place = ranks.div_(last) if last else ranks + 0.5
        return (place - 0.5).mul_(self.window).add_(1 - self.drop_rate).view_as(vector)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = super().problems(tasks)
        if not (self.window >= 0 and self.window / 2 <= self.drop_rate < 1 - self.window / 2):
            problems.append(
                f"drop_rate, window: drop_rate - window / 2 must be 0 or more, and drop_rate + window / 2 below 1; got "
                f"{self.drop_rate} and {self.window}"
            )
        return problems


_LEAST = torch.finfo(torch.float32).tiny
"""Lower bound of divisors."""


def elected_mean(parameter: SharedParameter, vector: Callable[[str], Tensor]) -> Tensor:
    """Return the weighted mean of those values of each element whose sign has more weight over all tasks.

    Example: one of two experts has moved the last value the other way, but less.

        >>> vectors = {"a": torch.tensor([1.0, 2.0, -1.0]), "b": torch.tensor([3.0, 0.0, 3.0])}
        >>> shared = SharedParameter("w", vectors, {"a": 0.5, "b": 0.5}, torch.zeros(3), torch.empty(3))
        >>> elected_mean(shared, shared.vector)
        tensor([2., 2., 3.])
    """
    # Sum and count both signs in one pass, because a task vector is costly to make.
    above, below, up, down = (parameter.zeros() for _ in range(4))
    for task in parameter.tasks:
        value, share = vector(task), parameter.share(task)
        up.add_(value > 0, alpha=share)
        down.add_(value < 0, alpha=share)
        above.add_(value.clamp(min=0), alpha=share)
        below.add_(value.clamp_(max=0), alpha=share)
    total = above + below
    result = above.div_(up.clamp_(min=_LEAST)).where(total > 0, below.div_(down.clamp_(min=_LEAST)))
    return result.where(total != 0, 0.0)


def trimmed(vector: Tensor, least: float) -> Tensor:
    """Set the values of a task vector whose magnitude is below ``least`` to zero, in place."""
    return vector.mul_(vector.abs().to(torch.float32) >= least)


def _limits(parameters: Sequence[SharedParameter], density: float) -> dict[str, float]:
    count = max(int(density * sum(parameter.target.numel() for parameter in parameters)), 1)

    def vectors(task: str) -> Iterator[Tensor]:
        for parameter in parameters:
            for _, part in parameter.parts():
                yield part.vector(task)

    return {task: kth_largest(partial(vectors, task), count) for task in (parameters[0].tasks if parameters else ())}
