"""The data-free rules against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from com_lightning.methods import (
    DARE,
    DELLA,
    SLERP,
    TIES,
    TSVM,
    WUDI,
    Average,
    Breadcrumbs,
    Combined,
    IsoC,
    IsoCTS,
    KarcherMean,
    MergeJob,
    MergingMethod,
    TaskArithmetic,
)
from com_lightning.methods.parameterwise import shared_parameters
from com_lightning.methods.spherical import inner_products
from com_lightning.methods.trimming import kth_largest
from tests.helpers import relative
from tests.helpers.rules import SHAPES, close, every_rule, few, make_job, make_values, merge, named

# -- task vectors ------------------------------------------------------------------------------------------------------


def test_task_arithmetic_adds_up() -> None:
    base, experts = make_values()
    result = merge(TaskArithmetic(0.4), base, named(experts))
    close(result, {n: base[n] + 0.4 * sum(expert[n] - base[n] for expert in experts) for n in SHAPES})


def test_ties_keeps_what_does_not_overlap() -> None:
    """Task vectors on different elements do not disturb each other, whatever their signs."""
    base, changes = make_values(2)
    half = {n: (torch.arange(math.prod(s)).view(s) % 2).double() for n, s in SHAPES.items()}
    experts = [
        {n: base[n] + half[n] * changes[0][n] for n in SHAPES},
        {n: base[n] + (1 - half[n]) * changes[1][n] for n in SHAPES},
    ]
    result = merge(TIES(1.0), base, named(experts))
    close(result, {n: base[n] + half[n] * changes[0][n] + (1 - half[n]) * changes[1][n] for n in SHAPES})


def test_ties_elects_by_weight_and_averages_those_who_agree() -> None:
    base = {"w": torch.zeros(4)}
    experts = named([{"w": torch.tensor(v)} for v in ([1.0, 2, 0, 1], [3.0, -1, 2, -1], [-1.0, -2, 0, 0])])
    assert merge(TIES(1.0), base, experts)["w"].tolist() == [2.0, -1.5, 2.0, 0.0]
    heavy = TIES(1.0, importance={"a": 1, "b": 1, "c": 5})
    assert merge(heavy, base, experts)["w"][0].item() == -1.0


@pytest.mark.parametrize("trim", ["model", "parameter"])
def test_ties_trims_over_the_model_or_each_parameter(trim: Any) -> None:
    base = {"small": torch.zeros(100), "large": torch.zeros(100)}
    generator = torch.Generator().manual_seed(0)
    expert = {"small": torch.randn(100, generator=generator), "large": 1000 * torch.randn(100, generator=generator)}
    kept = {n: int((v != 0).sum()) for n, v in merge(TIES(0.2, trim=trim), base, {"a": expert}).items()}
    assert kept == ({"small": 0, "large": 40} if trim == "model" else {"small": 20, "large": 20})


@pytest.mark.parametrize("k", [1, 2, 37, 500, 999, 1000])
def test_kth_largest(k: int) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(k)) * 10.0 ** torch.arange(-30, 20).repeat(20)
    values[3:9] = 0
    expected = values.abs().sort(descending=True).values[k - 1]
    assert kth_largest(lambda: values.view(4, 250), k) == expected


@pytest.mark.parametrize("rule", [DARE, DELLA])
def test_dropping_is_unbiased(rule: Any) -> None:
    """In the mean over seeds, a task vector is what it was."""
    base, experts = {"w": torch.zeros(4, 5)}, [{"w": torch.linspace(-2, 2, 20).view(4, 5)}]
    count = 3000
    total = torch.zeros(4, 5)
    for seed in range(count):
        settings: dict[str, Any] = {"scale": 1.0, "seed": seed}
        method = rule(0.6, **settings) if rule is DARE else rule(0.6, 0.4, **settings)
        total += merge(method, base, named(experts))["w"]
    # The deviation of one draw is |x| sqrt(p / (1 - p)), at most 2 |x| here: five deviations of the mean.
    assert bool(((total / count - experts[0]["w"]).abs() <= 10 * experts[0]["w"].abs() / count**0.5 + 1e-6).all())


def test_what_is_dropped_depends_on_task_and_name_alone() -> None:
    value = torch.ones(50)
    base, expert = {"x": value * 0, "y": value * 0}, {"x": value, "y": value}
    both = merge(DARE(0.5, 1.0), base, {"a": expert, "b": expert})
    swapped = merge(DARE(0.5, 1.0), {"y": base["y"], "x": base["x"]}, {"b": {"y": value, "x": value}, "a": expert})
    assert torch.equal(both["x"], swapped["x"])
    assert not torch.equal(both["x"], both["y"])
    alone = [merge(DARE(0.5, 1.0), base, {task: expert})["x"] for task in "ab"]
    assert not torch.equal(*alone)
    assert torch.equal(sum(alone), both["x"])  # type: ignore[arg-type]
    assert not torch.equal(alone[0], merge(DARE(0.5, 1.0, seed=1), base, {"a": expert})["x"])


def test_breadcrumbs_drop_both_ends() -> None:
    base, expert = {"w": torch.zeros(10)}, {"w": torch.arange(1.0, 11) * torch.tensor([1.0, -1] * 5)}
    result = merge(Breadcrumbs(0.3, 0.2, 1.0), base, {"a": expert})["w"]
    assert result.tolist() == [0, 0, 0, 0, 0, -6, 7, -8, 0, 0]


def test_della_keeps_the_large_ones_more_often() -> None:
    kept = DELLA(0.3, 0.2).keep_probability(torch.tensor([[0.1, -3.0, 2.0], [5.0, 4.0, -6.0]]))
    assert kept.flatten().tolist() == pytest.approx([0.6, 0.8, 0.7, 0.7, 0.6, 0.8])
    assert DELLA(0.3, 0.2).keep_probability(torch.tensor(2.0)).item() == pytest.approx(0.7)


# -- the sphere --------------------------------------------------------------------------------------------------------


def test_slerp_ends_and_length() -> None:
    _, experts = make_values(2, 0.2)
    close(merge(SLERP(0.0), None, named(experts)), experts[0])
    close(merge(SLERP(1.0), None, named(experts)), experts[1])
    units = [{n: t / t.norm() for n, t in expert.items()} for expert in experts]
    for t in (0.2, 0.5):
        for name, value in merge(SLERP(t), None, named(units)).items():
            cosine, part = (units[0][name] * units[1][name]).sum(), (units[0][name] * value).sum()
            if abs(cosine) < 1 - 1e-9:  # or else there is no angle: scalars
                assert value.norm().item() == pytest.approx(1, abs=1e-9)
                assert part.clamp(-1, 1).arccos().item() == pytest.approx(t * cosine.arccos().item(), abs=1e-7)


def test_slerp_where_there_is_no_angle() -> None:
    line = torch.tensor([1.0, 2.0])
    for other in (2 * line, -line, 0 * line):
        result = merge(SLERP(0.25), None, named([{"w": line}, {"w": other}]))["w"]
        assert torch.allclose(result, 0.75 * line + 0.25 * other)


def test_karcher_mean_is_where_the_tangents_cancel_out() -> None:
    importance = {"a": 1.0, "b": 2.0, "c": 4.0}
    _, experts = make_values(3, 0.1)
    for name, value in merge(KarcherMean(importance=importance), None, named(experts)).items():
        lengths = torch.stack([expert[name].norm() for expert in experts])
        weights = torch.tensor([1.0, 2, 4], dtype=torch.float64) / 7
        if not SHAPES[name] or SHAPES[name] == (1,):
            continue
        assert value.norm().item() == pytest.approx((weights @ lengths).item(), rel=1e-9)
        direction, total = value / value.norm(), torch.zeros_like(value)
        for expert, weight in zip(experts, weights):
            unit = expert[name] / expert[name].norm()
            cosine = (unit * direction).sum()
            total += weight * cosine.arccos() / cosine.arccos().sin() * (unit - cosine * direction)
        assert total.norm().item() < 1e-7


def test_karcher_mean_of_two_is_slerp() -> None:
    _, experts = make_values(2, 0.1)
    units = [{n: t / t.norm() for n, t in expert.items() if t.numel() > 1} for expert in experts]
    close(merge(KarcherMean(), None, named(units)), merge(SLERP(), None, named(units)), 1e-7)


def test_karcher_mean_where_directions_cancel_out_or_lack() -> None:
    line = torch.tensor([3.0, 4.0])
    opposite = merge(KarcherMean(), None, named([{"w": line}, {"w": -line}]))["w"]
    assert opposite.norm().item() == pytest.approx(5)
    assert torch.allclose(merge(KarcherMean(), None, named([{"w": line}, {"w": 0 * line}]))["w"], line / 2)
    assert torch.equal(merge(KarcherMean(), None, named([{"w": 0 * line}] * 2))["w"], 0 * line)


def test_inner_products() -> None:
    _, experts = make_values(3)
    job = make_job(KarcherMean(), None, named(experts))
    parameter = next(p for p in shared_parameters(job, dict.fromkeys("abc", 1 / 3)) if p.name == "conv")
    flat = torch.stack([expert["conv"].flatten() for expert in experts])
    assert torch.allclose(inner_products(parameter), flat @ flat.T)


# -- singular vectors --------------------------------------------------------------------------------------------------


def change(rule: MergingMethod, count: int = 3, name: str = "matrix") -> tuple[Tensor, list[Tensor]]:
    """The merged task matrix, and those of the experts."""
    base, experts = make_values(count)
    result = merge(rule, base, named(experts))
    return result[name] - base[name], [expert[name] - base[name] for expert in experts]


def test_tsvm_keeps_singular_values_of_all_tasks() -> None:
    merged, vectors = change(TSVM())
    expected = torch.cat([torch.linalg.svdvals(vector)[:2] for vector in vectors]).sort(descending=True).values
    assert relative(torch.linalg.svdvals(merged), expected) < 1e-9


def test_tsvm_of_tasks_that_do_not_interfere_is_their_sum() -> None:
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(8, 6, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    parts = [left[:, i : i + 2] @ torch.diag(torch.tensor([2.0, 1.0]).double()) @ right[i : i + 2] for i in (0, 2, 4)]
    result = merge(TSVM(), {"w": torch.zeros(8, 6).double()}, named([{"w": part} for part in parts]))["w"]
    assert relative(result, torch.stack(parts).sum(0)) < 1e-9


def test_tsvm_of_identical_experts_is_their_leading_part() -> None:
    base, (expert, *_) = make_values()
    left, values, right = torch.linalg.svd(expert["matrix"] - base["matrix"], full_matrices=False)
    result = merge(TSVM(), base, named([expert] * 3))["matrix"] - base["matrix"]
    assert relative(result, left[:, :2] @ torch.diag(values[:2]) @ right[:2]) < 1e-9


def test_tsvm_of_low_rank() -> None:
    """As it would be without the directions that no expert has."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.linalg.qr(torch.randn(n, 4, generator=generator).double()).Q for n in (20, 12))
    small = [
        torch.randn(4, 2, generator=generator).double() @ torch.randn(2, 4, generator=generator).double() for _ in "ab"
    ]
    base = {"w": torch.zeros(20, 12).double()}
    large = merge(TSVM(), base, named([{"w": left @ s @ right.T} for s in small]))["w"]
    assert (
        relative(
            left.T @ large @ right,
            merge(TSVM(), {"w": torch.zeros(4, 4).double()}, named([{"w": s} for s in small]))["w"],
        )
        < 1e-9
    )
    assert not merge(TSVM(), base, named([base, base]))["w"].any()


