"""Ranks of corrections within a budget."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.ranks import spread, with_ranks
from com_lightning.core.chain.task_tensors import task_tensors
from com_lightning.core.solve.task_adapters import low_rank_corrections, rank_gains
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import average
from tests.helpers import built


def test_no_other_spread_gains_more() -> None:
    gains = {"a": [9.0, 4.0, 1.0], "b": [6.0, 5.0, 0.5], "c": [2.0, 0.1, 0.0]}
    costs = dict.fromkeys(gains, 3)
    for budget in range(0, 28, 3):
        chosen = spread(gains, costs, budget)
        assert sum(3 * rank for rank in chosen.values()) <= budget
        others = [ranks for ranks in product(range(4), repeat=3) if 3 * sum(ranks) <= budget]
        best = max(sum(sum(each[:rank]) for each, rank in zip(gains.values(), ranks)) for ranks in others)
        assert sum(sum(gains[name][:rank]) for name, rank in chosen.items()) == pytest.approx(best)


def test_a_layer_of_unknown_gain_has_the_rank_that_all_could_have() -> None:
    assert spread({"a": [1.0, 1.0, 1.0], "b": []}, {"a": 2, "b": 3}, 11) == {"a": 2, "b": 2}
    assert spread({"a": [1.0]}, {"a": 2}, -5) == {"a": 0}


@pytest.mark.parametrize("weighted", [False, True])
def test_gains_are_what_the_loss_falls_by(weighted: bool) -> None:
    torch.manual_seed(0)
    rows, weight, shared = torch.randn(50, 6).double(), torch.randn(1, 4, 6).double(), torch.randn(1, 4, 6).double()
    gram, roots = (rows.T @ rows / 50)[None], [torch.randn(4, 2).double()] if weighted else []
    metric = roots[0] @ roots[0].T + 0.3 * torch.eye(4) if weighted else torch.eye(4).double()

    def loss(rank: int) -> float:
        (correction,) = low_rank_corrections([gram], [None], [weight], shared, rank, roots, ridge=1e-12)
        left = weight[0] - shared[0] - (correction[0] if rank else 0.0)
        return float((metric @ left @ gram[0] @ left.T).trace())

    gains = rank_gains([gram], [None], [weight], shared, [2.0], roots, ridge=1e-12)
    falls = [2 * (loss(rank) - loss(rank + 1)) for rank in range(4)]
    assert gains == pytest.approx(falls, rel=1e-6)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.6])
def test_a_share_bounds_what_each_task_has(share: float) -> None:
    torch.manual_seed(0)
    experts = [expert.double() for expert in built(network)]
    tasks = [Task(f"task{n}", expert, [torch.randn(40, 6).double() + n]) for n, expert in enumerate(experts)]
    states = [dict(expert.named_parameters()) for expert in experts]
    merged = {key: nn.Parameter(average([state[key] for state in states]), False) for key in states[0]}
    before, context = {key: tensor.clone() for key, tensor in merged.items()}, Context()
    options = ChainOptions(normalize=False, sensitivity="numbers", task_share=share, private_biases=True)
    options = with_ranks(tasks, merged, [0.5, 0.5], options, context)
    assert all(torch.equal(tensor, before[key]) for key, tensor in merged.items())
    own = task_tensors(tasks, merged, weights=True)
    records = merge_layers(tasks, merged, [0.5, 0.5], options, context, task_tensors=own)
    total = sum(tensor.numel() for tensor in merged.values())
    values = sum(sum(record.of_tasks.values()) for record in records)
    assert options.ranks is not None
    if share < 0.1:
        assert not any(options.ranks.values())
        assert "give a larger share" in context.warnings[0]
        for name, tensors in own.items():
            assert merged[name].dim() == 1 or all(torch.equal(tensor, merged[name]) for tensor in tensors)
    else:
        assert 0.7 * share * total < values <= share * total
        ranks = {name: rank for name, rank in options.ranks.items() if rank}
        assert {record.name: record.rank for record in records if record.rank} == ranks
