"""What FeatCal promises. Its numbers are compared with the authors' in test_references.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning import (
    DARE,
    TIES,
    Average,
    Combined,
    FeatCal,
    MergingMethod,
    Refitted,
    RegMean,
    TaskArithmetic,
)
from com_lightning.core.sweep.task import Task
from tests.helpers import relative
from tests.helpers.gradients import close, made, run, state, tasks_of


def extrapolated(merged: dict[str, Tensor], base: nn.Module, factor: float) -> dict[str, Tensor]:
    return {name: state(base)[name] + factor * (value - state(base)[name]) for name, value in merged.items()}


def test_identical_experts_come_back() -> None:
    base, (expert, _) = made()
    merged, _, _ = run(FeatCal(TaskArithmetic(0.5), extrapolation=1.0), tasks_of([expert, expert], 30), base)
    close(merged, state(expert), 1e-9)


@pytest.mark.parametrize("method", [TaskArithmetic(), TIES(0.5), Average()])
def test_a_large_ridge_gives_the_anchor(method: MergingMethod) -> None:
    base, experts = made()
    start, _, _ = run(method, tasks_of(experts), base)
    for factor in (1.0, 2.2):
        merged, _, _ = run(FeatCal(method, 1e12, extrapolation=factor), tasks_of(experts), base)
        close(merged, extrapolated(start, base, factor), 1e-9)


def test_the_experts_share_brings_outputs_closer() -> None:
    """A single expert's output comes back from ``α = 1``, also where the calibrated inputs have drifted."""
    base, (expert, _) = made(make=lambda: nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2)))
    data = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()

    def error(share: float) -> float:
        rule = FeatCal(ridge=0.3, expert_share=share)
        merged, _, _ = run(rule, [Task("a", copy.deepcopy(expert), [data])], base)
        network = copy.deepcopy(expert)
        network.load_state_dict(merged)
        return relative(network(data), expert(data))

    assert error(1.0) < error(0.5) < error(0.0)


def test_the_size_of_a_tasks_inputs_does_not_count() -> None:
    """Gram matrices are divided by their norms, so a linear layer is the same if one task's inputs are larger."""
    base, experts = made(make=lambda: nn.Sequential(nn.Linear(4, 3, bias=False)))
    data = [torch.randn(9, 4, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    results = [
        run(FeatCal(), [Task("a", experts[0], [data[0]]), Task("b", experts[1], [factor * data[1]])], base)[0]
        for factor in (1.0, 100.0)
    ]
    close(results[0], results[1])


def test_importance_0_leaves_a_task_out() -> None:
    base, experts = made(3)
    some = FeatCal(TaskArithmetic(importance={"a": 1.0, "b": 1.0, "c": 0.0}), ridge=0.05 * 3 / 2)
    # The sum over tasks is relative to the mean importance, so with three tasks each of two counts 3 / 2.
    close(run(some, tasks_of(experts), base)[0], run(FeatCal(), tasks_of(experts[:2]), base)[0], 1e-9)


def test_what_is_not_calibrated_stays_as_the_other_rule_merges_it() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale, self.used = nn.Embedding(5, 4), nn.Parameter(torch.rand(4)), nn.Linear(4, 3)
            self.unused = nn.Linear(4, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.used(torch.tanh(self.table(ids) + self.scale.sin()))  # type: ignore[no-any-return]

    base, experts = made(make=Tokens)
    tasks = [Task("ab"[n], expert, [torch.tensor([[0, 1, 2 + n]])]) for n, expert in enumerate(experts)]
    start, _, _ = run(TaskArithmetic(), tasks, base)
    merged, records, _ = run(FeatCal(), tasks, base)
    for name, value in merged.items():
        assert (relative(value, start[name]) < 1e-12) == (not name.startswith("used")), name
    notes = {record.name: record.note for record in records if record.note}
    assert notes["table"] == "FeatCal leaves embedding tables as TaskArithmetic merges them"


def test_running_variances_are_not_extrapolated() -> None:
    base, experts = made(
        make=lambda: nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 1))
    )
    for expert in experts:  # 2.2 times the way from 1 to 0.01 is negative
        expert[1].running_var.fill_(0.01)  # type: ignore[index]
    data = [torch.randn(20, 2, 6, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    merged, records, _ = run(FeatCal(), [Task("ab"[n], e, [data[n]]) for n, e in enumerate(experts)], base)
    assert all(bool(value.isfinite().all()) for value in merged.values())
    assert bool((merged["1.running_var"] > 0).all())
    assert {name for record in records if record.condition for name in record.parameters} == {
        name for name, _ in base.named_parameters()
    }


BAD: list[tuple[Any, str]] = [
    (FeatCal(TaskArithmetic(float("nan"))), "method: scale: must be a finite number"),
    (FeatCal(RegMean()), "method: RegMean merges whole layers"),
    (FeatCal(Refitted(TIES())), "method: Refitted merges whole layers"),
    (FeatCal(FeatCal()), "method: FeatCal merges whole layers"),
    (FeatCal(ridge=0.0), "ridge: must be above 0, and finite, got 0.0"),
    (FeatCal(expert_share=1.1), "expert_share: must be between 0 and 1, got 1.1"),
    (FeatCal(extrapolation=float("inf")), "extrapolation: must be finite"),
    (Combined(FeatCal(), Average()), "matrices: FeatCal merges the model as a whole"),
]


@pytest.mark.parametrize(("rule", "message"), BAD)
def test_bad_settings(rule: MergingMethod, message: str) -> None:
    assert any(message in problem for problem in rule.problems(["a", "b"]))


def test_settings() -> None:
    assert not FeatCal().problems(["a", "b"])
    assert not FeatCal(Combined(TIES(), Average())).problems(["a", "b"])
    assert not Refitted(FeatCal()).problems(["a", "b"])
    assert FeatCal(DARE(0.5)).needs == {"data", "base"}
    assert FeatCal().describe() != FeatCal(TIES()).describe()
