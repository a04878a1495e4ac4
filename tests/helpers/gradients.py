"""Small networks for rules that differentiate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning import (
    MergingMethod,
)
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors
from com_lightning.methods import MergeJob
from tests.helpers.classifier import perturb
from tests.helpers.numbers import relative

Values = Mapping[str, Tensor]


class Net(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6, bias), nn.LayerNorm(6), nn.Linear(6, 3, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.norm(self.first(x))))  # type: ignore[no-any-return]


def loss(module: nn.Module, batch: Any, index: int) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def made(count: int = 2, seed: int = 0, make: Callable[[], nn.Module] = Net) -> tuple[nn.Module, list[nn.Module]]:
    torch.manual_seed(seed)
    base = make().double().eval()
    experts = [perturb(copy.deepcopy(base), 0.3, seed + number + 1) for number in range(count)]
    return base.requires_grad_(False), [expert.requires_grad_(False) for expert in experts]


def tasks_of(experts: list[nn.Module], batches: int = 12, size: int = 1, scale: float = 1.0) -> list[Task]:
    result = []
    for number, expert in enumerate(experts):
        generator = torch.Generator().manual_seed(number)
        data = [
            (
                torch.randn(size, 4, generator=generator, dtype=torch.float64),
                torch.randint(0, 3, (size,), generator=generator),
            )
            for _ in range(batches)
        ]
        task = Task("abc"[number], expert, data, lambda module, batch, index: module(batch[0]))
        task.loss = lambda module, batch, index: scale * loss(module, batch, index)
        task.predict = lambda module, batch, index: module(batch[0])
        task.size = lambda batch: len(batch[1])
        result.append(task)
    return result


def averages(experts: list[nn.Module], weights: list[float]) -> dict[str, Tensor]:
    states = [state(expert) for expert in experts]
    means = {n: average([own[n] for own in states], weights) for n, t in states[0].items() if t.is_floating_point()}
    return {n: nn.Parameter(t, False) if isinstance(states[0][n], nn.Parameter) else t for n, t in means.items()}


def run(
    method: MergingMethod, tasks: list[Task], base: nn.Module | None = None, peers: Peers | None = None
) -> tuple[dict[str, Tensor], list[LayerRecord], Context]:
    merged = averages([task.expert for task in tasks], method.weights([task.name for task in tasks]))
    how = Context(peers=peers or Peers())
    origin = {name: tensor for name, tensor, _ in named_tensors(base)} if base is not None else None
    records = method.merge(MergeJob(tasks, merged, how, origin))
    return merged, records, how


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor, _ in named_tensors(module)}


def close(actual: Values, expected: Values, bound: float = 1e-9) -> None:
    for name, value in expected.items():
        assert relative(actual[name], value) < bound, name
