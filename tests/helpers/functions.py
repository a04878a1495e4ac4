"""Modules whose weights go into functions, and merges of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors
from tests.helpers.classifier import perturb

Function = Callable[..., Tensor]


class Before(nn.Module):
    """A layer, so that inputs drift, then something that uses parameters by function calls."""

    def __init__(self, function: Function, **shapes: Sequence[int]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 6), function
        for number, (name, shape) in enumerate(shapes.items()):
            generator = torch.Generator().manual_seed(number)
            self.register_parameter(name, nn.Parameter(torch.randn(tuple(shape), generator=generator)))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x).relu(), **self._parameters)


def experts_of(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    base = make().eval()
    return [perturb(copy.deepcopy(base), 0.3, seed=n) for n in range(2)]


def data(*shape: int) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[(1 + 2 * task) * torch.randn(*shape) + task for _ in range(2)] for task in range(2)]


def merge(
    experts: Sequence[nn.Module],
    batches: list[list[Any]],
    run: Any = merge_layers,
    rule: ChainOptions | None = None,
    **more: Any,
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
    merged = {name: average([state[name] for state in states]) for name in states[0]}
    tasks = [Task(f"task{n}", e, b, **more) for n, (e, b) in enumerate(zip(experts, batches))]
    return merged, run(tasks, merged, [0.5, 0.5], rule or ChainOptions())


def solved(records: Sequence[LayerRecord]) -> dict[str, int]:
    return {name: count for record in records for name, count in record.parameters.items()}


def tokens() -> list[list[Tensor]]:
    torch.manual_seed(3)
    return [[torch.randint(0, 12, (4, 5)) for _ in range(2)] for _ in range(2)]
