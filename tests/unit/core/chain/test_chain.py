"""The chain over whole models: identities, invariances, and what it does with the odd ones."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.output_error import OutputError
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import NonFiniteError
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from tests.helpers import NAMES_OF_5, built
from tests.helpers.chains import MODELS, case, ids, merge, points, tensors, worst

RULES = {
    "two-sided": ChainOptions(),
    "corrected": ChainOptions(residual=True),
    "one-sided": ChainOptions(target="merged"),
    "not normalized": ChainOptions(normalize=False),
    "each layer on its own": ChainOptions(inputs="expert", target="merged"),
}


TRANSFORMERS = ("vit", "bert", "llama", "gpt2")


def cases(*names: str, few: tuple[str, ...]) -> list[tuple[str, str]]:
    """Models and rules: every pair, but for models that take longer the rule that does most."""
    return [(name, rule) for name in names or MODELS for rule in RULES if name not in few or rule == "corrected"]


@pytest.mark.parametrize(("name", "rule"), cases(few=TRANSFORMERS))
def test_identical_experts_are_given_back(name: str, rule: str) -> None:
    experts, batches = case(name)
    merged, records = merge([experts[0], copy.deepcopy(experts[0])], batches, RULES[rule])
    assert records
    if name == "batch-norm" and rule == "one-sided":
        pytest.skip("its running statistics are then those of the calibration data; see test_normalization.py")
    assert worst(merged, tensors(experts[0])) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_an_importance_of_one_and_zero_gives_that_expert_back(name: str) -> None:
    experts, batches = case(name)
    merged, _ = merge(experts, batches, importance=[1.0, 0.0])
    assert worst(merged, tensors(experts[0])) < 1e-4


@pytest.mark.parametrize(("name", "rule"), cases("mlp", "cnn", "vit", few=TRANSFORMERS))
def test_batches_and_tasks_come_in_any_order_and_size(name: str, rule: str) -> None:
    (experts, batches), options = case(name, 3), RULES[rule]
    experts = [expert.double() for expert in experts]
    batches = [[b.double() if b.is_floating_point() else b for b in part] for part in batches]
    reference, _ = merge(experts, batches, options)
    joined = [[torch.cat(part)] for part in batches]
    single = [list(torch.split(torch.cat(part).flip(0), 1)) for part in batches]
    assert worst(merge(experts, joined, options)[0], reference) < 1e-8
    assert worst(merge(experts, single, options)[0], reference) < 1e-8
    assert worst(merge(experts[::-1], batches[::-1], options)[0], reference) < 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_the_chain_is_closer_to_the_experts_than_their_average(name: str) -> None:
    experts, batches = case(name)
    merged, _ = merge(experts, batches)
    plain, _ = merge(experts, batches, ChainOptions(ridge=1e9))

    def error(values: dict[str, Tensor]) -> float:
        total = 0.0
        for expert, part in zip(experts, batches):
            module = copy_module(expert, {id(t): values[n] for n, t, _ in named_tensors(expert) if n in values})
            with torch.no_grad():
                outputs = [m(part[0]) for m in (module, expert)]
            ours, theirs = (o if isinstance(o, Tensor) else o.last_hidden_state for o in outputs)
            total += float((ours - theirs).square().sum() / theirs.square().sum())
        return total

    assert error(merged) < 0.9 * error(plain)


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2"])
def test_layers_of_one_input_share_their_statistics(name: str) -> None:
    experts, batches = case(name)
    records = {record.name: record for record in merge(experts, batches)[1]}
    sharing = {name.rsplit(".", 1)[-1]: r.shared_with for name, r in records.items() if r.shared_with}
    vit = {"k_proj", "v_proj"} if NAMES_OF_5 else {"query", "value"}
    expected = {"vit": vit, "bert": {"key", "value"}, "llama": {"k_proj", "v_proj", "up_proj"}}
    assert set(sharing) == expected.get(name, set())


def test_sharing_notices_an_input_changed_in_place() -> None:
    class Net(nn.Module):
        def __init__(self, changed: bool) -> None:
            super().__init__()
            self.q, self.k, self.changed = nn.Linear(5, 5), nn.Linear(5, 5), changed

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            q: Tensor = self.q(x)
            if self.changed:
                x.mul_(2)
            return q + self.k(x)  # type: ignore[no-any-return]

    for changed in (False, True):
        records = merge(built(lambda changed=changed: Net(changed)), [[points(0)], [points(1)]])[1]  # type: ignore[misc]
        assert records[1].shared_with == (None if changed else "q")


def test_exactly_one_forward_of_each_model_per_batch_whatever_the_depth() -> None:
    for depth in (1, 7):
        calls: list[int] = []

        def call(module: nn.Module, batch: Any, index: int, calls: list[int] = calls) -> None:
            calls.append(index)
            module(batch)

        experts = built(lambda depth=depth: nn.Sequential(*[nn.Linear(5, 5) for _ in range(depth)]))  # type: ignore[misc]
        batches = [[points(0), points(1)], [points(2)]]
        merge(experts, batches, call=call)
        assert len(calls) == 2 * 3
        calls.clear()
        merge(experts, batches, ChainOptions(target="merged"), call=call)
        assert len(calls) == 3


def test_experts_and_batches_are_left_as_they_were() -> None:
    experts, batches = case("bert")
    before = [copy.deepcopy(dict(e.named_parameters())) for e in experts]
    kept = copy.deepcopy(batches)
    merge(experts, batches)
    assert all(torch.equal(p, b[n]) for e, b in zip(experts, before) for n, p in e.named_parameters())
    assert all(torch.equal(a, b) for x, y in zip(batches, kept) for a, b in zip(x, y))
    assert not any(m._forward_pre_hooks for e in experts for m in e.modules())


class Remembering(nn.Module):
    """Keeps its input across two of its layers, as many modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 5), nn.Linear(5, 5)
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.memory = x
        hidden = self.a(x)
        return self.b(hidden + self.memory)  # type: ignore[no-any-return]


