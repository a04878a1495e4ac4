"""The closed form of one layer, from the statistics of its inputs to the merged weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from com_lightning.core.chain.gather import Inputs, Layer
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers import PerChannel
from com_lightning.core.solve.ridge import factorize, residual, solve_or_average
from com_lightning.core.solve.statistics import Shift
from com_lightning.core.solve.task_biases import centred, solve_each, with_own_biases
from com_lightning.core.solve.weighted_ridge import solve_in_metrics
from com_lightning.core.tensors.modules import average


@dataclass
class Fit:
    """What a layer was solved for.

    Attributes:
        solution: the merged weight, ``(g, o, k)`` in float64.
        each: the weight of each task, where a task keeps a part of it for itself.
        importance: what each task counted, with a sum of one.
        reached: ``(g,)``, positive for groups that data reached.
        ridge, kept, steps, residual: see :class:`~com_lightning.core.sweep.task.LayerRecord`.
    """

    solution: Tensor
    importance: Sequence[float]
    ridge: float
    reached: Tensor
    kept: int
    each: list[Tensor] = field(default_factory=list)
    steps: int | None = None
    residual: float | None = None


def fit(
    layer: Layer,
    inputs: Inputs,
    rule: ChainOptions,
    importance: Sequence[float],
    roots: Sequence[Tensor | None] = (),
    apart: bool = False,
) -> Fit:
    """Solve a layer.

    Args:
        layer: and its weights in all experts.
        inputs: its statistics, which become means in place.
        rule: what is solved.
        importance: one weight per task, summing to one.
        roots: of the matrices by which errors count, for each task, if they do; see
            :mod:`~com_lightning.core.chain.sensitivity`.
        apart: whether tasks keep biases, or all of a normalisation, for themselves.
    """
    kind, module, weights, ridge = layer.kind, layer.merged, layer.weights, rule.ridge
    known = [root for root in roots if root is not None and len(root) == weights[0].shape[1]]
    known = known if len(known) == len(weights) and len(weights[0]) == 1 else []
    biases = apart and not isinstance(kind, PerChannel)
    for entry in inputs.statistics:
        if entry.gram is None:  # no forward of this task got here
            entry.gram = weights[0].new_zeros(weights[0].shape[0], weights[0].shape[2], weights[0].shape[2])
    if rule.balance:
        importance = balanced(importance, [entry.shift for entry in inputs.statistics])
    grams = [s.mean_gram() for s in inputs.statistics]
    reached = torch.stack([gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in grams]).sum(0)
    averaged = kind.has_bias(module) and not rule.joint
    if averaged:  # weight and bias have no say in each other
        for gram in grams:
            gram[..., -1, :-1] = gram[..., :-1, -1] = 0.0
    drifts = [s.mean_drift(w) for s, w in zip(inputs.statistics, weights)]
    statistics = grams, drifts, weights
    if biases:
        grams, drifts, weights = centred(*statistics)
    if inputs.factor is None:
        inputs.factor = factorize(grams, importance, ridge)
    mean = average(weights, importance) if averaged or layer.base is not None else weights[0]
    anchor = None
    if layer.base is not None:  # what no data reached is the average, as with any rule
        anchor = torch.where((reached > 0)[:, None, None], kind.to_matrix(layer.base, module), mean)
    measured = len(rule.streams) < 2
    # A solution that is changed after that, or of a matrix without a factor, is measured apart.
    later = averaged or bool(known) or bool(inputs.factor.failed.any())
    solved = solve_or_average(inputs.factor, grams, drifts, weights, importance, anchor, measured and not later)
    found = Fit(solved.weight, importance, ridge, reached, solved.kept, residual=solved.residual)
    if known and not solved.kept:
        found.solution, found.steps = solve_in_metrics(
            inputs.factor, grams, drifts, weights, importance, ridge, known, solved.weight
        )
    if averaged:
        found.solution[..., -1] = mean[..., -1]
    if measured and later:
        found.residual = residual(grams, weights, found.solution[..., : weights[0].shape[2]], importance)
    if biases:
        found.each = with_own_biases(found.solution, *statistics)
        shares = found.solution.new_tensor(importance)[:, None, None, None]
        found.solution = torch.stack(found.each).mul_(shares).sum(0)
    elif apart:
        found.each = solve_each(*statistics, average(weights, importance), ridge)
    return found


def balanced(importance: Sequence[float], shifts: Sequence[Shift]) -> list[float]:
    """Task importance, times the square of how far the inputs have drifted: a task that has drifted more counts more.

    ``a_i c_i / sum_j a_j c_j`` with ``c_i = d_i² / mean_j d_j²``, but at least 1/2 and at most 2. ``d_i`` is the
    relative distance of the merged model's inputs to the expert's.

    Example::

        >>> near, far = (Shift(distance=square, energy=10.0, rows=5) for square in (1.0, 1.5))
        >>> [round(share, 2) for share in balanced([0.5, 0.5], [near, far])]
        [0.4, 0.6]
    """
    squares = [shift.relative_distance**2 if shift.rows else 0.0 for shift in shifts]
    mean = sum(squares) / len(squares)
    if not 0 < mean < math.inf:
        return list(importance)
    counts = [own * min(max(square / mean, 0.5), 2.0) for own, square in zip(importance, squares)]
    return [count / sum(counts) for count in counts]
