"""What merging rules that need no data promise."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import NonFiniteError, Task
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
    AdaMerging,
    Average,
    Breadcrumbs,
    ChainOfMerges,
    Combined,
    IsoC,
    IsoCTS,
    KarcherMean,
    MergeJob,
    MergingMethod,
    ParameterRecord,
    TaskArithmetic,
)
from com_lightning.methods.on_top import OnTop
from com_lightning.methods.parameterwise import ParameterRule, SharedParameter
from tests.helpers import relative
from tests.helpers.rules import SHAPES, close, every_rule, few, make_job, make_values, merge, named, records

SCALED = [TaskArithmetic, TIES, DARE, Breadcrumbs, DELLA, TSVM, IsoC, IsoCTS, ACTMat, TACT]


@every_rule
def test_the_order_of_experts_does_not_matter(rule: MergingMethod) -> None:
    base, experts = make_values(few(rule))
    expected = merge(rule, base, named(experts))
    for order in permutations(named(experts).items()):
        close(merge(rule, base, dict(order)), expected)


@every_rule
def test_the_same_again(rule: MergingMethod) -> None:
    base, experts = make_values(few(rule))
    one, two = merge(rule, base, named(experts)), merge(rule, base, named(experts))
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


@pytest.mark.parametrize(
    "rule",
    [
        Average(),
        TaskArithmetic(1 / 3),
        TIES(1.0),
        DARE(0.0, ties=True),
        DELLA(0, 0, 1.0),
        Breadcrumbs(1.0, 0.0, 1 / 3),
        KarcherMean(),
        ACTMat(),
        SVC(Average()),
        LARV(KarcherMean(), strength=0.0),
        Combined(KarcherMean(), TIES(1.0)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_identical_experts_are_given_back(rule: MergingMethod) -> None:
    base, (expert, *_) = make_values()
    close(merge(rule, base, named([expert] * 3)), expert)


def test_slerp_of_identical_experts() -> None:
    _, (expert, *_) = make_values()
    close(merge(SLERP(0.3), None, named([expert] * 2)), expert)


@pytest.mark.parametrize("kind", SCALED)
def test_scale_0_gives_the_base(kind: Any) -> None:
    base, experts = make_values()
    close(merge(kind(scale=0.0), base, named(experts)), base)


@pytest.mark.parametrize(
    "rule",
    [
        TaskArithmetic(1.0),
        TIES(1.0),
        DARE(0.0, 1.0),
        Breadcrumbs(1.0, 0.0, 1.0),
        TSVM(),
        WUDI(),
        ACTMat(),
        TACT(1.0),
        SVC(TaskArithmetic(1.0)),
        KarcherMean(),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_one_expert_is_given_back(rule: MergingMethod) -> None:
    base, (expert, *_) = make_values()
    close(merge(rule, base, {"a": expert}), expert)


@every_rule
def test_importance_0_leaves_an_expert_out(rule: MergingMethod) -> None:
    if isinstance(rule, (SLERP, Combined, OnTop)):
        return
    base, experts = make_values(3)
    weighted = type(rule)(importance={"a": 2, "b": 2, "c": 0})
    close(merge(weighted, base, named(experts)), merge(type(rule)(), base, named(experts[:2])))


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(rule: MergingMethod, dtype: torch.dtype) -> None:
    """The result is that in double precision of the same numbers, rounded once."""
    base, experts = make_values(few(rule), 0.05, dtype)
    result = merge(rule, base, named(experts))
    origin, *exactly = ({name: value.double() for name, value in values.items()} for values in (base, *experts))
    exact = merge(rule, origin, named(exactly))
    for name in SHAPES:
        assert result[name].dtype == dtype
        assert relative(result[name], exact[name]) < 2 * torch.finfo(dtype).eps, name


@every_rule
def test_tied_parameters_are_merged_once_and_stay_tied(rule: MergingMethod) -> None:
    base, experts = make_values(few(rule))
    job = make_job(rule, base, named(experts))
    for task in job.tasks:
        task.expert.register_parameter("again", task.expert.get_parameter("matrix"))
    tied = replace(
        job,
        merged={**job.merged, "again": job.merged["matrix"]},
        base=job.base and {**job.base, "again": job.base["matrix"]},
    )
    told = rule.merge(tied)
    assert tied.merged["again"] is tied.merged["matrix"]
    assert not any(record.name == "again" for record in told)
    expected = merge(rule, base, named(experts))
    assert torch.equal(tied.merged["matrix"], expected["matrix"])


@every_rule
def test_buffers_and_empty_parameters_stay_averaged(rule: MergingMethod) -> None:
    experts = []
    for number in range(few(rule)):
        expert = nn.BatchNorm1d(4)
        expert.empty = nn.Parameter(torch.empty(0, 3))
        expert.running_mean.fill_(number)  # type: ignore[union-attr]
        experts.append(expert.requires_grad_(False))
    merged: dict[str, Tensor] = {n: nn.Parameter(p.clone()) for n, p in experts[0].named_parameters()}
    merged["running_mean"] = torch.full((4,), 7.0)
    base = {name: torch.zeros_like(value) for name, value in merged.items()}
    rule.merge(MergeJob([Task(t, e, []) for t, e in zip("abc", experts)], merged, Context(), base))
    assert merged["running_mean"].tolist() == [7.0] * 4


def change_of(rule: MergingMethod, layers: list[nn.Module]) -> Tensor:
    """What a rule adds to the first of these, the base, from the others."""
    base = layers[0].get_parameter("weight").detach()
    merged: dict[str, Tensor] = {"weight": nn.Parameter(torch.zeros_like(base))}
    tasks = [Task(task, expert.requires_grad_(False), []) for task, expert in zip("ab", layers[1:])]
    rule.merge(MergeJob(tasks, merged, Context(), {"weight": base}))
    return merged["weight"].detach() - base


@pytest.mark.parametrize("rule", [ACTMat(), TACT(), SVC(TaskArithmetic()), WUDI(100, 1e-3), TSVM(), IsoCTS()], ids=str)
def test_layers_that_store_their_inputs_first(rule: MergingMethod) -> None:
    """They are merged as the same layers with their outputs first."""
    torch.manual_seed(0)
    plain = [nn.Linear(5, 8, bias=False).double() for _ in range(3)]
    stored: list[nn.Module] = [Conv1D(8, 5).double() for _ in plain]  # type: ignore[no-untyped-call]
    for one, other in zip(plain, stored):
        other.weight = nn.Parameter(one.weight.detach().T.clone())
    assert relative(change_of(rule, [*stored]).T, change_of(rule, [*plain])) < 1e-6
    if isinstance(rule, (ACTMat, SVC)):
        up = [nn.ConvTranspose2d(3, 2, 2, bias=False).double() for _ in range(3)]
        down = [nn.Linear(3, 8, bias=False).double() for _ in up]
        for layer, dense in zip(up, down):
            dense.weight = nn.Parameter(layer.weight.detach().flatten(1).T.clone())
        assert relative(change_of(rule, [*up]).flatten(1).T, change_of(rule, [*down])) < 1e-9


@pytest.mark.parametrize(("rule", "below"), [(ACTMat(), Average()), (SVC(DARE()), DARE())], ids=str)
def test_tables_are_no_matrices_of_inputs(rule: MergingMethod, below: MergingMethod) -> None:
    torch.manual_seed(0)
    tables: list[nn.Module] = [nn.Embedding(7, 4).double() for _ in range(3)]
    base, one, two = (table.get_parameter("weight").detach() for table in tables)
    experts = {"a": {"weight": one}, "b": {"weight": two}}
    assert relative(change_of(rule, tables), merge(below, {"weight": base}, experts)["weight"] - base) < 1e-9


@every_rule
def test_no_more_than_one_parameter_is_held(rule: MergingMethod, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is made of one parameter is gone when the next one comes."""
    alive: dict[str, list[weakref.ref[Tensor]]] = {}
    original = SharedParameter._working

    def working(self: SharedParameter, value: Tensor) -> Tensor:
        for name, references in alive.items():
            assert name == self.name or not any(reference() is not None for reference in references)
        made = original(self, value).clone()
        alive.setdefault(self.name, []).append(weakref.ref(made))
        return made

    monkeypatch.setattr(SharedParameter, "_working", working)
    base, experts = make_values(few(rule))
    merge(rule, base, named(experts))
    assert alive or isinstance(rule, Average)


