"""Errors that count by what they do to the predictions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule
from com_lightning.core.chain import sensitivity
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.dry_run import held_by_gradients
from com_lightning.core.chain.options import ChainOptions, Distance
from com_lightning.core.chain.sensitivity import RANK, Sensitivity, omega_of, roots
from com_lightning.core.solve import weighted_ridge as metric_module
from com_lightning.core.solve.ridge import factorize, solve
from com_lightning.core.solve.weighted_ridge import DAMPING, solve_weighted
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors
from tests.helpers import Classifier, built, make_data, make_experts, perturb, quiet_trainer, relative
from tests.helpers.chains import only

SENSITIVE: dict[str, ChainOptions] = {
    "probabilities": ChainOptions(sensitivity="probabilities"),
    "numbers": ChainOptions(sensitivity="numbers"),
    "one-sided": ChainOptions(target="merged", sensitivity="numbers"),
}


def tasks_of(experts: list[nn.Module], data: list[list[Any]], call: Callable[..., Any] | None = None) -> list[Task]:
    return [Task(f"task{n}", e, b, call or (lambda m, x, i: m(x))) for n, (e, b) in enumerate(zip(experts, data))]


def merged_by(rule: ChainOptions, tasks: list[Task]) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    states = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in tasks]
    merged: dict[str, Tensor] = {
        name: nn.Parameter(average([state[name] for state in states]), requires_grad=False)
        for name, tensor in states[0].items()
        if tensor.is_floating_point()
    }
    return merged, merge_layers(tasks, merged, [1 / len(tasks)] * len(tasks), rule)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=True), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def points(count: int = 40, tasks: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(10, 5, generator=generator) + n for _ in range(count // 10)] for n in range(tasks)]


def measured(net: nn.Module, batch: Tensor, distance: Distance) -> Tensor:
    """``H`` of the first layer of a network."""
    merged = {name: tensor for name, tensor, _ in named_tensors(net)}
    root = roots([Task("task", net, [batch])], merged, distance, Context())["0"][0]
    assert root is not None
    matrix = root @ root.T
    return matrix * len(matrix) / matrix.trace()


def test_it_is_the_second_moment_of_gradients() -> None:
    """Of two linear layers, where these are known: ``Aᵀ F A``, with ``A`` the second one's weight."""
    torch.manual_seed(0)
    head = nn.Linear(6, 4)
    net, second = nn.Sequential(nn.Linear(5, 6), head).eval(), head.weight.detach().double()
    numbers = measured(net, torch.randn(20_000, 5), "numbers")
    expected = second.T @ second
    torch.testing.assert_close(numbers, expected * 6 / expected.trace(), rtol=0.0, atol=0.1)
    batch = torch.randn(1, 5).expand(20_000, 5)  # one input, so that the probabilities are known
    p = (net(batch[:1])[0] / sensitivity.TEMPERATURE).softmax(0).detach().double()
    expected = second.T @ (p.diag() - p[:, None] * p) @ second
    torch.testing.assert_close(
        measured(net, batch, "probabilities"), expected * 6 / expected.trace(), rtol=0.0, atol=0.1
    )


