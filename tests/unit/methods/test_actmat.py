"""ACTMat and TACT against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from com_lightning.methods import TACT, ACTMat, MergingMethod
from tests.helpers import relative
from tests.helpers.rules import make_values, merge, named


def change(rule: MergingMethod, name: str, count: int = 3) -> tuple[Tensor, list[Tensor]]:
    """The merged task matrix, and those of the experts."""
    base, experts = make_values(count)
    merged = merge(rule, base, named(experts))[name] - base[name]
    return merged.flatten(1), [(expert[name] - base[name]).flatten(1) for expert in experts]


def interference(merged: Tensor, vectors: list[Tensor], weights: list[float]) -> Tensor:
    return sum((w * ((merged - v) @ v.T).square().sum() for v, w in zip(vectors, weights)), torch.zeros(()))


@pytest.mark.parametrize("name", ["matrix", "wide", "conv"])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])
def test_the_interference_is_least(name: str, weights: list[float]) -> None:
    merged, vectors = change(ACTMat(importance=dict(zip("abc", weights))), name)
    merged.requires_grad_(True)
    loss = interference(merged, vectors, weights)
    (slope,) = torch.autograd.grad(loss, merged)
    assert slope.abs().max() < 1e-9 * float(vectors[0].abs().max()) ** 3
    for other in [*vectors, sum(vectors, torch.zeros(())) / 3]:
        assert interference(other, vectors, weights) > loss


@pytest.mark.parametrize("rule", [ACTMat(), TACT(1.0), TACT(0.3)])
def test_tasks_on_different_inputs_are_summed(rule: MergingMethod) -> None:
    base, (change, *_) = make_values(1)
    left = {"matrix": base["matrix"].clone()}
    right = {"matrix": base["matrix"].clone()}
    left["matrix"][:, :3] += change["matrix"][:, :3]
    right["matrix"][:, 3:] += change["matrix"][:, 3:]
    result = merge(rule, {"matrix": base["matrix"]}, named([left, right]))["matrix"]
    assert relative(result, base["matrix"] + change["matrix"]) < 1e-9


def test_directions_that_no_expert_has_stay_as_in_the_base() -> None:
    base, experts = make_values(2)
    unused = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()).Q
    part = [e["matrix"] - (e["matrix"] - base["matrix"]) @ unused @ unused.T for e in experts]
    change = merge(ACTMat(), {"w": base["matrix"]}, named([{"w": value} for value in part]))["w"] - base["matrix"]
    assert (change @ unused).abs().max() < 1e-9 * float(change.abs().max())
    assert not merge(ACTMat(), base, named([base, base]))["matrix"].sub(base["matrix"]).any()


def test_weak_directions_are_dropped() -> None:
    """One expert, so that the rest comes back."""
    base = {"w": torch.zeros(3, 3).double()}
    expert = {"w": torch.diag(torch.tensor([1.0, 0.1, 0.01])).double()}
    for rtol, kept in ((1e-5, 3), (1e-3, 2), (0.1, 1)):
        result = merge(ACTMat(rtol=rtol), base, {"a": expert})["w"]
        assert relative(result, torch.diag(expert["w"].diagonal() * (torch.arange(3) < kept))) < 1e-9


def test_tact_merges_whole_task_matrices() -> None:
    """Only the covariances are of trimmed ones."""
    merged, vectors = change(TACT(0.5), "matrix")
    kept = [v * (v.abs() >= v.abs().flatten().sort(descending=True).values[23]) for v in vectors]
    assert all(int((v != 0).sum()) == 24 for v in kept)
    covariances = [v.T @ v for v in kept]
    right = sum((v @ c for v, c in zip(vectors, covariances)), torch.zeros(()))
    expected = torch.linalg.solve(sum(covariances, torch.zeros(())), right, left=False)
    assert relative(merged, expected) < 1e-9