def test_tsvm_with_more_tasks_than_singular_values_averages() -> None:
    base, experts = make_values(5)
    result = merge(TSVM(), base, named(experts))
    assert relative(result["wide"], torch.stack([expert["wide"] for expert in experts]).mean(0)) < 1e-9


@pytest.mark.parametrize("rule", [IsoC(), IsoCTS(common=0.5), IsoCTS(common=0.0), IsoCTS(common=1.0)])
@pytest.mark.parametrize("count", [1, 3, 7])
@pytest.mark.parametrize("name", ["matrix", "wide"])
def test_isotropic_merges_have_one_singular_value(rule: MergingMethod, count: int, name: str) -> None:
    merged, vectors = change(rule, count, name)
    values = torch.linalg.svdvals(merged)
    assert relative(values, values.mean().expand_as(values)) < 1e-9
    if isinstance(rule, IsoC) or rule.common == 1:  # type: ignore[attr-defined]
        total = sum(vectors)
        assert isinstance(total, Tensor)
        assert values.mean().item() == pytest.approx(torch.linalg.svdvals(total).mean().item())


def test_what_is_no_matrix_is_averaged() -> None:
    base, experts = make_values()
    mean = {n: sum(expert[n] for expert in experts) / 3 for n in SHAPES if len(SHAPES[n]) != 2}
    for rule in (TSVM(), IsoC(), IsoCTS(), WUDI(1)):
        close(merge(rule, base, named(experts)), mean)  # type: ignore[arg-type]
    close(merge(TSVM(0.5), base, named(experts)), {n: (base[n] + value) / 2 for n, value in mean.items()})