def test_a_sketch_holds_a_matrix_of_its_rank() -> None:
    torch.manual_seed(0)
    outputs, rows = 3 * RANK, torch.randn(500, RANK // 2) @ torch.randn(RANK // 2, 3 * RANK)
    omega, entry = omega_of("layer", outputs, rows.device), Sensitivity.empty(outputs, rows.device)
    for part in torch.split(rows, 60):
        entry.add(part, omega)
    root = entry.root(omega)
    assert root is not None
    assert root.shape[1] <= RANK
    expected = rows.double().T @ rows.double()
    assert relative(root @ root.T, expected) < 1e-3


def test_nothing_that_predictions_react_to_is_no_metric() -> None:
    entry = Sensitivity.empty(4, torch.device("cpu"))
    entry.add(torch.zeros(3, 4), torch.eye(4))
    assert entry.root(torch.eye(4)) is None
    entry.add(torch.full((3, 4), torch.inf), torch.eye(4))
    assert entry.root(torch.eye(4)) is None


@pytest.mark.parametrize("drift", [True, False])
@pytest.mark.parametrize("rank", [2, 7])
def test_the_solution_is_that_of_the_dense_system(drift: bool, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metric_module, "TOLERANCE", 1e-4)  # what is gained beyond 1e-2 does not show in a merged model
    torch.manual_seed(0)
    o, k, importance, ridge = 6, 4, [0.2, 0.5, 0.3], 0.02
    rows = [torch.randn(30, k).double() for _ in importance]
    grams = [(x.T @ x / len(x))[None] for x in rows]
    weights = [torch.randn(1, o, k).double() for _ in importance]
    drifts = [torch.randn(1, o, k).double() if drift else None for _ in importance]
    own = [torch.randn(o, rank).double() for _ in importance]
    factor = factorize(grams, importance, ridge)
    start = solve(factor, grams, drifts, weights, importance)
    solution, steps = solve_weighted(factor, grams, drifts, weights, importance, ridge, own, start)
    mean = sum(a * w[0] for a, w in zip(importance, weights))
    scale = sum(a * g[0].diagonal().mean() for a, g in zip(importance, grams))
    assert isinstance(mean, Tensor)
    assert isinstance(scale, Tensor)
    system, right = torch.zeros(o * k, o * k).double(), torch.zeros(o, k).double()
    for share, gram, weight, gap, root in zip(importance, grams, weights, drifts, own):
        metric = root @ root.T + DAMPING * torch.eye(o).double()
        system += share * torch.kron(metric, gram[0] + ridge * scale * torch.eye(k).double())
        right += share * metric @ ((weight[0] - mean) @ gram[0] + (gap[0] if gap is not None else 0.0))
    expected = mean + torch.linalg.solve(system, right.flatten()).view(o, k)
    assert 0 < steps <= 24
    assert relative(solution[0], expected) < 1e-3


def test_equal_metrics_change_nothing() -> None:
    torch.manual_seed(0)
    grams = [(x.T @ x)[None] for x in (torch.randn(20, 4).double(), torch.randn(20, 4).double())]
    weights = [torch.randn(1, 6, 4).double() for _ in grams]
    factor = factorize(grams, [0.5, 0.5], 0.01)
    start = solve(factor, grams, [None, None], weights, [0.5, 0.5])
    root = torch.randn(6, 3).double()
    solution, steps = solve_weighted(factor, grams, [None, None], weights, [0.5, 0.5], 0.01, [root, root], start)
    assert steps <= 1
    assert relative(solution, start) < 1e-9


@pytest.mark.parametrize("rule", SENSITIVE)
def test_identical_experts_come_back(rule: str) -> None:
    expert = built(network)[0]
    merged, records = merged_by(SENSITIVE[rule], tasks_of([expert, expert], points()))
    assert any(record.cg_steps is not None for record in records)
    for name, tensor, _ in named_tensors(expert):
        torch.testing.assert_close(merged[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rule", SENSITIVE)
def test_it_changes_what_is_merged_and_leaves_the_experts_alone(rule: str) -> None:
    experts = built(network)
    before = [copy.deepcopy(expert.state_dict()) for expert in experts]
    merged, records = merged_by(SENSITIVE[rule], tasks_of(experts, points()))
    plain, _ = merged_by(ChainOptions(target=SENSITIVE[rule].target), tasks_of(experts, points()))
    assert [record.name for record in records if record.cg_steps is not None] == ["0", "2", "4"]
    assert relative(merged["2.weight"], plain["2.weight"]) > 1e-3
    for expert, state in zip(experts, before):
        assert all(torch.equal(value, state[name]) for name, value in expert.state_dict().items())
        assert all(p.grad is None and not part._forward_hooks for part in expert.modules() for p in part.parameters())


def test_an_output_that_a_task_does_not_read_is_left_to_the_other() -> None:
    experts = built(lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)))
    with torch.no_grad():
        experts[0][2].weight[:, :3] = 0.0  # type: ignore[index]
        experts[1][2].weight[:, 3:] = 0.0  # type: ignore[index]
    data = points()
    shares = {}
    for rule in (ChainOptions(ridge=1e-6), ChainOptions(ridge=1e-6, sensitivity="numbers")):
        merged, _ = merged_by(rule, tasks_of(experts, [data[0], data[0]]))
        own = [expert[0].weight.detach() for expert in experts]  # type: ignore[index]
        gaps = [(merged["0.weight"] - weight).norm(dim=1) for weight in own]
        shares[rule.sensitivity] = gaps[0] / (gaps[0] + gaps[1])
    assert shares[None].sub(0.5).abs().max() < 0.05  # half way between the two
    assert shares["numbers"][:3].min() > 0.65  # nearer to the second, which reads it
    assert shares["numbers"][3:].max() < 0.35


def test_functions_are_layers_too() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(nn.functional.linear(x, self.one).relu_(), self.other)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw, self.head = Raw(), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.raw(x))  # type: ignore[no-any-return]

    _, records = merged_by(SENSITIVE["numbers"], tasks_of(built(Wrapped), points()))
    assert {r.name for r in records if r.cg_steps is not None} == {"raw.one", "raw.other", "head"}


