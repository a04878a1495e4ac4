"""LARV against its formulas."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from com_lightning.core.sweep.context import Context
from com_lightning.methods import LARV, TIES, Average, KarcherMean, MergingMethod, TaskArithmetic
from com_lightning.methods.larv import effective_rank
from com_lightning.methods.parameterwise import SharedParameter, shared_parameters
from tests.helpers.rules import SHAPES, close, make_job, make_values, merge, named

MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


def factors(rule: LARV, base: Mapping[str, Tensor], experts: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
    job = make_job(rule, base, named(experts), Context())
    parameters: list[SharedParameter] = list(shared_parameters(job, {t.name: 1 / len(job.tasks) for t in job.tasks}))
    return rule.factors(parameters)


@pytest.mark.parametrize("below", [TaskArithmetic(), TIES(0.5), KarcherMean(), Average()], ids=str)
def test_a_strength_of_0_changes_nothing(below: MergingMethod) -> None:
    base, experts = make_values()
    close(merge(LARV(below, strength=0.0), base, named(experts)), merge(below, base, named(experts)))


def test_task_vectors_are_scaled_before_they_are_merged() -> None:
    """The rule below sees experts that have moved further, or less far: here, trimming over the whole model does."""
    base, experts = make_values()
    rule = LARV(TIES(0.3), strength=0.5)
    scales = factors(rule, base, experts)
    assert sorted(scales.values()) == [0.5, 1.0, 1.5]
    moved = [{n: base[n] + scales.get(n, 1.0) * (expert[n] - base[n]) for n in SHAPES} for expert in experts]
    close(merge(rule, base, named(experts)), merge(TIES(0.3), base, named(moved)))


@pytest.mark.parametrize("gate", ["tiers", "continuous"])
def test_only_layers_are_scaled_and_within_the_strength(gate: Any) -> None:
    base, experts = make_values()
    scales = factors(LARV(TaskArithmetic(), gate, 0.3), base, experts)
    assert list(scales) == MATRICES
    assert all(0.7 <= scale <= 1.3 for scale in scales.values())


def test_the_scores() -> None:
    """Written out, with matrices as they are."""

    def rank(matrix: Tensor) -> float:
        share = torch.linalg.svdvals(matrix).square() / matrix.square().sum()
        return math.exp(-float((share * share.log()).sum()))

    base, experts = make_values()
    contrast, conflict = [], []
    for name in MATRICES:
        a, bs = base[name].flatten(1), [(expert[name] - base[name]).flatten(1) for expert in experts]
        contrast.append(sum(rank(a) / rank(b) for b in bs) / 3)
        norms = [(a @ b.T - b @ a.T).norm() + (a.T @ b - b.T @ a).norm() for b in bs]
        conflict.append(sum(float(n / 2 / a.norm() / b.norm()) for n, b in zip(norms, bs)) / 3)
    mean = sum(conflict) / 3
    spread = math.sqrt(sum((c - mean) ** 2 for c in conflict) / 3)
    scores = [
        e * math.sqrt(place / 3) / (1 + math.log1p(math.exp((c - mean) / spread)))
        for place, (e, c) in enumerate(zip(contrast, conflict), 1)
    ]
    expected = {name: 1 + 0.5 * math.tanh(3 * (score - 1)) for name, score in zip(MATRICES, scores)}
    assert factors(LARV(TaskArithmetic(), "continuous", 0.5), base, experts) == pytest.approx(expected)


def test_deep_layers_count_for_more() -> None:
    """Six layers that are alike."""
    generator = torch.Generator().manual_seed(0)
    matrix, change = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    base = {f"layer{number}": matrix for number in range(6)}
    expert = {name: value + 0.1 * change for name, value in base.items()}
    assert list(factors(LARV(TaskArithmetic(), strength=0.5), base, [expert]).values()) == [
        0.5,
        0.5,
        1.0,
        1.0,
        1.5,
        1.5,
    ]
    scales = list(factors(LARV(TaskArithmetic(), "continuous"), base, [expert]).values())
    assert scales == sorted(scales)
    assert scales[0] < scales[-1]


def test_what_nobody_has_changed_is_no_layer() -> None:
    base, (expert, *_) = make_values()
    same = {**expert, "matrix": base["matrix"]}
    assert list(factors(LARV(Average()), base, [same, same])) == ["wide", "conv"]
    close(merge(LARV(Average()), base, named([base, base])), base)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_effective_rank_of_equal_singular_values_is_their_number(rank: int) -> None:
    matrix = torch.linalg.qr(torch.randn(8, rank, generator=torch.Generator().manual_seed(0)).double()).Q
    assert effective_rank(7 * matrix @ matrix.T) == pytest.approx(rank)
