"""The closed form of one layer, from the statistics of its inputs to the merged weight.

:func:`fit` chooses between :func:`fit_by_ridge`, where all errors count alike, and :func:`fit_by_sensitivity`, where
errors count by their effect on predictions. If each task gets its own biases, :func:`fit_task_biases` adds them. If it
gets a correction of low rank, shared weight and corrections are solved in turn, see :func:`fit_corrections`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from com_lightning.core.chain.inputs import LayerInputs
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.solve.ridge import Factor, factorize, residual, solve_or_average
from com_lightning.core.solve.similarity import by_similarity
from com_lightning.core.solve.statistics import DriftNorms
from com_lightning.core.solve.task_adapters import low_rank_corrections, rank_gains
from com_lightning.core.solve.task_biases import centred, solve_each, with_task_biases
from com_lightning.core.solve.weighted_ridge import solve_weighted
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.tensors.modules import average

ROUNDS = 2
"""How often the shared weight is solved again for what the corrections of the tasks leave."""


@dataclass
class Fit:
    """The solution of a layer.

    Attributes:
        weight: merged, ``(g, o, k)`` in float64.
        groups_kept_average, cg_steps, residual: see :class:`~com_lightning.core.sweep.task.LayerRecord`.
        importance: of each task, with a sum of one.
        reached: ``(g,)``, positive for groups that data have reached.
        informed: ``(g,)``, positive for groups whose inputs are not all zero. The others keep the average.
        task_weights: the weight of each task, if tasks keep their own biases or normalisation parameters.
        gains: see :func:`~com_lightning.core.solve.task_adapters.rank_gains`, if they are recorded.
    """

    weight: Tensor
    groups_kept_average: int
    residual: float | None = None
    cg_steps: int | None = None
    importance: Sequence[float] = ()
    reached: Tensor = field(default_factory=lambda: torch.zeros(0))
    informed: Tensor = field(default_factory=lambda: torch.zeros(0))
    task_weights: list[Tensor] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)


Solve = Callable[[Layer, LayerInputs, Sequence[float]], "Fit | str"]
"""Solves a layer from its statistics and the importance of each task. A rule of its own has another one than
:func:`fit`. If the layer is to keep its value, it returns the reason."""


@dataclass(frozen=True)
class Regression:
    """The regression of one layer, with one entry for each task.

    Attributes:
        grams: ``(g, k, k)``, means over rows.
        drifts: ``D_i``, ``(g, o, k)``, or ``None``.
        weights: of the experts, ``(g, o, k)``.
        importance: with a sum of one.
        ridge: relative to the mean of the diagonal of the summed Gram matrix.
        anchor: the weight that the ridge pulls towards, ``(g, o, k)``. ``None``: the average of the experts.
        one_sided: whether targets are computed on the merged model's input. Then the statistics give the residual.
    """

    grams: list[Tensor]
    drifts: list[Tensor | None]
    weights: list[Tensor]
    importance: Sequence[float]
    ridge: float
    anchor: Tensor | None
    one_sided: bool

    def centred(self) -> Regression:
        """Return the regression without the bias, centred at the means of each task."""
        grams, drifts, weights = centred(self.grams, self.drifts, self.weights)
        anchor = None if self.anchor is None else self.anchor[..., :-1]
        return replace(self, grams=grams, drifts=drifts, weights=weights, anchor=anchor)

    def residual(self, weight: Tensor) -> float:
        """Return the relative squared error of a weight, with targets on the merged model's input."""
        return residual(self.grams, self.weights, weight[..., : self.weights[0].shape[2]], self.importance)


