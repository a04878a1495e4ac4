"""The closed form against brute-force least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from com_lightning.core import solver
from com_lightning.core.solver import factorize, residual, solve
from com_lightning.core.statistics import InputStatistics


def brute_force(
    merged: list[Tensor],
    expert: list[Tensor],
    weights: list[Tensor],
    importance: list[float],
    ridge: float,
    normalize: bool,
    bias: bool,
) -> Tensor:
    """``lstsq`` on all rows stacked, each scaled by the root of its weight, with the ridge as further rows."""
    rows, targets = [], []
    mean = sum(a * w for a, w in zip(importance, weights))
    assert isinstance(mean, Tensor)
    for x_hat, x, weight, share in zip(merged, expert, weights, importance):
        ones = [torch.ones(len(x), 1).double()] if bias else []
        inputs, teacher = torch.cat([x_hat, *ones], 1), torch.cat([x, *ones], 1)
        norms = torch.maximum(inputs.norm(dim=1, keepdim=True), teacher.norm(dim=1, keepdim=True))
        scale = (share / len(x)) ** 0.5 / (norms if normalize else 1.0)
        rows.append(inputs * scale)
        targets.append(teacher @ weight.T * scale)
    gram = sum(r.T @ r for r in rows)
    assert isinstance(gram, Tensor)
    root = (ridge * gram.diagonal().mean()).sqrt()
    identity = torch.eye(len(gram)).double()
    solved: Tensor = torch.linalg.lstsq(torch.cat([*rows, root * identity]), torch.cat([*targets, root * mean.T]))[0]
    return solved.T


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("multiply", [True, False])
def test_equals_brute_force(normalize: bool, bias: bool, two_sided: bool, multiply: bool) -> None:
    torch.manual_seed(0)
    features, outputs, importance = 5, 3, [0.5, 0.3, 0.2]
    merged = [torch.randn(n, features).double() * (1 + i) for i, n in enumerate((20, 30, 11))]
    expert = [x + 0.3 * torch.randn_like(x) for x in merged] if two_sided else merged
    weights = [torch.randn(outputs, features + bias).double() for _ in merged]
    statistics = []
    for x_hat, x, weight in zip(merged, expert, weights):
        entry = InputStatistics(bias, normalize, multiply)
        for a, b in zip(torch.split(x_hat[:, None], 7), torch.split(x[:, None], 7)):
            entry.update(a, b if two_sided else None, weight[None])
        statistics.append(entry)
    grams = [entry.mean_gram() for entry in statistics]
    drifts = [entry.mean_drift(w[None]) for entry, w in zip(statistics, weights)]
    solution = solve(factorize(grams, importance, 0.01), grams, drifts, [w[None] for w in weights], importance)
    expected = brute_force(merged, expert, weights, importance, 0.01, normalize, bias)
    torch.testing.assert_close(solution[0], expected, rtol=1e-9, atol=1e-11)


def test_a_row_that_the_merged_model_has_lost_does_not_rule_the_fit() -> None:
    torch.manual_seed(0)
    expert = torch.randn(50, 1, 4).double()
    merged = expert + 0.1 * torch.randn_like(expert)
    merged[0] *= 1e-3
    weight = torch.randn(1, 2, 4).double()
    entry = InputStatistics(bias=False, normalize=True)
    entry.update(merged, expert)
    grams = [entry.mean_gram()]
    solution = solve(factorize(grams, [1.0], 0.0), grams, [entry.mean_drift(weight)], [weight], [1.0])
    assert float((solution - weight).norm() / weight.norm()) < 0.2


def test_groups_are_solved_on_their_own() -> None:
    torch.manual_seed(0)
    rows, weights = torch.randn(40, 3, 4).double(), [torch.randn(3, 2, 4).double() for _ in range(2)]
    grams = [torch.einsum("ngf,ngh->gfh", x, x) for x in (rows, rows.flip(0) * 2)]
    together = solve(factorize(grams, [0.5, 0.5], 0.0), grams, [None, None], weights, [0.5, 0.5])
    for group in range(3):
        own = [g[group : group + 1] for g in grams]
        part = [w[group : group + 1] for w in weights]
        alone = solve(factorize(own, [0.5, 0.5], 0.0), own, [None, None], part, [0.5, 0.5])
        torch.testing.assert_close(together[group : group + 1], alone)


@pytest.mark.parametrize("ridge", [0.0, 0.01])
@pytest.mark.parametrize("rows", [torch.zeros(4, 6), torch.ones(1, 6), torch.eye(6)[:3], torch.full((9, 6), 2.0)])
def test_singular_statistics_give_a_finite_result_and_identical_experts_back(rows: Tensor, ridge: float) -> None:
    """Dead features, fewer rows than inputs, constant inputs, nothing at all."""
    entry = InputStatistics(bias=True, normalize=True)
    entry.update(rows[:, None])
    grams = [entry.mean_gram()] * 2
    same, other = torch.randn(1, 2, 7), torch.randn(1, 2, 7)
    factor = factorize(grams, [0.5, 0.5], ridge)
    torch.testing.assert_close(
        solve(factor, grams, [None, None], [same, same], [0.5, 0.5]).float(), same, rtol=1e-5, atol=1e-6
    )
    assert bool(solve(factor, grams, [None, None], [same, other], [0.5, 0.5]).isfinite().all())


def test_not_finite_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        factorize([torch.full((1, 2, 2), float("nan"))], [1.0], 0.01)


def test_an_empty_row_counts_nothing_where_rows_are_normalized() -> None:
    rows = torch.randn(5, 1, 3)
    with_empty, without = InputStatistics(False, True), InputStatistics(False, True)
    with_empty.update(torch.cat([rows, torch.zeros(2, 1, 3)]))
    without.update(rows)
    assert with_empty.gram is not None
    assert without.gram is not None
    torch.testing.assert_close(with_empty.gram, without.gram)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_statistics_are_float32_or_better(dtype: torch.dtype) -> None:
    entry = InputStatistics(bias=True, normalize=True)
    with torch.autocast("cpu", enabled=False):
        entry.update(torch.randn(4, 1, 3).to(dtype), torch.randn(4, 1, 3).to(dtype))
    assert entry.gram is not None
    assert entry.gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("size", [1, 6, 1000])
def test_the_rows_of_a_table_are_solved_a_few_at_a_time(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one input: the same as one group in which the inputs never meet."""
    monkeypatch.setattr(solver, "PART_ELEMENTS", size)
    torch.manual_seed(0)
    words, width, importance = 7, 3, [0.3, 0.7]
    counts = [torch.randint(0, 4, (words,)).double() for _ in importance]
    weights = [torch.randn(words, width).double() for _ in importance]
    drifts = [torch.randn(words, width).double() for _ in importance]
    grams, joint = [c[:, None, None] for c in counts], [c.diag()[None] for c in counts]
    ones = [w[:, :, None] for w in weights], [w.T[None] for w in weights]
    apart = solve(factorize(grams, importance, 0.01), grams, [d[:, :, None] for d in drifts], ones[0], importance)
    whole = solve(factorize(joint, importance, 0.01), joint, [d.T[None] for d in drifts], ones[1], importance)
    torch.testing.assert_close(apart[:, :, 0], whole[0].T)
    assert residual(grams, ones[0], apart, importance) == pytest.approx(residual(joint, ones[1], whole, importance))