def test_images_and_their_channels() -> None:
    def network() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2), nn.Flatten(), nn.Linear(64, 3)
        )

    data = [[torch.randn(4, 1, 8, 8)] for _ in range(2)]
    _, records = merged_by(SENSITIVE["numbers"], tasks_of(built(network), data))
    assert {r.name for r in records if r.cg_steps is not None} == {"0", "4"}  # groups are solved on their own


def test_padding_tells_nothing() -> None:
    config = BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    config._attn_implementation = "eager"

    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = BertModel(config, add_pooling_layer=False), nn.Linear(16, 3)

        def forward(self, batch: Any) -> Tensor:
            return self.head(self.net(**batch).last_hidden_state[:, 0])  # type: ignore[no-any-return]

    experts = built(Text)
    ids = torch.randint(1, 30, (8, 5), generator=torch.Generator().manual_seed(0))
    results = []
    for padding in (0, 4):
        padded = nn.functional.pad(ids, (0, padding))
        batch = {"input_ids": padded, "attention_mask": nn.functional.pad(torch.ones_like(ids), (0, padding))}
        tasks = tasks_of(experts, [[batch], [batch]])
        for task in tasks:
            task.masks = only(lambda own: own["attention_mask"].bool())
        results.append(merged_by(SENSITIVE["numbers"], tasks)[0])
    for name, value in results[0].items():
        if "embeddings" not in name:
            torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_module_without_gradients_is_merged_as_without_the_option_and_told_of(tmp_path: Any) -> None:
    class Without(Classifier):
        @torch.no_grad()
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)

    experts = {"a": Without(3), "b": Without(3)}
    for number, expert in enumerate(experts.values()):
        perturb(expert.body, 0.3, seed=number)
    data = {name: make_data(number) for number, name in enumerate(experts)}
    states = []
    distances: tuple[Distance | None, ...] = (None, "probabilities")
    for distance in distances:
        merger = ChainOfMergesCallback(dict(experts), ChainOfMerges(sensitivity=distance), private=["head"])
        quiet_trainer(callbacks=[merger]).validate(
            copy.deepcopy(experts["a"]), datamodule=MergeDataModule(data, num_samples=20), verbose=False
        )
        states.append(merger.modules["a"].state_dict())
        told = [warning for warning in merger.report.warnings if "sensitivity" in warning]
        assert bool(told) == (distance is not None)
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value)


def test_in_a_trainer_it_uses_what_the_user_validates() -> None:
    experts = {f"task{n}": expert for n, expert in enumerate(make_experts())}
    data = {f"task{n}": make_data(n, classes) for n, classes in enumerate((3, 4))}
    merger = ChainOfMergesCallback(dict(experts), ChainOfMerges(sensitivity="probabilities"), private=["head"])
    quiet_trainer(callbacks=[merger]).validate(
        copy.deepcopy(experts["task0"]), datamodule=MergeDataModule(data, num_samples=20), verbose=False
    )
    assert [layer.name for layer in merger.report.layers if layer.cg_steps is not None] == ["body.0", "body.3"]
    assert not [warning for warning in merger.report.warnings if "sensitivity" in warning]


def test_the_memory_of_gradients_grows_with_batch_and_depth() -> None:
    def held(rows: int, depth: int, width: int = 50) -> int:
        experts = built(lambda: nn.Sequential(*[m for _ in range(depth) for m in (nn.Linear(width, width), nn.Tanh())]))
        tasks = [Task(str(n), expert, [torch.randn(rows, width)]) for n, expert in enumerate(experts)]
        merged = {name: nn.Parameter(value.clone(), False) for name, value in experts[0].named_parameters()}
        return held_by_gradients(tasks, merged, "numbers")

    one = 4 * 50 * 100  # an activation of float32
    assert held(100, 5) == pytest.approx(5 * one, rel=0.3)
    assert held(200, 5) == pytest.approx(2 * held(100, 5), rel=0.1)
    assert held(100, 10) > 1.8 * held(100, 5)
