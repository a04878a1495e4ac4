"""What Fisher merging, LOT Merging and AdaMerging promise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning import (
    LOT,
    AdaMerging,
    Fisher,
    RegMean,
    TaskArithmetic,
)
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import NonFiniteError, Task
from com_lightning.methods import MergeJob
from com_lightning.methods.adamerging import CoefficientRecord, entropy
from tests.helpers import relative
from tests.helpers.gradients import Values, averages, close, loss, made, run, state, tasks_of

# -- Fisher ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", [None, {"a": 3.0, "b": 1.0}])
def test_fisher_weighs_by_squares_of_single_gradients(importance: Any) -> None:
    """By hand: the loss ½ (w x − y)² has the gradient (w x − y) x."""

    class Line(nn.Module):
        def __init__(self, weight: list[float]) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(weight, dtype=torch.float64), requires_grad=False)

    weights = [[1.0, -2.0], [0.5, 3.0]]
    data = [[([1.0, 2.0], 1.0), ([0.0, 1.0], 2.0)], [([2.0, 1.0], 0.0), ([1.0, 0.0], 1.0), ([0.0, 3.0], 1.0)]]
    tasks = []
    for name, weight, own in zip("ab", weights, data):
        batches = [(torch.tensor(x, dtype=torch.float64), y) for x, y in own]
        task = Task(name, Line(weight), batches)
        task.loss = lambda module, batch, index: 0.5 * (module.w @ batch[0] - batch[1]).square()
        tasks.append(task)
    merged, _, _ = run(Fisher(importance, floor=0.0), tasks)
    above, below = torch.zeros(2).double(), torch.zeros(2).double()
    for weight, own, say in zip(weights, data, (importance or {"a": 1.0, "b": 1.0}).values()):
        for x, y in own:
            residual = weight[0] * x[0] + weight[1] * x[1] - y
            square = torch.tensor([(residual * x[0]) ** 2, (residual * x[1]) ** 2]).double() / len(own)
            above += say * square * torch.tensor(weight).double()
            below += say * square
    assert relative(merged["w"], above / below) < 1e-12


def test_identical_experts_come_back_from_fisher_and_from_lot() -> None:
    base, (expert, _) = made()
    for method in (Fisher(), Fisher(normalize=True), LOT(ridge=1e-13)):
        merged, _, _ = run(method, tasks_of([expert, expert], 30), base)
        close(merged, state(expert), 1e-9)


def test_a_factor_of_all_losses_cancels() -> None:
    _, experts = made()
    one, _, _ = run(Fisher(), tasks_of(experts))
    for scale in (1e-4, 1e3):
        close(run(Fisher(), tasks_of(experts, scale=scale))[0], one)


def test_normalized_fishers_do_not_depend_on_one_tasks_scale() -> None:
    _, experts = made()
    tasks, louder = tasks_of(experts), tasks_of(experts)
    louder[1].loss = lambda module, batch, index: 100 * loss(module, batch, index)
    close(run(Fisher(normalize=True, floor=0), tasks)[0], run(Fisher(normalize=True, floor=0), louder)[0])
    gap = relative(run(Fisher(), tasks)[0]["first.weight"], run(Fisher(), louder)[0]["first.weight"])
    assert gap > 1e-2


@pytest.mark.parametrize("floor", [0.0, 1e-6])
def test_without_gradients_it_is_the_average(floor: float) -> None:
    _, experts = made()
    tasks = tasks_of(experts)
    for task in tasks:
        task.loss = lambda module, batch, index: module.last.bias.sum() * 0  # type: ignore[union-attr,operator]
    close(run(Fisher(floor=floor), tasks)[0], averages(experts, [0.5, 0.5]))
    for task in tasks:  # of one parameter alone
        task.loss = lambda module, batch, index: module.last.bias.square().sum()  # type: ignore[union-attr,operator]
    merged, _, _ = run(Fisher(floor=floor), tasks)
    close({"first.weight": merged["first.weight"]}, {"first.weight": averages(experts, [0.5, 0.5])["first.weight"]})
    assert relative(merged["last.bias"], averages(experts, [0.5, 0.5])["last.bias"]) > 1e-3


def test_importance_0_leaves_a_task_out_of_fisher_and_adamerging() -> None:
    base, experts = made(3)
    importance = {"a": 1.0, "b": 1.0, "c": 0.0}
    close(run(Fisher(importance), tasks_of(experts))[0], run(Fisher(), tasks_of(experts[:2]))[0])
    one, two = AdaMerging(5, importance=importance), AdaMerging(5)
    close(run(one, tasks_of(experts), base)[0], run(two, tasks_of(experts[:2]), base)[0])


def test_batches_count_as_their_samples() -> None:
    """The mean gradient of equal samples is that of each."""
    _, experts = made()
    single = tasks_of(experts, 3)
    for task in single:
        task.batches = [batch for batch in task.batches for _ in range(4)]
    double = tasks_of(experts, 3)
    for task in double:
        task.batches = [(x.repeat(4, 1), y.repeat(4)) for x, y in task.batches]
    one, four = run(Fisher(), single)[0], run(Fisher(), double)[0]
    # B ḡ² a sample overstates gradients that agree, by B: the same factor everywhere here, which cancels.
    close(four, one, 1e-9)


def test_nothing_of_the_experts_changes() -> None:
    base, experts = made()
    before = [copy.deepcopy(expert.state_dict()) for expert in experts]
    for method in (Fisher(), AdaMerging(3), LOT()):
        run(method, tasks_of(experts), base)
    for expert, values in zip(experts, before):
        assert all(torch.equal(value, values[name]) for name, value in expert.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in expert.parameters())


def test_bad_batches_are_named_or_left_out() -> None:
    base, experts = made()
    tasks = tasks_of(experts)
    broken = tasks_of(experts)
    broken[1].batches = [*broken[1].batches, (torch.full((1, 4), torch.nan).double(), torch.tensor([0]))]
    with pytest.raises(NonFiniteError, match="task 'b', batch 12"):
        run(Fisher(), broken)
    with pytest.raises(NonFiniteError, match="task 'b', batch 12"):
        run(AdaMerging(13), broken, base)
    merged = averages(experts, [0.5, 0.5])
    how = Context(on_bad_batch="skip")
    Fisher().merge(MergeJob(broken, merged, how))
    close(merged, run(Fisher(), tasks)[0])
    assert [(batch.task, batch.batch) for batch in how.skipped] == [("b", 12)]


def test_tied_parameters_buffers_and_sparse_gradients() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = (
                nn.Embedding(7, 4, sparse=True),
                nn.BatchNorm1d(4),
                nn.Linear(4, 7, False),
            )
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.table(x).mean(1)))  # type: ignore[no-any-return]

    base, experts = made(make=Tied)
    for number, expert in enumerate(experts):
        expert.norm.running_mean += number + 1  # type: ignore[union-attr,operator]
    data = [(torch.tensor([[0, 1, n]]), torch.tensor([n])) for n in range(4)]
    tasks = [Task("ab"[n], expert, data) for n, expert in enumerate(experts)]
    for task in tasks:
        task.loss, task.predict = loss, lambda module, batch, index: module(batch[0])
    for method in (Fisher(), AdaMerging(3)):
        merged = averages(experts, [0.5, 0.5])
        merged["head.weight"] = merged["table.weight"]
        records = method.merge(MergeJob(tasks, merged, Context(), {**state(base)}))
        assert [record.name for record in records] == ["table.weight", "norm.weight", "norm.bias"]
        assert merged["head.weight"] is merged["table.weight"]
        assert torch.equal(merged["norm.running_mean"], averages(experts, [0.5, 0.5])["norm.running_mean"])
        assert relative(merged["table.weight"], averages(experts, [0.5, 0.5])["table.weight"]) > 1e-3


# -- LOT ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [3, 40])
def test_lot_is_the_papers_formula(rows: int) -> None:
    """Also where fewer rows than inputs leave directions that the pseudo-inverse keeps as in the base."""
    base, experts = made(make=lambda: nn.Sequential(nn.Linear(9, 5)))
    inputs = [torch.randn(rows, 9, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    merged, _, _ = run(LOT(ridge=1e-11), [Task("ab"[n], e, [inputs[n]]) for n, e in enumerate(experts)], base)
    taus = [(expert[0].weight - base[0].weight).T for expert in experts]  # type: ignore[index]
    grams = [x.T @ x for x in inputs]
    tau = torch.linalg.pinv(grams[0] + grams[1], rtol=1e-9) @ (grams[0] @ taus[0] + grams[1] @ taus[1])
    assert relative(merged["0.weight"], base[0].weight + tau.T) < 1e-5  # type: ignore[index]
    assert relative(merged["0.bias"], (experts[0][0].bias + experts[1][0].bias) / 2) < 1e-12  # type: ignore[index]
    if rows > 9:  # the regression of RegMean, but for the bias
        for module in (base, *experts):
            module[0].bias.zero_()  # type: ignore[index]
        without = [nn.Sequential(nn.Linear(9, 5, bias=False)).double() for _ in experts]
        for module, expert in zip(without, experts):
            module[0].weight = expert[0].weight  # type: ignore[index]
        other, _, _ = run(RegMean(ridge=1e-13), [Task("ab"[n], e, [inputs[n]]) for n, e in enumerate(without)])
        assert relative(merged["0.weight"], other["0.weight"]) < 1e-6


def test_lot_of_scales_and_biases() -> None:
    base, experts = made(make=lambda: nn.Sequential(nn.LayerNorm(5)))
    inputs = [torch.randn(20, 5, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    merged, _, _ = run(LOT(ridge=0.0), [Task("ab"[n], e, [inputs[n]]) for n, e in enumerate(experts)], base)
    squares = [F.layer_norm(x, (5,)).square().sum(0) for x in inputs]
    taus = [expert[0].weight - base[0].weight for expert in experts]  # type: ignore[index]
    scale = base[0].weight + sum(s * t for s, t in zip(squares, taus)) / sum(squares)  # type: ignore[index]
    assert relative(merged["0.weight"], scale) < 1e-9
    assert relative(merged["0.bias"], (experts[0][0].bias + experts[1][0].bias) / 2) < 1e-12  # type: ignore[index]


def test_lot_takes_attention_and_functions_apart_in_the_base_too() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.MultiheadAttention(6, 2, batch_first=True)
            self.raw = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.mix(x, x, x)[0], self.raw)

    base, experts = made(make=Attention)
    data = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(0)).double()
    merged, records, _ = run(LOT(ridge=1e-13), [Task(n, experts[0], [data]) for n in "ab"], base)
    close(merged, state(experts[0]), 1e-6)
    assert {name for r in records for name in r.parameters} >= {"mix.in_proj_weight", "raw"}
    # A ridge so large that nothing else counts: matrices are the base's, biases the average.
    merged, _, _ = run(LOT(ridge=1e12), [Task("ab"[n], e, [data]) for n, e in enumerate(experts)], base)
    for name in ("mix.in_proj_weight", "raw"):
        assert relative(merged[name], state(base)[name]) < 1e-6


def test_what_no_data_reach_is_averaged_by_lot() -> None:
    base, experts = made(make=lambda: nn.Sequential(nn.Embedding(5, 3)))
    tasks = [Task("ab"[n], expert, [torch.tensor([[0, 1, n]])]) for n, expert in enumerate(experts)]
    merged, _, _ = run(LOT(), tasks, base)
    assert relative(merged["0.weight"][2:], averages(experts, [0.5, 0.5])["0.weight"][2:]) < 1e-12


# -- AdaMerging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.3, 0.7])
def test_adamerging_starts_as_task_arithmetic(start: float) -> None:
    base, experts = made(3)
    close(
        run(AdaMerging(0, start=start), tasks_of(experts), base)[0],
        run(TaskArithmetic(start), tasks_of(experts), base)[0],
    )


def entropies(merged: Values, tasks: list[Task]) -> float:
    total = 0.0
    for task in tasks:
        module = copy.deepcopy(task.expert)
        module.load_state_dict(dict(merged))
        total += sum(float(entropy(module(batch[0]))) for batch in task.batches) / len(task.batches)
    return total


@pytest.mark.parametrize("plus_plus", [False, True])
def test_adamerging_lowers_the_entropy(plus_plus: bool) -> None:
    base, experts = made()
    tasks = tasks_of(experts, 4, 8)
    found = []
    for steps in (0, 20, 80):
        merged, records, _ = run(AdaMerging(steps, 1e-2, plus_plus=plus_plus, density=0.5), tasks, base)
        found.append(entropies(merged, tasks))
        for record in records:
            assert isinstance(record, CoefficientRecord)
            assert record.coefficients
            assert all(0 <= value <= 1 for value in record.coefficients.values())
            assert steps or set(record.coefficients.values()) == {0.3}
    assert found[0] > found[1] > found[2]


def test_the_first_step_goes_against_the_slope_of_each_coefficient() -> None:
    """Adam's first step is the learning rate times the sign of the slope, which differences tell."""
    base, experts = made()
    tasks = tasks_of(experts, 1, 16)
    vectors = [{n: t - state(base)[n] for n, t in state(expert).items()} for expert in experts]

    def value(name: str, number: int, change: float) -> float:
        merged = {n: t + 0.3 * (vectors[0][n] + vectors[1][n]) for n, t in state(base).items()}
        merged[name] = merged[name] + change * vectors[number][name]
        return entropies(merged, tasks)

    _, records, _ = run(AdaMerging(1, 1e-3), tasks, base)
    for record in records:
        assert isinstance(record, CoefficientRecord)
        assert record.coefficients
        for number, task in enumerate("ab"):
            slope = value(record.name, number, 1e-4) - value(record.name, number, -1e-4)
            assert record.coefficients[task] == pytest.approx(0.3 - (1e-3 if slope > 0 else -1e-3), abs=1e-6)


def test_adamerging_depends_on_its_seed_alone() -> None:
    base, experts = made()
    results = []
    for seed in (0, 0, 1):
        torch.rand(3)
        results.append(run(AdaMerging(7, seed=seed), tasks_of(experts), base)[0])
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())
    assert not torch.equal(results[0]["first.weight"], results[2]["first.weight"])


def test_plus_plus_keeps_what_ties_keeps() -> None:
    base, experts = made(1)
    one, _, _ = run(AdaMerging(0, start=1.0, plus_plus=True, density=1.0), tasks_of(experts), base)
    close(one, state(experts[0]))
    few, _, _ = run(AdaMerging(0, start=1.0, plus_plus=True, density=0.2), tasks_of(experts), base)
    changed = sum(int((few[name] != value).sum()) for name, value in state(base).items())
    assert changed == pytest.approx(0.2 * sum(value.numel() for value in state(base).values()), abs=1)