@every_rule
def test_each_parameter_is_told_of_once(rule: MergingMethod) -> None:
    base, experts = make_values(few(rule))
    told = records(rule, base, named(experts))
    assert len({record.name for record in told}) == len(told)
    spectral = isinstance(rule, (TSVM, IsoC, IsoCTS, WUDI))
    expected = {"matrix", "wide"} if spectral else set() if isinstance(rule, Average) else set(SHAPES)
    if isinstance(rule, ACTMat):
        expected = {"matrix", "wide", "conv"}
    if isinstance(rule, Combined):
        expected -= {"conv"}  # which TSV-M has no say in
    assert {record.name for record in told} == expected
    assert all(isinstance(record, ParameterRecord) for record in told)
    if isinstance(rule, ParameterRule):
        assert {record.layer_type for record in told} == {type(rule).__name__}


def test_processes_share_the_parameters_out() -> None:
    """Each one merges its own, and is given the others'."""
    base, experts = make_values()
    expected = merge(TIES(), base, named(experts))
    jobs = []

    class Fake(Peers):
        size = 2

        def __init__(self, rank: int) -> None:
            self.rank, self.sent = rank, list[int]()

        def exchange(self, value: Any) -> list[Any]:
            return [True, True]

        def broadcast(self, tensor: Tensor, owner: int) -> None:
            self.sent.append(owner)

    for rank in range(2):
        job = make_job(TIES(), base, named(experts), Context(peers=Fake(rank)))
        TIES().merge(job)
        jobs.append(job)
    for number, name in enumerate(SHAPES):
        assert torch.equal(jobs[number % 2].merged[name], expected[name])
        assert not torch.equal(jobs[1 - number % 2].merged[name], expected[name])


