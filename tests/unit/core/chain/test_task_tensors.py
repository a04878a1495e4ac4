"""What each task has for itself, in layers that are modules and in layers that are function calls."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.task_tensors import (
    compress_differences,
    task_tensors,
    warn_of_uncorrected,
    without_copies,
)
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from tests.helpers import built, relative


class Functions(nn.Module):
    """A position table, a stack of matrices, and matrices that go into functions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 5, 6))
        self.wide, self.offset = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8))
        self.stack, self.scale = nn.Parameter(torch.randn(2, 8, 8) / 3), nn.Parameter(torch.rand(8) + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.addmm(self.offset, (x + self.table).view(-1, 6), self.wide)
        x = F.linear(x, self.stack[0]).relu() * self.scale
        return x @ self.stack[1]


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Linear(6, 8), nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.words(x)
        result: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {"functions": Functions, "attention": Attentive}
SOLVED = {
    "functions": {"wide", "offset", "stack"},
    "attention": {
        f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    }
    | {"words.weight", "words.bias"},
}


def solve(name: str, rank: int, data: bool) -> tuple[list[Task], list[nn.Module], list[LayerRecord]]:
    torch.manual_seed(0)
    experts = [expert.double().eval() for expert in built(MODELS[name])]
    tasks = [Task(f"task{n}", e, [torch.randn(8, 5, 6).double() + n for _ in range(4)]) for n, e in enumerate(experts)]
    states = [{key: tensor for key, tensor, _ in named_tensors(expert)} for expert in experts]
    merged = {key: nn.Parameter(average([state[key] for state in states]), False) for key in states[0]}
    before = {key: tensor.clone() for key, tensor in merged.items()}
    own = task_tensors(tasks, merged, weights=True)
    if data:
        options = ChainOptions(normalize=False, task_rank=rank, keeps_shared=True)
        records = merge_layers(tasks, merged, [0.5, 0.5], options, task_tensors=own)
    else:
        records = compress_differences(tasks, merged, own, rank)
    assert all(torch.equal(tensor, before[key]) for key, tensor in merged.items())
    kept = without_copies(own, records)
    assert SOLVED[name] <= kept.keys()
    modules = []
    for number, task in enumerate(tasks):
        values = {**merged, **{key: each[number] for key, each in kept.items()}}
        ids = {key: id(tensor) for key, tensor, _ in named_tensors(task.expert)}
        modules.append(copy_module(task.expert, {ids[key]: value for key, value in values.items()}))
    return tasks, modules, records


def error(name: str, rank: int, data: bool = True) -> float:
    tasks, modules, _ = solve(name, rank, data)
    pairs = [
        (torch.cat([m(x) for x in t.batches]), torch.cat([t.expert(x) for x in t.batches]))
        for t, m in zip(tasks, modules)
    ]
    return max(relative(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_functions_and_packed_attention_have_corrections(name: str) -> None:
    few, some, full = (error(name, rank) for rank in (1, 4, 8))
    assert max(some, full) < few
    assert full < 0.1  # the ridge, and the table and the scale, which are shared


@pytest.mark.parametrize("name", MODELS)
def test_full_rank_without_data_is_the_expert(name: str) -> None:
    assert error(name, 8, data=False) < 1e-12


@pytest.mark.parametrize("data", [True, False])
def test_each_matrix_of_a_stack_has_the_rank(data: bool) -> None:
    tasks, modules, records = solve("functions", 2, data)
    ranks: list[int] = []
    averages = average([task.expert.get_parameter("stack") for task in tasks]).detach()
    for module in modules:
        differences = module.get_parameter("stack").detach() - averages
        ranks += [int(torch.linalg.matrix_rank(difference, rtol=1e-9)) for difference in differences]
    assert ranks == [2] * 4
    assert sum(record.of_tasks.get("stack", 0) for record in records) == 2 * 2 * (8 + 8)


def test_a_chain_with_corrections_solves_what_functions_use() -> None:
    """And what no task has for itself has the shared value in all of them."""
    torch.manual_seed(0)
    experts = [expert.double() for expert in built(Functions)]
    tasks = [Task(f"task{n}", e, [torch.randn(8, 5, 6).double() + n for _ in range(4)]) for n, e in enumerate(experts)]
    states = [dict(expert.named_parameters()) for expert in experts]
    merged = {key: nn.Parameter(average([state[key] for state in states]), False) for key in states[0]}
    own = task_tensors(tasks, merged, weights=True)
    records = merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(task_rank=2), task_tensors=own)
    assert without_copies(own, records).keys() == {"wide", "offset", "stack"}
    for name in ("table", "scale"):
        assert name in {name for record in records for name in record.parameters}
        assert all(torch.equal(tensor, merged[name]) for tensor in own[name])


def test_what_has_no_correction_is_named_with_the_reason() -> None:
    module = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 2), nn.Linear(2, 2))
    records = [
        LayerRecord("1", "linear", {"1.weight": 9, "1.bias": 3}),
        LayerRecord("2", "linear", {"2.weight": 6, "2.bias": 2}, of_tasks={"2.weight": 5}, rank=1),
    ]
    ranks, merged = {"1": 0, "2": 1}, dict(module.named_parameters())
    [warning] = warn_of_uncorrected([Task("a", module, [])], merged, records, ranks)
    reasons = "0.weight (embedding), 1.weight (other layers gain more), 3.weight (not solved as a matrix)"
    assert warning == f"no corrections, so the same for all tasks: {reasons}"
