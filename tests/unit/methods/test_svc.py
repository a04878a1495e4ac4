"""SVC against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from com_lightning.methods import SVC, Average, MergingMethod, TaskArithmetic
from tests.helpers import relative
from tests.helpers.rules import SHAPES, close, make_values, merge, named

MATRICES = [name for name, shape in SHAPES.items() if len(shape) > 1]


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_identical_experts_are_given_back(scale: float) -> None:
    """However large the rule below makes them."""
    base, (expert, *_) = make_values()
    result = merge(SVC(TaskArithmetic(scale)), base, named([expert] * 3))
    close({name: result[name] for name in MATRICES}, {name: expert[name] for name in MATRICES})


def test_what_the_rule_below_makes_of_vectors_stays() -> None:
    base, experts = make_values()
    below, result = (merge(rule, base, named(experts)) for rule in (TaskArithmetic(), SVC(TaskArithmetic())))
    for name in SHAPES:
        assert torch.equal(below[name], result[name]) != (name in MATRICES)


@pytest.mark.parametrize("below", [TaskArithmetic(1.0), Average()], ids=lambda rule: type(rule).__name__)
def test_with_a_floor_of_1_singular_values_only_shrink(below: MergingMethod) -> None:
    base, experts = make_values()
    shared = {name: value + base[name] - experts[0][name] for name, value in experts[1].items()}
    experts = [*experts, {n: v + experts[0][n] - base[n] for n, v in shared.items()}]  # half of it as the first one's
    for name in MATRICES:
        one, two = (
            (merge(rule, base, named(experts))[name] - base[name]).flatten(1) for rule in (below, SVC(below, floor=1.0))
        )
        before, after = torch.linalg.svdvals(one), torch.linalg.svdvals(two)
        assert bool((after <= before * (1 + 1e-9)).all())
        left, _, right = torch.linalg.svd(one, full_matrices=False)
        inner = left.T @ two @ right.T
        assert relative(inner, torch.diag(inner.diagonal())) < 1e-9  # singular vectors stay


def test_tasks_that_do_not_overlap_are_left_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(8, 6, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    parts = [left[:, i : i + 2] @ torch.diag(torch.tensor([3.0 + i, 1.0]).double()) @ right[i : i + 2] for i in (0, 2)]
    total = sum(parts, torch.zeros(()))
    experts = named([{"w": part} for part in parts])
    base = {"w": torch.zeros(8, 6).double()}
    assert relative(merge(SVC(TaskArithmetic(1.0), floor=1.0), base, experts)["w"], total) < 1e-9


def test_an_answer_that_is_rounding_alone_counts_as_none() -> None:
    """Divided by its square, it would leave nothing of the other task's direction."""
    one, two = torch.diag(torch.tensor([5.0, 0.0]).double()), torch.diag(torch.tensor([1e-17, 3.0]).double())
    base = {"w": torch.zeros(2, 2).double()}
    merged = merge(SVC(TaskArithmetic(1.0), floor=1.0), base, named([{"w": one}, {"w": two}]))
    assert relative(merged["w"], one + two) < 1e-9


def test_the_scale_below_does_not_matter_above_the_floor() -> None:
    base, (one, *_) = make_values(1)
    two = {name: base[name] + 2 * (one[name] - base[name]) for name in SHAPES}  # all coefficients are positive
    results = [merge(SVC(TaskArithmetic(scale), 0.01), base, named([one, two])) for scale in (0.3, 1.0)]
    close({n: results[0][n] for n in MATRICES}, {n: results[1][n] for n in MATRICES})


def coefficients(merged: Tensor, vectors: list[Tensor]) -> Tensor:
    left = torch.linalg.svd(merged, full_matrices=False)[0]
    own = torch.stack([left.T @ vector for vector in vectors])
    result: Tensor = ((left.T @ merged) * own).sum(2) / own.square().sum(2)
    return result


def test_importance_weights_the_mean() -> None:
    base, experts = make_values(2)
    vectors = [expert["matrix"] - base["matrix"] for expert in experts]
    below = TaskArithmetic(1.0, importance={"a": 3, "b": 1})
    one, two = (merge(rule, base, named(experts))["matrix"] - base["matrix"] for rule in (below, SVC(below, 0.2)))
    factor = 1 / (torch.tensor([0.75, 0.25]).double() @ coefficients(one, vectors).clamp(min=0.2))
    left, values, right = torch.linalg.svd(one, full_matrices=False)
    assert relative(two, (left * (values * factor)) @ right) < 1e-9


def test_an_expert_that_has_learned_nothing() -> None:
    base, (expert, *_) = make_values()
    result = merge(SVC(TaskArithmetic(1.0), 0.5), base, named([expert, dict(base)]))["matrix"]
    # The mean of 1 and of the floor, for the expert that answers with nothing.
    assert relative(result - base["matrix"], (expert["matrix"] - base["matrix"]) / 0.75) < 1e-9
    assert torch.equal(merge(SVC(TaskArithmetic()), base, named([base, base]))["matrix"], base["matrix"])
