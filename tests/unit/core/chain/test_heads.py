"""``refit_heads`` and ``Refitted``: the layers of a task that are not shared, solved for the merged model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.heads import refit
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import named_tensors
from tests.helpers import perturb


def make_experts(noise: float = 0.5) -> list[nn.Sequential]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    experts = []
    for seed in range(2):
        expert = copy.deepcopy(base)
        expert[4] = nn.Linear(8, 3 + seed)  # a head of its own
        perturb(expert, noise, seed=seed)
        experts.append(expert.eval())
    return experts


def make_tasks(experts: list[nn.Sequential], batches: int = 4) -> list[Task]:
    generator = torch.Generator().manual_seed(9)
    return [
        Task(f"task {n}", expert, [torch.randn(32, 6, generator=generator) for _ in range(batches)])
        for n, expert in enumerate(experts)
    ]


def merged_and_refitted(experts: list[nn.Sequential], run: Context | None = None, **rule: Any) -> Any:
    tasks = make_tasks(experts)
    states = [{n: t for n, t, _ in named_tensors(expert)} for expert in experts]
    merged: dict[str, Tensor] = {n: (states[0][n] + states[1][n]).detach() / 2 for n in states[0] if "4" not in n}
    settings = ChainOptions(**{"ridge": 1e-6, "normalize": False, **rule})
    merge_layers(tasks, merged, [0.5, 0.5], settings, run)
    records, found = refit(tasks, merged, {}, settings, run or Context())
    return tasks, merged, records, found


def test_it_is_the_least_squares_solution() -> None:
    experts = make_experts()
    tasks, merged, records, found = merged_and_refitted(experts)
    assert [(record.name, record.task) for record in records] == [("4 of task 0", "task 0"), ("4 of task 1", "task 1")]
    for task, expert in zip(tasks, experts):
        student = nn.Sequential(*expert)
        x = torch.cat(list(task.batches))
        with torch.no_grad():
            target = expert(x)
            features = torch.func.functional_call(nn.Sequential(*student[:4]), dict(merged), (x,))
        rows = torch.cat([features, torch.ones(len(x), 1)], 1).double()
        best = torch.linalg.lstsq(rows, target.double()).solution.T
        mine = torch.cat([found[task.name]["4.weight"], found[task.name]["4.bias"][:, None]], 1)
        torch.testing.assert_close(mine.double(), best, rtol=1e-3, atol=1e-3)


def test_nothing_changes_where_nothing_was_lost() -> None:
    expert = make_experts()[0]
    _, _, _, found = merged_and_refitted([expert, expert])
    for name, tensor in found["task 0"].items():
        torch.testing.assert_close(tensor, expert.get_parameter(name).data, rtol=1e-4, atol=1e-5)


def test_the_experts_are_left_alone() -> None:
    experts = make_experts()
    before = [{n: t.clone() for n, t in expert.state_dict().items()} for expert in experts]
    merged_and_refitted(experts)
    for expert, state in zip(experts, before):
        torch.testing.assert_close(dict(expert.state_dict()), state, rtol=0, atol=0)


def test_skipped_batches_stay_out_and_are_told_of_once() -> None:
    experts = make_experts()
    tasks = make_tasks(experts)
    tasks[0].batches[1][0, 0] = float("nan")
    run = Context(on_bad_batch="skip")
    merged: dict[str, Tensor] = {n: t.clone() for n, t in experts[0].state_dict().items() if "4" not in n}
    merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(), run)
    records, _ = refit(tasks, merged, {}, ChainOptions(), run)
    assert len(run.skipped) == 1
    assert [record.rows for record in records] == [{"task 0": 96}, {"task 1": 128}]