def fit(
    layer: Layer,
    inputs: LayerInputs,
    options: ChainOptions,
    importance: Sequence[float],
    roots: Sequence[Tensor | None] = (),
    of_tasks: Collection[str] = (),
) -> Fit:
    """Solve a layer.

    Args:
        layer: the layer, with the weights of all experts.
        inputs: its statistics. The sums become means.
        options: what is solved.
        importance: one weight per task, summing to one.
        roots: for each task, the root of the matrix by which errors count, see
            :mod:`~com_lightning.core.chain.sensitivity`.
        of_tasks: names, in the layer, of the parameters and buffers that each task keeps for itself.

    Returns:
        The solution.
    """
    layer_type, weights = layer.layer_type, layer.weights
    means = inputs.means(weights)
    if options.by_similarity:
        importance = by_similarity(importance, [entry.similarity for entry in means])
    if options.balance:
        importance = balanced(importance, [entry.drift_norms for entry in means])
    grams = [entry.gram for entry in means]
    squares = torch.stack([gram.diagonal(dim1=-2, dim2=-1) for gram in grams]).sum(0)
    features = squares.shape[1] - int(layer_type.has_bias(layer.merged))
    reached, informed = squares.sum(1), squares[:, :features].sum(1)
    averages_bias = layer_type.has_bias(layer.merged) and not options.joint
    if averages_bias:  # weight and bias do not affect each other
        for gram in grams:
            gram[..., -1, :-1] = gram[..., :-1, -1] = 0.0
    drifts = [entry.weighted_drift(weight) for entry, weight in zip(means, weights)]
    averages = averages_bias or options.anchor == "base"
    mean = average(weights, importance) if averages else weights[0]
    anchor = None if layer.anchor is None else layer_type.to_matrix(layer.anchor, layer.merged)
    if anchor is not None and options.anchor == "base":  # what no data have reached still becomes the average
        has_data = torch.stack([informed > 0] * features + [reached > 0] * (squares.shape[1] - features), -1)
        anchor = torch.where(has_data[:, None], anchor, mean)
    one_sided = not options.two_sided
    whole = Regression(grams, drifts, weights, importance, options.ridge, anchor, one_sided)
    has_task_biases = "bias" in of_tasks and not isinstance(layer_type, PerChannel)
    regression = whole.centred() if has_task_biases else whole
    known = [root for root in roots if root is not None]
    usable = [root * (len(root) / root.square().sum()).sqrt() for root in known if len(root) == weights[0].shape[1]]
    if len(usable) < len(weights) or len(weights[0]) > 1:
        usable = []

    def solved(entry: Regression) -> Fit:
        if inputs.factor is None:
            inputs.factor = factorize(regression.grams, importance, options.ridge)
        if usable:
            return fit_by_sensitivity(entry, inputs.factor, usable)
        return fit_by_ridge(entry, inputs.factor, measure=one_sided and not averages_bias)

    if options.keeps_shared:
        present = layer_type.to_matrix(layer.merged, layer.merged).double()
        result = Fit(present[..., : regression.weights[0].shape[2]], 0)
    else:
        result = solved(regression)
    if averages_bias:
        result.weight[..., -1] = mean[..., -1]
    if one_sided and result.residual is None:
        result.residual = regression.residual(result.weight)
    if of_tasks and isinstance(layer_type, PerChannel):
        start = average(weights, importance) if anchor is None else anchor
        result.task_weights = solve_each(grams, drifts, weights, start, options.ridge)
    elif of_tasks:
        result.task_weights = [result.weight] * len(weights)
        if "weight" in of_tasks:
            rounds = 0 if options.keeps_shared else ROUNDS
            fit_corrections(result, regression, solved, options.rank_of(layer.name), usable, rounds)
            if options.records_gains and len(known) == len(weights):
                effects = [share * float(root.square().sum()) / len(root) for share, root in zip(importance, known)]
                parts = regression.grams, regression.drifts, regression.weights
                result.gains = rank_gains(*parts, result.weight, effects, usable)
        if has_task_biases:
            fit_task_biases(result, whole)
    result.importance, result.reached, result.informed = importance, reached, informed
    return result


