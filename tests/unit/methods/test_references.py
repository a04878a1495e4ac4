"""Every rule against another implementation of it, see references/README.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from com_lightning.core.sweep.task import Task
from com_lightning.methods import (
    DARE,
    DELLA,
    ESM,
    SLERP,
    SVC,
    TACT,
    TIES,
    TSVM,
    WUDI,
    ACTMat,
    Breadcrumbs,
    FeatCal,
    IsoC,
    IsoCTS,
    KarcherMean,
    MergeJob,
    MergingMethod,
    RegMean,
    RegMeanPlusPlus,
    TaskArithmetic,
)
from com_lightning.methods.parameterwise import SharedParameter
from tests.helpers import relative
from tests.helpers.rules import merge

REFERENCES = Path(__file__).parents[2] / "references"
ALL = load_file(REFERENCES / "rules.safetensors")
TASKS = ["a", "b", "c"]
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 3.0}


def values_of(key: str) -> dict[str, Tensor]:
    return {name.split("/")[1]: value for name, value in ALL.items() if name.split("/")[0] == key}


@pytest.fixture(autouse=True)
def _their_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def uniform(parameter: SharedParameter, task: str, seed: int) -> Tensor:
        return ALL[f"uniform.{task}/{parameter.name}"]

    monkeypatch.setattr(SharedParameter, "uniform", uniform)


CASES: dict[str, MergingMethod] = {
    "task_arithmetic": TaskArithmetic(),
    "task_arithmetic_weighted": TaskArithmetic(importance=WEIGHTS),
    "ties_parameter": TIES(0.4, 0.7, trim="parameter"),
    "ties_parameter_weighted": TIES(0.4, 0.7, trim="parameter", importance=WEIGHTS),
    "ties_model": TIES(0.41, 0.7),  # 42 values of 103
    "dare": DARE(0.6),
    "dare_ties": DARE(0.6, ties=True),
    "breadcrumbs": Breadcrumbs(0.5, 0.15, 0.6),
    "della": DELLA(0.4, 0.2),
    "karcher": KarcherMean(importance=WEIGHTS),
    "tsvm": TSVM(),
    "iso_c": IsoC(0.8),
    "iso_cts": IsoCTS(0.8, 0.5),
    "wudi": WUDI(),
    "actmat": ACTMat(),
    "tact": TACT(),
    "svc": SVC(TaskArithmetic()),
    "svc_tsvm": SVC(TSVM(), 1.0),
}


@pytest.mark.parametrize("rule", CASES)
def test_as_others_compute_it(rule: str) -> None:
    result = merge(CASES[rule], values_of("base"), {task: values_of(task) for task in TASKS})
    expected = values_of(rule)
    assert set(expected) >= {"matrix", "wide", "vector"}
    bound = 1e-6 if rule in ("della", "karcher") else 1e-9  # of these, theirs computes in float32, or norms
    for name, value in expected.items():
        assert relative(result[name] - ALL[f"base/{name}"], value - ALL[f"base/{name}"]) < bound, name


@pytest.mark.parametrize("rule", [RegMean(ridge=0.0), RegMeanPlusPlus(ridge=0.0)], ids=lambda rule: type(rule).__name__)
def test_rules_on_activations(rule: MergingMethod) -> None:
    """Layers here are what blocks are to the authors of RegMean++."""
    known = load_file(REFERENCES / "regmean.safetensors")
    tasks = []
    for task in TASKS:
        layers = [nn.Linear(known[f"{task}/{n}"].shape[1], len(known[f"{task}/{n}"]), bias=False) for n in range(3)]
        for number, layer in enumerate(layers):
            layer.weight = nn.Parameter(known[f"{task}/{number}"], requires_grad=False)
        network = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
        tasks.append(Task(task, network, list(known[f"x.{task}"].split(11))))  # type: ignore[no-untyped-call]
    merged = {f"{2 * n}.weight": nn.Parameter(torch.zeros_like(known[f"a/{n}"]), requires_grad=False) for n in range(3)}
    rule.merge(MergeJob(tasks, merged))
    key = "regmean" if isinstance(rule, RegMean) else "regmean_plus_plus"
    for number in range(3):
        assert relative(merged[f"{2 * number}.weight"], known[f"{key}/{number}"]) < 1e-9


def test_featcal() -> None:
    """Layers here are what blocks are to the authors: nothing in a block lies between its input and its layer."""
    known = load_file(REFERENCES / "featcal.safetensors")

    def network(who: str) -> nn.Module:
        layers = [nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 5, bias=False), nn.Linear(5, 4)]
        for number, layer in enumerate(layers):
            for name in dict(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(known[f"{who}/{number}.f.{name}"], requires_grad=False))
        return nn.Sequential(layers[0], layers[1], nn.ReLU(), layers[2], nn.ReLU(), layers[3])

    tasks = [Task(task, network(task), list(known[f"x.{task}"].split(11))) for task in TASKS]  # type: ignore[no-untyped-call]
    base = dict(network("base").named_parameters())
    merged = {name: nn.Parameter(torch.zeros_like(value), requires_grad=False) for name, value in base.items()}
    FeatCal().merge(MergeJob(tasks, merged, base=base))
    places = {"0": "0", "1": "1", "3": "2", "5": "3"}
    for name, value in merged.items():
        place, parameter = name.split(".")
        expected = known[f"featcal/{places[place]}.f.{parameter}"]
        assert relative(value - base[name], expected - base[name]) < 1e-9, name


class Block(nn.Module):
    """Two layers in a residual block, under the names that the authors of ESM know."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(6, 12), "c_proj": nn.Linear(12, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp["c_proj"](self.mlp["c_fc"](x).relu())  # type: ignore[no-any-return]


