"""The closed form against brute-force least squares in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from com_lightning.core.chain.gather import gather
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers.linear import Linear
from com_lightning.core.solve import ridge as solver
from com_lightning.core.solve.ridge import factorize, residual, solve, solve_or_average
from com_lightning.core.solve.statistics import InputMeans, InputSums, Scratch
from com_lightning.core.sweep.layer import CalibrationForward, Layer
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.task import BatchId, ForwardId, Task
from com_lightning.core.tensors.tracked import Part


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
@pytest.mark.parametrize("features", [1, 5])
def test_equals_brute_force(normalize: bool, bias: bool, two_sided: bool, multiply: bool, features: int) -> None:
    torch.manual_seed(0)
    outputs, importance = 3, [0.5, 0.3, 0.2]
    merged = [torch.randn(n, features).double() * (1 + i) for i, n in enumerate((20, 30, 11))]
    expert = [x + 0.3 * torch.randn_like(x) for x in merged] if two_sided else merged
    weights = [torch.randn(outputs, features + bias).double() for _ in merged]
    statistics = []
    for x_hat, x, weight in zip(merged, expert, weights):
        entry = InputSums(bias, normalize, multiply)
        for a, b in zip(torch.split(x_hat[:, None], 7), torch.split(x[:, None], 7)):
            entry.update(a, b if two_sided else None, weight[None])
        statistics.append(entry)
    means = [entry.to_means(w[None]) for entry, w in zip(statistics, weights)]
    grams = [entry.gram for entry in means]
    drifts = [entry.weighted_drift(w[None]) for entry, w in zip(means, weights)]
    solution = solve(factorize(grams, importance, 0.01), grams, drifts, [w[None] for w in weights], importance)
    expected = brute_force(merged, expert, weights, importance, 0.01, normalize, bias)
    torch.testing.assert_close(solution[0], expected, rtol=1e-9, atol=1e-11)


def test_a_row_that_the_merged_model_has_lost_does_not_rule_the_fit() -> None:
    torch.manual_seed(0)
    expert = torch.randn(50, 1, 4).double()
    merged = expert + 0.1 * torch.randn_like(expert)
    merged[0] *= 1e-3
    weight = torch.randn(1, 2, 4).double()
    entry = InputSums(bias=False, normalize=True)
    entry.update(merged, expert)
    means = entry.to_means(weight)
    grams = [means.gram]
    solution = solve(factorize(grams, [1.0], 0.0), grams, [means.weighted_drift(weight)], [weight], [1.0])
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
    entry = InputSums(bias=True, normalize=True)
    entry.update(rows[:, None])
    same, other = torch.randn(1, 2, 7), torch.randn(1, 2, 7)
    grams = [entry.to_means(same).gram] * 2
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
    with_empty, without = InputSums(False, True), InputSums(False, True)
    with_empty.update(torch.cat([rows, torch.zeros(2, 1, 3)]))
    without.update(rows)
    assert with_empty.gram is not None
    assert without.gram is not None
    torch.testing.assert_close(with_empty.gram, without.gram)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_statistics_are_float32_or_better(dtype: torch.dtype) -> None:
    entry = InputSums(bias=True, normalize=True)
    with torch.autocast("cpu", enabled=False):
        entry.update(torch.randn(4, 1, 3).to(dtype), torch.randn(4, 1, 3).to(dtype))
    assert entry.gram is not None
    assert entry.gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize(("size", "bias"), [(600, False), (1023, True), (511, False), (2100, True)])
def test_a_large_matrix_is_gathered_from_the_diagonal_down_and_then_completed(size: int, bias: bool) -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 40, 1, size, dtype=torch.float64)
    gathered = InputSums(bias, normalize=False)
    for number, part in enumerate(rows):
        gathered.update(part)
        if number == 1:
            gathered.complete()  # rows may come afterwards
    flat = rows.reshape(-1, size)
    flat = torch.cat([flat, torch.ones(len(flat), 1)], 1) if bias else flat
    means = gathered.to_means(torch.zeros(1, 1, size + bias))
    torch.testing.assert_close(means.gram[0], flat.T @ flat / len(flat))
    assert gathered.gram is None  # the sums have become the means, in place


def test_batches_that_are_prepared_in_one_place_do_not_disturb_each_other() -> None:
    torch.manual_seed(0)
    scratch = Scratch()
    own = [InputSums(True, True) for _ in range(2)]
    shared = [InputSums(True, True, scratch=scratch) for _ in range(2)]
    for number, rows in enumerate((7, 3, 5, 7)):
        merged, expert = torch.randn(2, rows, 1, 4)
        for entries in (own, shared):
            entries[number % 2].update(merged, expert)
    for one, other in zip(own, shared):
        torch.testing.assert_close(one.gram, other.gram, rtol=0, atol=0)
        torch.testing.assert_close(one.drift, other.drift, rtol=0, atol=0)


def test_the_shift_is_that_of_the_rows_and_keeps_its_digits_where_they_are_nearly_alike() -> None:
    torch.manual_seed(0)
    expert = torch.randn(50, 1, 8)
    expert[3] = 0.0
    for scale in (1.0, 1e-3):
        merged = expert + scale * torch.randn(50, 1, 8)
        entry = InputSums(bias=False, normalize=True)
        entry.update(merged, expert)
        ours, theirs = merged[:, 0].double(), expert[:, 0].double()
        cosine = float(torch.cosine_similarity(ours, theirs).mean())
        # one row of 50, that of nothing, has a cosine of 0
        assert 0.98 - entry.drift_norms.mean_cosine == pytest.approx(0.98 - cosine, rel=1e-3)
        assert entry.drift_norms.relative_distance == pytest.approx(
            float((ours - theirs).norm() / theirs.norm()), rel=1e-5
        )


@pytest.mark.parametrize("size", [1, 6, 1000])
def test_the_rows_of_a_table_are_solved_a_few_at_a_time(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of one input: the same as one group in which the inputs never meet."""
    monkeypatch.setattr(solver, "BLOCK_ELEMENTS", size)
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


