"""Importance that follows how much each task has suffered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from com_lightning import ChainOfMerges
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.fit import balanced
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.solve.statistics import DriftNorms
from com_lightning.core.sweep.task import LayerRecord, Task
from tests.helpers import perturb


def _shift(squared: float) -> DriftNorms:
    return DriftNorms(distance=squared, energy=1.0, rows=1)


def test_what_has_drifted_more_counts_more() -> None:
    shares = balanced([0.25, 0.25, 0.5], [_shift(0.0), _shift(0.3), _shift(0.3)])
    assert sum(shares) == pytest.approx(1)
    assert 0.09 < shares[0] < 0.25  # what has not drifted still counts
    assert shares[2] == pytest.approx(2 * shares[1])  # beside the importance that was given
    assert balanced([0.25, 0.75], [_shift(0.0), _shift(0.0)]) == [0.25, 0.75]
    assert balanced([0.25, 0.75], [DriftNorms(), DriftNorms()]) == [0.25, 0.75]
    assert balanced([0.25, 0.75], [_shift(float("nan")), _shift(0.1)]) == [0.25, 0.75]


def _tasks(scales: tuple[float, ...], seed: int = 0) -> list[Task]:
    """Experts so far from their base, each with inputs in a subspace of its own."""
    torch.manual_seed(seed)
    base = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(24, 24), nn.GELU())])
    experts = [perturb(copy.deepcopy(base), scale, seed=100 * seed + n) for n, scale in enumerate(scales)]
    inputs = [torch.randn(64, 12) @ torch.randn(12, 24) / 12**0.5 for _ in experts]
    return [Task(f"task{n}", expert.requires_grad_(False), [x]) for n, (expert, x) in enumerate(zip(experts, inputs))]


def _merged(tasks: list[Task], balance: bool) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    states = [dict(task.expert.named_parameters()) for task in tasks]
    merged: dict[str, Tensor] = {
        name: nn.Parameter(torch.stack([state[name] for state in states]).mean(0), False) for name in states[0]
    }
    return merged, merge_layers(tasks, merged, [1 / len(tasks)] * len(tasks), ChainOptions(balance=balance))


def _errors(tasks: list[Task], merged: dict[str, Tensor]) -> list[float]:
    result = []
    for task in tasks:
        outputs = torch.func.functional_call(task.expert, merged, task.batches[0])
        expert = task.expert(task.batches[0])
        result.append(float((outputs - expert).norm() / expert.norm()))
    return result


@pytest.mark.parametrize("seed", range(3))
def test_the_worst_is_raised(seed: int) -> None:
    tasks = _tasks((0.1, 0.1, 0.3), seed)
    merged, plain = _merged(tasks, False)
    before = _errors(tasks, merged)
    merged, records = _merged(tasks, True)
    after = _errors(tasks, merged)
    assert before.index(max(before)) == 2
    assert max(after) < max(before)
    assert sum(after) < 1.2 * sum(before)
    assert not any(record.importance for record in plain)
    assert records[0].importance["task2"] == pytest.approx(1 / 3)  # nothing has drifted yet
    assert records[-1].importance["task2"] > 0.36


def test_identical_experts_give_the_expert_back() -> None:
    tasks = _tasks((0.0, 0.0))
    merged, _ = _merged(tasks, True)
    for name, tensor in tasks[0].expert.named_parameters():
        assert torch.allclose(merged[name], tensor, atol=1e-5)


def test_it_needs_the_experts_inputs() -> None:
    told = ChainOfMerges(target="merged", balance=True).problems(["a", "b"])
    assert told == ["balance: needs target='expert', which measures how far the inputs of a layer have drifted"]
    assert not ChainOfMerges(balance=True).problems(["a", "b"])