def test_esm() -> None:
    known = load_file(REFERENCES / "esm.safetensors")
    tasks = []
    for task in TASKS:
        network = nn.ModuleDict({"b": nn.Sequential(Block(), Block(), Block())}).double()
        network.load_state_dict({name: known[f"{task}/{name}"] for name in network.state_dict()})
        batches = list(known[f"x.{task}"].split(11))  # type: ignore[no-untyped-call]
        tasks.append(Task(task, network.requires_grad_(False), batches, lambda module, x, index: module["b"](x)))  # type: ignore[index]
    base = {name: known[f"base/{name}"] for name in tasks[0].expert.state_dict()}
    merged = {
        n: nn.Parameter(torch.stack([known[f"{task}/{n}"] for task in TASKS]).mean(0), requires_grad=False)
        for n in base
    }
    ESM(scale=2.0).merge(MergeJob(tasks, merged, base=base))
    for name, value in merged.items():  # theirs doubles what is no average
        expected = known[f"esm/{name}"] * (1 if name.endswith("weight") else 2)
        assert relative(value - base[name], expected) < 1e-9, name


def test_slerp() -> None:
    """The reference is computed in float32."""
    result = merge(SLERP(0.3), None, {task: values_of(task) for task in "ab"})
    for name, value in values_of("slerp").items():
        assert relative(result[name], value) < 1e-6, name


def test_the_probabilities_of_della() -> None:
    rule = DELLA(0.4, 0.2)
    for task in TASKS:
        for name, kept in values_of(f"della_kept.{task}").items():
            assert relative(rule.keep_probability(ALL[f"{task}/{name}"] - ALL[f"base/{name}"]), kept) < 1e-6


def test_the_references_tell_rules_apart() -> None:
    """Otherwise a comparison would say nothing."""
    keys: list[Any] = [*CASES, "base"]
    assert all(
        not torch.allclose(ALL[f"{one}/matrix"], ALL[f"{two}/matrix"], atol=1e-5)
        for number, one in enumerate(keys)
        for two in keys[:number]
    )