# -- WUDI --------------------------------------------------------------------------------------------------------------


def interference(merged: Tensor, vectors: list[Tensor]) -> float:
    return sum(float(((merged - v) @ v.T).square().sum() / v.square().sum()) for v in vectors)


def test_wudi_lowers_the_interference() -> None:
    base, experts = make_values()
    vectors = [expert["matrix"] - base["matrix"] for expert in experts]
    losses = []
    for steps in (1, 30, 300, 3000):
        result = merge(WUDI(steps, 1e-4), base, named(experts))["matrix"] - base["matrix"]
        losses.append(interference(result, vectors))
    assert losses == sorted(losses, reverse=True)
    # The least squares have a closed form.
    gram = sum(v.T @ v / v.square().sum() for v in vectors)
    right = sum(v @ v.T @ v / v.square().sum() for v in vectors)
    assert isinstance(gram, Tensor)
    least = interference(torch.linalg.solve(gram, right, left=False), vectors)
    assert least <= losses[-1] < 1.001 * least + 1e-9


def test_wudi_of_an_expert_that_has_learned_nothing() -> None:
    base, (expert, *_) = make_values()
    close(merge(WUDI(5), base, named([expert, dict(base)])), {"matrix": expert["matrix"]})


# -- two rules in one --------------------------------------------------------------------------------------------------


