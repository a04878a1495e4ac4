"""Jobs for merging rules, without Lightning around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average
from com_lightning.methods import (
    DARE,
    DELLA,
    LARV,
    SLERP,
    SVC,
    TACT,
    TIES,
    TSVM,
    WUDI,
    ACTMat,
    Average,
    Breadcrumbs,
    Combined,
    IsoC,
    IsoCTS,
    KarcherMean,
    MergeJob,
    MergingMethod,
    TaskArithmetic,
)
from tests.helpers.numbers import relative

Values = Mapping[str, Tensor]
SHAPES = {"scalar": (), "vector": (7,), "one": (1,), "matrix": (8, 6), "wide": (4, 6), "conv": (3, 2, 2, 2)}


class Bag(nn.Module):
    """A module of nothing but parameters."""

    def __init__(self, values: Values) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone(), requires_grad=False))


def make_values(count: int = 3, scale: float = 0.02, dtype: torch.dtype = torch.float64) -> tuple[Values, list[Values]]:
    """A base and experts, of parameters of every number of dimensions; deterministic."""
    generator = torch.Generator().manual_seed(3)

    def noise(size: float) -> dict[str, Tensor]:
        return {n: size * torch.randn(s, generator=generator, dtype=torch.float64) for n, s in SHAPES.items()}

    base = {name: value.to(dtype) for name, value in noise(0.1).items()}
    return base, [{n: (base[n] + change).to(dtype) for n, change in noise(scale).items()} for _ in range(count)]


def make_job(
    method: MergingMethod, base: Values | None, experts: Mapping[str, Values], run: Context | None = None
) -> MergeJob:
    """What a rule is given by a merge of these experts."""
    tasks = [Task(task, Bag(values), []) for task, values in experts.items()]
    weights = method.weights([task.name for task in tasks])
    merged = {
        name: nn.Parameter(average([values[name] for values in experts.values()], weights), requires_grad=False)
        for name in next(iter(experts.values()))
    }
    return MergeJob(tasks, merged, run or Context(), base if "base" in method.needs else None)


def merge(method: MergingMethod, base: Values | None, experts: Mapping[str, Values]) -> dict[str, Tensor]:
    """The merged values."""
    job = make_job(method, base, experts)
    method.merge(job)
    return {name: value.detach() for name, value in job.merged.items()}


def records(method: MergingMethod, base: Values | None, experts: Mapping[str, Values]) -> list[LayerRecord]:
    """What a merge tells."""
    return method.merge(make_job(method, base, experts))


RULES: dict[str, MergingMethod] = {
    "Average": Average(),
    "TaskArithmetic": TaskArithmetic(),
    "TIES": TIES(),
    "TIES, per parameter": TIES(0.5, trim="parameter"),
    "DARE": DARE(0.5),
    "DARE, elected": DARE(0.5, ties=True),
    "Breadcrumbs": Breadcrumbs(0.5, 0.1),
    "DELLA": DELLA(),
    "SLERP": SLERP(),
    "KarcherMean": KarcherMean(),
    "TSVM": TSVM(),
    "IsoC": IsoC(),
    "IsoCTS": IsoCTS(),
    "WUDI": WUDI(10),
    "ACTMat": ACTMat(),
    "TACT": TACT(),
    "SVC": SVC(TaskArithmetic()),
    "LARV": LARV(TSVM()),
    "LARV, continuous": LARV(TIES(0.5), "continuous"),
    "Combined": Combined(TSVM(), TaskArithmetic()),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def named(experts: Sequence[Values]) -> dict[str, Values]:
    return dict(zip("abcdefghij", experts))


def few(rule: MergingMethod) -> int:
    return 2 if isinstance(rule, SLERP) else 3


def close(actual: Values, expected: Values, bound: float = 1e-9) -> None:
    for name, value in expected.items():
        assert relative(actual[name], value) < bound, name