def test_a_matrix_that_is_none_of_squares_keeps_the_average() -> None:
    """Not what gathering can give, but what rounding might: the other groups are solved as ever."""
    grams = [torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 9.0], [9.0, 1.0]]])] * 2
    weights = [torch.randn(2, 3, 2) for _ in range(2)]
    drifts: list[Tensor | None] = [torch.randn(2, 3, 2) for _ in range(2)]
    factor = factorize(grams, [0.5, 0.5], 0.0)
    found = solve_or_average(factor, grams, drifts, weights, [0.5, 0.5])
    assert found.groups_kept_average == 1
    mean = (weights[0] + weights[1]).double() / 2
    torch.testing.assert_close(found.weight[1], mean[1])
    alone = [[entry[:1] for entry in part if entry is not None] for part in (grams, drifts, weights)]
    first = solve(factorize(alone[0], [0.5, 0.5], 0.0), alone[0], alone[1], alone[2], [0.5, 0.5])
    torch.testing.assert_close(found.weight[:1], first)


def test_a_solution_that_overflows_keeps_the_average() -> None:
    grams, weights = [torch.full((1, 1, 1), 1e-300, dtype=torch.float64)], [torch.ones(1, 1, 1).double()]
    drifts: list[Tensor | None] = [torch.full((1, 1, 1), 1e300, dtype=torch.float64)]
    found = solve_or_average(factorize(grams, [1.0], 0.0), grams, drifts, weights, [1.0])
    assert (found.weight.item(), found.groups_kept_average) == (1.0, 1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("anchored", [True, False])
def test_the_residual_comes_with_the_solution(groups: int, anchored: bool) -> None:
    torch.manual_seed(0)
    importance = [0.2, 0.5, 0.3]
    rows = [torch.randn(groups, 9, 4).double() for _ in importance]
    grams, weights = [x.mT @ x for x in rows], [torch.randn(groups, 3, 4).double() for _ in importance]
    nothing: list[Tensor | None] = [None] * 3
    anchor = torch.randn(groups, 3, 4).double() if anchored else None
    found = solve_or_average(factorize(grams, importance, 0.1), grams, nothing, weights, importance, anchor, True)
    assert found.residual == pytest.approx(residual(grams, weights, found.weight, importance))
    # An average that is kept has one, too; with a matrix that needs more on its diagonal than the ridge.
    flat, alike = [torch.ones(groups, 4, 4).double() for _ in importance], [torch.ones(groups, 3, 4).double()] * 3
    again = solve_or_average(factorize(flat, importance, 0.0), flat, nothing, weights, importance, measured=True)
    assert again.residual == pytest.approx(residual(flat, weights, again.weight, importance), abs=1e-6)
    same = solve_or_average(factorize(flat, importance, 0.0), flat, nothing, alike, importance, measured=True)
    assert same.residual == pytest.approx(0.0, abs=1e-12)


# What a layer may be given, at random


@dataclass
class Case:
    """A layer's data and weights: rows of merged model and expert per task, ``(n, g, f)``, and weights."""

    merged: list[Tensor]
    expert: list[Tensor]
    weights: list[Tensor]
    importance: list[float]
    ridge: float
    normalize: bool
    bias: bool
    two_sided: bool


@st.composite
def cases(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups, features, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    bias, tasks = draw(st.booleans()), draw(st.integers(2, 3))
    kinds = ["random", "low rank", "duplicated", "dead", "constant", "zero", "one hot", "uneven", "huge feature"]
    scales, merged, expert = [1e-20, 1e-8, 1.0, 1e6, 1e18], [], []
    scale = draw(st.sampled_from(scales))
    for _ in range(tasks):
        n = draw(st.sampled_from([1, 2, 7, 20]))
        kind = draw(st.sampled_from(kinds))
        rows = torch.randn(n, groups, features)
        if kind == "low rank":
            rows = rows[..., :1] * torch.randn(features)
        elif kind == "duplicated":
            rows[..., features // 2 :] = rows[..., :1]
        elif kind == "dead":
            rows[..., 0] = 0
            rows[:, 0] = 0
        elif kind == "constant":
            rows = rows[:1].expand(n, groups, features).clone()
        elif kind == "zero":
            rows = torch.zeros_like(rows)
        elif kind == "one hot":
            rows = (rows == rows.amax(-1, keepdim=True)).float()
        elif kind == "uneven":
            rows = rows * 10.0 ** torch.arange(n)[:, None, None].clamp_max(6)
        elif kind == "huge feature":
            rows[..., 0] *= 1e6
        drift = draw(st.sampled_from([0.0, 1e-3, 0.3, 10.0]))
        merged.append(rows * scale)
        expert.append((rows + drift * torch.randn_like(rows)) * scale)
    far = draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
    base = torch.randn(groups, outputs, features + bias)
    weights = [base + far * torch.randn_like(base) for _ in range(tasks)]
    if draw(st.booleans()):
        weights[0] = weights[0] * draw(st.sampled_from([0.0, 1e-10, 1e10]))
    share = [draw(st.sampled_from([0.0, 1.0, 3.0])) for _ in range(tasks)]
    share = [s / sum(share) for s in share] if sum(share) else [1.0 / tasks] * tasks
    ridge = draw(st.sampled_from([0.0, 1e-8, 0.01, 10.0]))
    return Case(merged, expert, weights, share, ridge, draw(st.booleans()), bias, draw(st.booleans()))


class OneLayer(nn.Module):
    """A layer of independent groups, with which each task's rows are what it is called with."""

    def __init__(self, weight: Tensor, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight[..., :-1] if bias else weight)
        self.bias = nn.Parameter(weight[..., -1]) if bias else None


class Rows(Linear):
    """The rows are given as they are."""

    def rows(self, module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
        yield args[0], False

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        bias = layer.bias
        weight = layer.get_parameter("weight").detach()
        return weight if bias is None else torch.cat([weight, bias.detach()[..., None]], -1)  # type: ignore[operator]


def gathered(case: Case) -> list[InputMeans]:
    """As a chain gathers them, with what it does about squares that overflow."""
    layers = [OneLayer(w, case.bias) for w in case.weights]
    parts = {name: Part(name) for name in ("weight", "bias")}
    layer = Layer("layer", Rows(), layers[0], list(layers), parts)
    tasks = [Task(f"task{n}", expert, [None]) for n, expert in enumerate(layers)]
    calls = []
    for n, (x_hat, x) in enumerate(zip(case.merged, case.expert)):
        for stream, rows in {"merged": x_hat, "expert": x}.items():
            forward = CalibrationForward(layers[n], lambda: None, id=ForwardId(BatchId(n, 0, 0), stream))  # type: ignore[arg-type]
            calls.append(PausedCall(forward, "layer", (0,), (rows,), {}))
    options = ChainOptions("merged", "expert" if case.two_sided else "merged", case.normalize, case.ridge)
    inputs = gather(layer, calls, tasks, options)
    assert not inputs.bad
    return inputs.means(layer.weights)


def loss(case: Case, solution: Tensor) -> Tensor:
    """The objective at the top of the solver, from the rows themselves, for each group."""
    mean = sum(a * w.double() for a, w in zip(case.importance, case.weights))
    fit, diagonal = torch.zeros(len(solution), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x_hat, x, weight, share in zip(case.merged, case.expert, case.weights, case.importance):
        ours, theirs = x_hat.double(), (x if case.two_sided else x_hat).double()
        if case.bias:
            ours, theirs = (torch.cat([rows, torch.ones_like(rows[..., :1])], -1) for rows in (ours, theirs))
        norms = torch.maximum(ours.square().sum((1, 2)), theirs.square().sum((1, 2))).sqrt()[:, None, None]
        root = torch.where(norms > 0, 1 / norms, 0.0) if case.normalize else 1.0
        root = root * (share / len(ours)) ** 0.5
        outputs = torch.einsum("ngk,gok->ngo", ours * root, solution)
        targets = torch.einsum("ngk,gok->ngo", theirs * root, weight.double())
        fit = fit + (outputs - targets).square().sum((0, 2))
        diagonal = diagonal + (ours * root).square().sum(0).mean()
    return fit + case.ridge * diagonal * (solution - mean).square().sum((1, 2))


def size(case: Case) -> Tensor:
    """What the terms of the loss amount to before they cancel: that times the precision is rounding."""
    zero = torch.zeros_like(case.weights[0]).double()
    largest = [torch.stack(case.weights).abs().amax(0).double() * sign for sign in (-1, 1)]
    return torch.stack([loss(case, each) for each in (zero, *largest)]).amax(0)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(cases())
def test_whatever_a_layer_is_given_the_result_is_finite_and_no_worse_than_the_average(case: Case) -> None:
    statistics = gathered(case)
    grams = [entry.gram for entry in statistics]
    drifts = [entry.weighted_drift(w) for entry, w in zip(statistics, case.weights)]
    factor = factorize(grams, case.importance, case.ridge)
    solution = solve(factor, grams, drifts, case.weights, case.importance)
    assert bool(solution.isfinite().all())
    mean = sum(a * w.double() for a, w in zip(case.importance, case.weights))
    assert isinstance(mean, Tensor)
    assert bool((loss(case, solution) <= loss(case, mean) + 1e-9 * size(case)).all())