def fit_by_ridge(regression: Regression, factor: Factor, measure: bool = False) -> Fit:
    """Solve a regression in which all errors count alike.

    Args:
        regression: the regression of the layer.
        factor: factor of its summed Gram matrices.
        measure: also compute the residual of a one-sided merge, which costs one product here. If the factorisation of a
            group has failed, it is not computed.

    Returns:
        The solution.
    """
    solution = solve_or_average(
        factor,
        regression.grams,
        regression.drifts,
        regression.weights,
        regression.importance,
        regression.anchor,
        measure and not bool(factor.failed.any()),
    )
    return Fit(solution.weight, solution.groups_kept_average, solution.residual)


def fit_by_sensitivity(regression: Regression, factor: Factor, roots: Sequence[Tensor]) -> Fit:
    """Solve a regression in which errors count by their effect on predictions.

    See :mod:`~com_lightning.core.solve.weighted_ridge`.

    Args:
        regression: the regression of a layer with one group.
        factor: factor of its summed Gram matrices.
        roots: for each task, the root of the matrix by which errors count.

    Returns:
        The solution.
    """
    result = fit_by_ridge(regression, factor)
    if not result.groups_kept_average:
        result.weight, result.cg_steps = solve_weighted(
            factor,
            regression.grams,
            regression.drifts,
            regression.weights,
            regression.importance,
            regression.ridge,
            roots,
            result.weight,
            regression.anchor,
        )
    return result


def fit_corrections(
    result: Fit,
    regression: Regression,
    solved: Callable[[Regression], Fit],
    rank: int,
    roots: Sequence[Tensor],
    rounds: int = ROUNDS,
) -> None:
    """Solve the shared weight and a correction of low rank for each task in turn, in place.

    With corrections, the shared weight only has to do what they leave: it is solved for the experts' weights without
    them. That has the same Gram matrices, so their factor serves again.

    Args:
        result: the solution without corrections. It gets the weight of each task.
        regression: the regression of the layer.
        solved: solves a regression with the same Gram matrices.
        rank: of each correction.
        roots: as for :func:`~com_lightning.core.solve.task_adapters.low_rank_corrections`.
        rounds: how often the shared weight is solved again. With 0 it stays as it is.
    """
    parts = regression.grams, regression.drifts, regression.weights
    for _ in range(rounds):
        corrections = low_rank_corrections(*parts, result.weight, rank, roots)
        left = [weight.double() - correction for weight, correction in zip(regression.weights, corrections)]
        result.weight = solved(replace(regression, weights=left)).weight
    corrections = low_rank_corrections(*parts, result.weight, rank, roots)
    result.task_weights = [result.weight + correction for correction in corrections]


def fit_task_biases(result: Fit, regression: Regression) -> None:
    """Add the bias of each task to its solved matrix, in place. The merged bias is their average.

    Args:
        result: the solution without a bias, with the matrix of each task.
        regression: the regression of the layer, with its bias.
    """
    result.task_weights = with_task_biases(result.task_weights, regression.grams, regression.drifts, regression.weights)
    shares = result.weight.new_tensor(regression.importance)[:, None, None, None]
    bias = torch.stack([weight[..., -1:] for weight in result.task_weights]).mul_(shares).sum(0)
    result.weight = torch.cat([result.weight, bias], -1)


def balanced(importance: Sequence[float], norms: Sequence[DriftNorms]) -> list[float]:
    """Return the importance of tasks, adjusted so that a task whose inputs have drifted more counts more.

    It is ``a_i c_i / sum_j a_j c_j``, with ``c_i = d_i² / mean_j d_j²`` limited to the range from 1/2 to 2. ``d_i`` is
    the relative distance of the merged model's inputs to the expert's.

    Example::

        >>> near, far = (DriftNorms(distance=square, energy=10.0, rows=5) for square in (1.0, 1.5))
        >>> [round(share, 2) for share in balanced([0.5, 0.5], [near, far])]
        [0.4, 0.6]
    """
    squares = [entry.relative_distance**2 if entry.rows else 0.0 for entry in norms]
    mean = sum(squares) / len(squares)
    if not 0 < mean < math.inf:
        return list(importance)
    counts = [share * min(max(square / mean, 0.5), 2.0) for share, square in zip(importance, squares)]
    return [count / sum(counts) for count in counts]