def test_combined_takes_each_rule_for_its_own() -> None:
    base, experts = make_values()
    matrices, rest = merge(TIES(1.0), base, named(experts)), merge(TaskArithmetic(0.7), base, named(experts))
    result = merge(Combined(TIES(1.0), TaskArithmetic(0.7)), base, named(experts))
    for name, shape in SHAPES.items():
        assert torch.equal(result[name], (matrices if len(shape) > 1 else rest)[name])


def test_combined_leaves_embedding_tables_to_the_rest() -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.head = nn.Linear(3, 5, bias=False)
            self.table = nn.Embedding(5, 3)
            self.mix = nn.Linear(3, 3)
            self.head.weight = self.table.weight

    experts = [Tied(seed).requires_grad_(False) for seed in (1, 2)]
    merged: dict[str, Tensor] = {n: nn.Parameter(t.clone()) for n, t in experts[0].named_parameters()}
    merged["table.weight"] = merged["head.weight"]
    base = {name: torch.zeros_like(value) for name, value in merged.items()}
    rule = Combined(TaskArithmetic(1.0), TaskArithmetic(0.0))
    rule.merge(MergeJob([Task(t, e, []) for t, e in zip("ab", experts)], merged, Context(), base))
    assert not merged["table.weight"].any()
    assert torch.allclose(merged["mix.weight"], experts[0].mix.weight + experts[1].mix.weight)


def test_combined_rules_have_an_importance_each() -> None:
    base, experts = make_values(2)
    rule = Combined(Average(importance={"a": 1, "b": 0}), Average(importance={"a": 0, "b": 1}))
    result = merge(rule, base, named(experts))
    close(result, {n: experts[len(SHAPES[n]) < 2][n] for n in SHAPES})


@every_rule
def test_nothing_is_computed_in_less_than_float32(rule: MergingMethod) -> None:
    """Whatever a user has set for the sake of forwards: reduced products, autocast."""
    base, experts = make_values(few(rule), dtype=torch.float32)
    expected = merge(rule, base, named(experts))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            result = merge(rule, base, named(experts))
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