def test_what_a_module_remembers_is_not_overwritten_by_other_forwards() -> None:
    experts = built(Remembering)
    batches = [[points(0), points(1)], [points(2), points(3)]]
    several, _ = merge(experts, batches)
    joined, _ = merge(experts, [[torch.cat(part)] for part in batches])
    assert worst(several, joined) < 1e-5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(30, 5), nn.Linear(5, 5), nn.Linear(5, 30)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x)))  # type: ignore[no-any-return]


def test_a_tied_weight_is_merged_once_where_it_is_used_first() -> None:
    merged, records = merge(built(Tied), [[ids(0)], [ids(1)]])
    assert merged["head.weight"] is merged["embed.weight"]
    by_name = {record.name: record for record in records}
    assert by_name["embed"].parameters == {"embed.weight": 150}
    assert by_name["head.bias"].parameters == {"head.bias": 30}  # by itself, on what the tied weight gives
    assert "head" not in by_name


class Branching(nn.Module):
    """Samples go one way or the other, by their sign, as in a mixture of experts; `never` is in nobody's way."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(5, 5)
        self.ways = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.out, self.never = nn.Linear(5, 2), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.router(x)
        result = torch.zeros_like(x)
        for way, chosen in zip(self.ways, (x[:, 0] > 0, x[:, 0] <= 0)):
            if chosen.any():
                result[chosen] = way(x[chosen])
        return self.out(result)  # type: ignore[no-any-return]


def test_forwards_that_go_different_ways() -> None:
    experts = built(Branching, scale=0.8)
    batches = [[points(0)[:1], points(1)], [points(2)[:1], points(3)]]
    merged, records = merge(experts, batches)
    assert [record.name for record in records] == ["router", "ways.0", "ways.1", "out"]
    assert sum(record.unpaired for record in records if record.name.startswith("ways")) > 0
    assert all(bool(value.isfinite().all()) for value in merged.values())
    assert torch.equal(merged["never.weight"], average([e.get_parameter("never.weight") for e in experts]))
    same, _ = merge([experts[0], experts[0]], batches)
    assert worst(same, tensors(experts[0])) < 1e-5


def test_a_layer_called_twice_is_merged_from_its_first_call() -> None:
    class Twice(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.layer, self.times = nn.Linear(5, 5), times

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.layer(x)
            return x

    once, twice = (merge(built(lambda n=n: Twice(n)), [[points(0)], [points(1)]])[0] for n in (1, 2))  # type: ignore[misc]
    assert worst(once, twice) == 0


def test_padding_does_not_count() -> None:
    experts = built(MODELS["bert"][0])
    clean = [[{"input_ids": ids(task)}] for task in range(2)]
    padded = []
    for part in clean:
        tokens = part[0]["input_ids"]
        mask = torch.cat([torch.ones(4, 6), torch.zeros(4, 3)], 1).long()
        padded.append([{"input_ids": torch.cat([tokens, torch.full((4, 3), 7)], 1), "attention_mask": mask}])

    def call(module: nn.Module, batch: Any, index: int) -> None:
        module(**batch)

    def keep(batch: Any) -> Tensor | None:
        return batch["attention_mask"].bool() if "attention_mask" in batch else None

    assert worst(merge(experts, padded, call=call, mask=keep)[0], merge(experts, clean, call=call)[0]) < 1e-4


@pytest.mark.parametrize("where", ["batch", "expert"])
def test_nan_is_named(where: str) -> None:
    experts, batches = case("mlp")
    if where == "batch":
        batches[1][1][0, 0] = float("nan")
        expected = "inputs of layer '0'.*task 'task1', batch 1"
    else:
        with torch.no_grad():
            experts[1].get_parameter("3.weight")[0, 0] = float("inf")
        expected = "layer '3' of expert 'task1'"
    with pytest.raises(NonFiniteError, match=expected):
        merge(experts, batches)


def test_one_sample_and_dead_features_give_something_finite() -> None:
    experts = built(MODELS["mlp"][0])
    merged, _ = merge(experts, [[torch.zeros(1, 5)], [torch.zeros(1, 5)]], ChainOptions(ridge=0.0))
    assert all(bool(value.isfinite().all()) for value in merged.values())


def test_records_tell_shift_residual_and_rows() -> None:
    experts, batches = case("vit")
    records = merge(experts, batches)[1]
    records = [record for record in records if record.parameters]
    first, later = records[0], records[-1]
    assert first.distance == {"task0": 0.0, "task1": 0.0}
    assert all(value > 0.01 for value in later.distance.values())
    assert all(0 < value <= 1 + 1e-6 for record in records for value in record.cosine.values())
    assert all(r.residual is not None and 0 < r.residual < 1.5 for r in records)
    assert first.rows == {"task0": 8 * 9, "task1": 8 * 9}
    assert all(record.condition is not None and record.condition >= 1 for record in records)
    one_sided = merge(experts, batches, ChainOptions(target="merged"))[1]
    assert all((r.residual is not None) == bool(r.parameters) and not r.distance for r in one_sided)


def test_the_residual_is_that_of_the_output_as_the_layer_gave_it() -> None:
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace), nn.Linear(8, 3))

    first, second = (merge(built(lambda n=n: net(n)), [[points(0)], [points(10)]])[1] for n in (True, False))  # type: ignore[misc]
    assert [record.residual for record in first] == [record.residual for record in second]


def test_one_output_at_a_time_waits_to_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of every batch would take as much memory as the forwards themselves."""
    add, waiting = OutputError.add, []

    def counted(self: OutputError, *args: Any) -> None:
        add(self, *args)
        waiting.append(len(self.waiting))

    monkeypatch.setattr(OutputError, "add", counted)
    experts, batches = case("mlp")
    merge(experts, batches)
    assert min(map(len, batches)) > 1
    assert set(waiting) == {0, 1}


