"""The chain with another rule's weights in place of the average."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors, tied_names
from com_lightning.errors import MergeError
from com_lightning.methods import (
    TSVM,
    Average,
    ChainOfMerges,
    Combined,
    MergeJob,
    MergingMethod,
    Refitted,
    RegMean,
    TaskArithmetic,
)
from tests.helpers import built, relative
from tests.helpers.chains import points


class Net(nn.Module):
    """Linear layers, a norm, a table with rows that are never seen, a scale without a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.table = nn.Embedding(4, 5)
        self.unused = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.arange(len(x)) % 3)
        return self.last(self.norm(self.first(x)).relu())  # type: ignore[no-any-return]


Result = tuple[Mapping[str, Tensor], list[LayerRecord], list[nn.Module]]


def merge(method: MergingMethod, experts: list[nn.Module] | None = None, base: float | None = 0.9) -> Result:
    """A merge, where the base is the first expert times ``base``."""
    experts = experts or built(Net)
    tasks = [Task(f"task{n}", expert, [points(10 * n), points(10 * n + 1)]) for n, expert in enumerate(experts)]
    states = [{n: t for n, t, _ in named_tensors(expert)} for expert in experts]
    weights, ties = method.weights([task.name for task in tasks]), tied_names(experts[0])
    merged: dict[str, Tensor] = {}
    for name in states[0]:
        value = nn.Parameter(average([state[name] for state in states], weights), requires_grad=False)
        merged[name] = merged.get(ties[name], value)
    origin = {name: base * tensor.detach() for name, tensor in states[0].items()} if base else None
    return merged, method.merge(MergeJob(tasks, merged, base=origin if "base" in method.needs else None)), experts


def chain(**settings: object) -> ChainOfMerges:
    return ChainOfMerges(**{"normalize": False, "refit_heads": False, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{}, {"target": "merged"}, {"sensitivity": "numbers"}, {"normalize": True}],
    ids=["two-sided", "one-sided", "sensitivity", "normalized"],
)
def test_a_strong_ridge_gives_the_rules_own_merge(settings: dict[str, object]) -> None:
    expected, _, _ = merge(TSVM())
    merged, _, _ = merge(chain(anchor=TSVM(), ridge=1e9, **settings))
    assert all(relative(merged[name], value) < 1e-5 for name, value in expected.items())
    plain, _, _ = merge(chain(ridge=1e9, **settings))
    assert any(relative(plain[name], value) > 0.05 for name, value in expected.items())


def test_the_ridge_is_towards_the_rules_weight() -> None:
    """The first layer, one-sided, from its equation."""
    experts = built(lambda: nn.Sequential(nn.Linear(5, 4, bias=False)))
    merged, _, _ = merge(chain(anchor=TaskArithmetic(0.7), ridge=0.3, target="merged", residual=False), experts)
    start = merge(TaskArithmetic(0.7), experts)[0]["0.weight"].double()
    inputs = [torch.cat([points(10 * n), points(10 * n + 1)]).double() for n in range(2)]
    grams = [x.T @ x / len(x) / 2 for x in inputs]
    ridge = 0.3 * (grams[0] + grams[1]).diagonal().mean() * torch.eye(5).double()
    right = start @ ridge
    for expert, gram in zip(experts, grams):
        right += expert.get_parameter("0.weight").detach().double() @ gram
    assert relative(merged["0.weight"], right @ (grams[0] + grams[1] + ridge).inverse()) < 1e-5


def test_what_the_chain_does_not_solve_is_as_the_rule_gives_it() -> None:
    expected, _, _ = merge(TaskArithmetic(0.7))
    merged, records, _ = merge(chain(anchor=TaskArithmetic(0.7)))
    assert torch.equal(merged["unused.weight"], expected["unused.weight"])
    assert relative(merged["table.weight"][3], expected["table.weight"][3]) < 1e-6
    assert relative(merged["first.weight"], expected["first.weight"]) > 1e-3
    assert {"first", "norm", "last", "table"} <= {record.name for record in records}


def test_the_average_as_a_rule_is_the_default() -> None:
    plain, _, _ = merge(chain())
    merged, _, _ = merge(chain(anchor=Average()))
    for name, value in plain.items():
        assert relative(merged[name], value) < 1e-5, name


def test_the_rule_has_its_own_importance() -> None:
    importance = {"task0": 1.0, "task1": 0.0}
    merged, _, experts = merge(chain(anchor=Average(importance), ridge=1e9))
    for name, value in dict(experts[0].named_parameters()).items():
        assert relative(merged[name], value) < 1e-6


def test_identical_experts_come_back_where_data_reach_and_the_base_where_they_do_not() -> None:
    (expert, _) = built(lambda: nn.Sequential(nn.Linear(5, 4, bias=False)))
    thin = [torch.cat([points(0)[:, :3], torch.zeros(24, 2)], 1)]
    tasks = [Task(f"task{n}", expert, thin) for n in range(2)]
    start = 0.5 * expert.get_parameter("0.weight").detach()
    for anchor in ("base", TaskArithmetic(0.0)):
        method = chain(anchor=anchor, ridge=1e-9)
        merged = {"0.weight": nn.Parameter(expert.get_parameter("0.weight").detach().clone(), requires_grad=False)}
        method.merge(MergeJob(tasks, merged, base={"0.weight": start}))
        assert relative(merged["0.weight"][:, :3], 2 * start[:, :3]) < 1e-4
        assert relative(merged["0.weight"][:, 3:], start[:, 3:]) < 1e-4


def test_private_biases_and_corrections_have_the_anchor_too() -> None:
    expected, _, _ = merge(TSVM())
    for settings in ({"private_biases": True}, {"task_rank": 1}):
        merged, _, _ = merge(chain(anchor=TSVM(), ridge=1e9, **settings))
        assert relative(merged["first.weight"], expected["first.weight"]) < 1e-4
        assert all(value.isfinite().all() for value in merged.values())


def test_a_tied_weight_stays_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())  # type: ignore[no-any-return]

    merged, _, _ = merge(chain(anchor=TaskArithmetic(0.7)), built(Tied))
    assert merged["first.weight"] is merged["second.weight"]


def test_what_the_rule_needs_is_asked_for() -> None:
    assert chain().needs == {"data"}
    assert chain(anchor=Average()).needs == {"data"}
    assert chain(anchor=TSVM()).needs == chain(anchor="base").needs == {"data", "base"}
    assert Combined(chain(anchor=TSVM()), Average()).needs == {"data", "base"}


def test_wrong_anchors_are_told_at_once() -> None:
    for wrong in ("tsvm", 5, None):
        with pytest.raises(MergeError, match=r"anchor: must be a .*, got .?(tsvm|5|None)"):
            chain(anchor=wrong)
    assert chain(anchor=RegMean()).problems(["a"]) == [
        "anchor: RegMean merges layer by layer itself; give a rule such as TSVM or TIES"
    ]
    assert chain(anchor=Refitted(TSVM())).problems(["a"])
    assert chain(anchor=TSVM(float("nan"))).problems(["a"]) == ["anchor: scale: must be a finite number, got nan"]


def test_the_rule_is_shown() -> None:
    method = ChainOfMerges(anchor=TSVM(0.5), ridge=0.1)
    assert repr(method) == "ChainOfMerges(ridge=0.1, anchor=TSVM(scale=0.5))"
    assert method.describe()["anchor"] == {"class": "TSVM", "importance": None, "scale": 0.5}
    assert ChainOfMerges().describe()["anchor"] == "average"