def test_nan_is_told_of() -> None:
    base, experts = make_values()
    experts[1] = {**experts[1], "matrix": torch.full((8, 6), math.nan, dtype=torch.float64)}
    with pytest.raises(NonFiniteError, match="matrix of expert 'b' holds NaN"):
        merge(TaskArithmetic(), base, named(experts))
    base, experts = make_values(dtype=torch.float16)
    with pytest.raises(NonFiniteError, match="too large for float16; lower the rule's scale"):
        merge(TaskArithmetic(1e7), base, named(experts))


BAD: list[tuple[MergingMethod, str]] = [
    (TaskArithmetic(math.nan), "scale: must be a finite number, got nan"),
    (TSVM(math.inf), "scale: must be a finite number"),
    (TIES(0), "density: must be above 0 and at most 1, got 0"),
    (TIES(1.5), "density: must be above 0"),
    (TIES(math.nan), "density: must be above 0"),
    (Breadcrumbs(0.0), "density: must be above 0"),
    (Breadcrumbs(outliers=1.0), "outliers: must be 0 or more and below 1"),
    (DARE(1.0), "drop_rate: must be 0 or more and below 1, got 1.0"),
    (DELLA(0.05, 0.2), "drop_rate - window / 2 must be 0 or more"),
    (DELLA(0.9, 0.2), "drop_rate + window / 2 below 1"),
    (DELLA(0.5, -0.1), "drop_rate, window"),
    (SLERP(), "SLERP is between two experts, got 3; KarcherMean takes any number"),
    (SLERP(1.1), "t: must be between 0 and 1"),
    (KarcherMean(0), "steps: must be 1 or more"),
    (IsoCTS(common=1.1), "common: must be between 0 and 1"),
    (ACTMat(rtol=1.0), "rtol: must be 0 or more and below 1, got 1.0"),
    (ACTMat(math.inf), "scale: must be a finite number"),
    (TACT(0.0), "density: must be above 0"),
    (TACT(rtol=-0.1), "rtol: must be 0 or more"),
    (SVC(TIES(), 0.0), "floor: must be above 0 and at most 1, got 0"),
    (SVC(TIES(0.0)), "method: density: must be above 0"),
    (SVC(ChainOfMerges()), "method: SVC goes on top of rules that merge task vectors"),
    (LARV(SVC(AdaMerging())), "method: method: SVC goes on top"),
    (LARV(TIES(), strength=1.1), "strength: must be between 0 and 1, got 1.1"),
    (WUDI(0), "steps: must be 1 or more"),
    (WUDI(learning_rate=0.0), "learning_rate: must be above 0"),
    (TaskArithmetic(importance={"a": 1}), "no weight for b, c"),
    (Combined(TIES(0), DARE(2.0)), "matrices: density: must be above 0"),
    (Combined(TIES(), DARE(2.0)), "rest: drop_rate"),
]


@pytest.mark.parametrize(("rule", "message"), BAD)
def test_bad_settings(rule: MergingMethod, message: str) -> None:
    assert any(message in problem for problem in rule.problems(["a", "b", "c"]))


@every_rule
def test_the_settings_here_are_good(rule: MergingMethod) -> None:
    assert not rule.problems(["a", "b", "c"][: few(rule)])