class Cell(nn.Module):
    """A recurrent cell that starts with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.wx, self.wh, self.head = nn.Linear(5, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 4)
        for _ in range(3):
            state = torch.tanh(self.wx(x) + self.wh(state))
            state = state + F.linear(state, self.gate)
        return self.head(state)  # type: ignore[no-any-return]


def test_calls_of_a_layer_are_counted_and_only_the_first_counts() -> None:
    context = Context()
    experts, batches = built(Cell), [[points(0)], [points(10)]]
    _, records = merge(experts, batches, context=context)
    assert {r.name: r.calls for r in records} == {"wx": 3, "wh": 3, "gate": 3, "head": 1}
    [warning] = context.warnings
    assert warning.startswith("wx, wh, gate: called more than once in a forward (wx 3 times)")
    context = Context()
    merge(*case("bert"), context=context)  # its table of words is tied to nothing
    assert not context.warnings


@pytest.mark.parametrize("rule", [ChainOptions(), ChainOptions(anchor="base", joint=False, target="merged")])
def test_a_weight_that_saw_only_zeros_keeps_the_average(rule: ChainOptions) -> None:
    experts, batches = built(Cell), [[points(0)], [points(10)]]
    base = {name: torch.zeros_like(value) for name, value in tensors(experts[0]).items()}
    merged, records = merge(experts, batches, rule, base=base if rule.anchor == "base" else None)
    record = next(record for record in records if record.name == "wh")
    assert (record.groups_of_zeros, record.groups_without_data) == (1, 0)
    assert record.kept == {"wh.weight": 16}
    mean = average([tensors(expert)["wh.weight"] for expert in experts])
    torch.testing.assert_close(merged["wh.weight"], mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "kept", "groups"),
    [
        (lambda: nn.Linear(5, 3, bias=False), {"0.weight": 15}, (1, 0)),
        (lambda: nn.Conv1d(2, 4, 1, groups=2), {"0.weight": 2}, (1, 0)),
        (
            lambda: weight_norm(nn.Linear(5, 3)),
            {f"0.parametrizations.weight.original{n}": k for n, k in ((0, 3), (1, 15))},
            (1, 0),
        ),
        (lambda: nn.Embedding(9, 2), {}, (0, 7)),
    ],
    ids=["linear", "grouped", "parametrised", "embedding"],
)
def test_zeros_are_told_from_missing_data(make: Any, kept: dict[str, int], groups: tuple[int, int]) -> None:
    experts = built(lambda: nn.Sequential(make()))
    inputs = {nn.Conv1d: torch.stack([torch.zeros(7, 5), torch.randn(7, 5)], 1), nn.Embedding: torch.tensor([[0, 1]])}
    batch = inputs.get(type(experts[0][0]), torch.zeros(7, 5))  # type: ignore[index]
    [record] = merge(experts, [[batch], [batch]])[1]
    assert (record.groups_of_zeros, record.groups_without_data) == groups
    assert record.kept == kept


def test_forwards_that_come_late_to_a_layer_are_told() -> None:
    class EitherOrder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.two(x)) if len(x) == 3 else self.two(self.one(x))  # type: ignore[no-any-return]

    context = Context()
    _, records = merge(built(EitherOrder), [[torch.randn(2, 5)], [torch.randn(3, 5)]], context=context)
    assert {record.name: record.late for record in records} == {"one": 2, "two": 0}
    assert "one: reached by some forwards only after it was merged" in context.warnings[0]
