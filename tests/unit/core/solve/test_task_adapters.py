"""Corrections of low rank that each task has for itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.task_tensors import task_tensors
from com_lightning.core.solve.task_adapters import RIDGE, low_rank_corrections
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from tests.helpers import built, relative


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3))


def attentive() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))


MODELS: dict[str, Any] = {
    "linear": (network, lambda n: torch.randn(40, 6) + n),
    "attention": (attentive, lambda n: torch.randn(8, 5, 8) + n),
    "images": (images, lambda n: torch.randn(6, 1, 9, 9) + n),
}
RULES = {
    "two-sided": ChainOptions(),
    "one-sided": ChainOptions(target="merged"),
    "all": ChainOptions(residual=True, sensitivity="numbers"),
}


def merged_with(rank: int, name: str, rule: ChainOptions) -> list[tuple[Task, nn.Module, nn.Module]]:
    """Task, its merged module, and the module with what all tasks share alone."""
    torch.manual_seed(1)
    experts = [expert.double() for expert in built(MODELS[name][0])]
    batches = [[MODELS[name][1](n).double() for _ in range(3)] for n in range(2)]
    tasks = [Task(f"task{n}", expert, own) for n, (expert, own) in enumerate(zip(experts, batches))]
    states = [{key: tensor for key, tensor, _ in named_tensors(expert)} for expert in experts]
    merged: dict[str, Tensor] = {}
    for key, tensor in states[0].items():
        if tensor.is_floating_point():
            value = average([state[key] for state in states])
            merged[key] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    own = task_tensors(tasks, merged, weights=rank > 0)
    rule = ChainOptions(**{**vars(rule), "task_rank": rank, "private_biases": True, "ridge": 1e-6})
    merge_layers(tasks, merged, [0.5, 0.5], rule, task_tensors=own)
    result = []
    for number, task in enumerate(tasks):
        values = {**merged, **{key: each[number] for key, each in own.items()}}
        ids = {key: id(tensor) for key, tensor, _ in named_tensors(task.expert)}
        modules = [copy_module(task.expert, {ids[k]: v for k, v in each.items()}) for each in (values, merged)]
        result.append((task, modules[0], modules[1]))
    return result


def error(name: str, rank: int, rule: ChainOptions) -> float:
    errors = []
    for task, module, _ in merged_with(rank, name, rule):
        outputs = torch.cat([module(batch) for batch in task.batches])
        errors.append(relative(outputs, torch.cat([task.expert(batch) for batch in task.batches])))
    return max(errors)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_more_rank_brings_the_merged_model_closer_to_every_expert(name: str, rule: str) -> None:
    none, some, full = (error(name, rank, RULES[rule]) for rank in (0, 2, 64))
    assert full < some < none
    assert full < 0.1  # ridge of the corrections, and what normalisation layers cannot do


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_what_differs_from_the_shared_weight_has_the_rank(name: str) -> None:
    for _, module, shared in merged_with(2, name, RULES["two-sided"]):
        for key, tensor, _ in named_tensors(module):
            if tensor.dim() == 2:
                packed = 3 if "in_proj" in key else 1  # query, key and value have a correction each
                difference = tensor.detach() - shared.get_parameter(key).detach()
                values = torch.linalg.svdvals(difference)
                assert values[0] > 1e-3
                if packed == 1 and min(difference.shape) > 2:
                    assert values[2] < 1e-9 * values[0], key


def test_full_rank_without_a_ridge_is_the_least_squares_fit_of_the_task() -> None:
    torch.manual_seed(0)
    inputs, targets = torch.randn(50, 4).double(), torch.randn(50, 3).double()
    weight, shared = torch.randn(1, 3, 4).double(), torch.randn(1, 3, 4).double()
    gram = (inputs.T @ inputs / 50)[None]
    drift = ((targets - inputs @ weight[0].T).T @ inputs / 50)[None]
    (correction,) = low_rank_corrections([gram], [drift], [weight], shared, rank=9, ridge=0.0)
    torch.testing.assert_close((shared + correction)[0].T, torch.linalg.lstsq(inputs, targets).solution)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_no_matrix_of_that_rank_has_a_smaller_error(shape: tuple[int, int], weighted: bool) -> None:
    """Descent from the solution, and from elsewhere, finds nothing better."""
    torch.manual_seed(0)
    outputs, inputs = shape
    rows = torch.randn(60, inputs).double()
    weight, shared = (torch.randn(1, outputs, inputs).double() for _ in range(2))
    gram = (rows.T @ rows / 60)[None]
    roots = [torch.randn(outputs, 2).double()] if weighted else []
    (correction,) = low_rank_corrections([gram], [None], [weight], shared, 2, roots, ridge=1e-12)
    assert torch.linalg.matrix_rank(correction[0], rtol=1e-9) == 2
    metric = roots[0] @ roots[0].T + 0.3 * torch.eye(outputs) if weighted else torch.eye(outputs).double()

    def loss(matrix: Tensor) -> Tensor:
        left = weight[0] - shared[0] - matrix
        return (metric @ left @ gram[0] @ left.T).trace()

    best = float(loss(correction[0]))
    for start in range(3):
        u, s, v = torch.linalg.svd(correction[0])
        factors = [u[:, :2] * s[:2], v[:2]] if not start else [torch.randn(outputs, 2), torch.randn(2, inputs)]
        parameters = [factor.double().contiguous().requires_grad_() for factor in factors]
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, line_search_fn="strong_wolfe")

        def closure(optimizer: torch.optim.LBFGS = optimizer, parameters: list[Tensor] = parameters) -> Any:
            optimizer.zero_grad()
            value = loss(parameters[0] @ parameters[1])
            value.backward()  # type: ignore[no-untyped-call]
            return value

        optimizer.step(closure)  # type: ignore[no-untyped-call]
        assert float(closure()) >= best * (1 - 1e-6)


def test_groups_without_data_keep_the_shared_weight() -> None:
    gram = torch.stack([torch.eye(3), torch.zeros(3, 3)])
    weight, shared = torch.ones(2, 2, 3), torch.zeros(2, 2, 3).double()
    (correction,) = low_rank_corrections([gram], [None], [weight], shared, 1)
    assert correction[0].abs().min() > 0.9
    assert not correction[1].any()
    assert math.isclose(float(correction[0].max()), 1 / (1 + RIDGE / 2), rel_tol=1e-6)
