"""Biases and norms that each task keeps for itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.task_tensors import task_tensors
from com_lightning.core.solve.task_biases import centred, with_task_biases
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from com_lightning.results.folder import load_results
from tests.helpers import built, make_data, make_experts, quiet_trainer, relative

PRIVATE = {
    "two-sided": ChainOptions(private_biases=True),
    "one-sided": ChainOptions(target="merged", private_biases=True),
    "sensitive": ChainOptions(private_biases=True, sensitivity="numbers"),
    "all": ChainOptions(private_biases=True, sensitivity="numbers", residual=True),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3))


def attentive() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, groups=2))


MODELS: dict[str, Any] = {
    "linear": (network, lambda n: torch.randn(12, 5) + n),
    "attention": (attentive, lambda n: torch.randn(3, 4, 8) + n),
    "images": (images, lambda n: torch.randn(3, 1, 9, 9) + n),
}


def merged_by(
    rule: ChainOptions, experts: list[nn.Module], batches: list[list[Tensor]]
) -> tuple[list[Task], Any, Any, Any]:
    tasks = [Task(f"task{n}", expert, own) for n, (expert, own) in enumerate(zip(experts, batches))]
    states = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in tasks]
    merged: dict[str, Tensor] = {}
    for name, tensor in states[0].items():
        if tensor.is_floating_point():
            value = average([state[name] for state in states])
            merged[name] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    own = task_tensors(tasks, merged) if rule.private_biases else {}
    records = merge_layers(tasks, merged, [1 / len(tasks)] * len(tasks), rule, task_tensors=own)
    return tasks, merged, own, records


def modules(tasks: list[Task], merged: dict[str, Tensor], own: dict[str, list[Tensor]]) -> list[nn.Module]:
    result = []
    for number, task in enumerate(tasks):
        values = {**merged, **{name: each[number] for name, each in own.items()}}
        tensors = {id(tensor): values[name] for name, tensor, _ in named_tensors(task.expert) if name in values}
        result.append(copy_module(task.expert, tensors))
    return result


def data_for(name: str) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[MODELS[name][1](n) for _ in range(3)] for n in range(2)]


@pytest.mark.parametrize("rule", PRIVATE)
@pytest.mark.parametrize("name", MODELS)
def test_identical_experts_come_back(name: str, rule: str) -> None:
    expert = built(MODELS[name][0])[0].double()
    batches = [[batch.double() for batch in own] for own in data_for(name)]
    tasks, merged, own, _ = merged_by(PRIVATE[rule], [expert, expert], batches)
    for task, module in zip(tasks, modules(tasks, merged, own)):
        for batch in task.batches:
            torch.testing.assert_close(module(batch), expert(batch), rtol=1e-5, atol=1e-6)


def test_what_is_private_is_every_bias_and_norm() -> None:
    _, _, own, _ = merged_by(PRIVATE["two-sided"], built(network), data_for("linear"))
    assert set(own) == {"0.bias", "2.weight", "2.bias", "4.bias"}
    assert all(not torch.equal(*each) for each in own.values())
    _, _, own, _ = merged_by(PRIVATE["two-sided"], built(attentive), data_for("attention"))
    assert {"self_attn.in_proj_bias", "self_attn.out_proj.bias", "norm1.weight"} <= set(own)
    assert all(not torch.equal(*each) for each in own.values())
    _, _, own, _ = merged_by(PRIVATE["two-sided"], built(images), data_for("images"))
    assert set(own) == {"0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "3.bias"}
    assert all(not torch.equal(*each) for each in own.values())


@pytest.mark.parametrize("name", MODELS)
def test_experts_that_differ_in_their_private_part_alone_come_back(name: str) -> None:
    """One shared matrix serves them all, so nothing has to be given up."""
    first = built(MODELS[name][0])[0].double()
    second = copy.deepcopy(first)
    with torch.no_grad():
        for key, tensor, _ in named_tensors(second):
            own = "bias" in key or "norm" in key or (name == "images" and key.startswith("1."))
            if own and tensor.is_floating_point():
                tensor.mul_(1.5).add_(0.1)
    batches = [[batch.double() for batch in own] for own in data_for(name)]
    rule = ChainOptions(private_biases=True, ridge=1e-9)
    tasks, merged, own, _ = merged_by(rule, [first, second], batches)
    shared = modules(*merged_by(ChainOptions(ridge=1e-9), [first, second], batches)[:3])
    for task, module, plain in zip(tasks, modules(tasks, merged, own), shared):
        output, expected = (
            torch.cat([module(b) for b in task.batches]),
            torch.cat([task.expert(b) for b in task.batches]),
        )
        assert relative(output, expected) < 1e-3
        assert relative(torch.cat([plain(b) for b in task.batches]), expected) > 1e-2


def test_the_matrix_is_the_least_squares_one_about_the_means() -> None:
    torch.manual_seed(0)
    importance, rows = [0.3, 0.7], [torch.randn(40, 3).double() + 2, torch.randn(30, 3).double() - 1]
    weights = [torch.randn(1, 2, 4).double() for _ in rows]
    full = [torch.cat([x, torch.ones(len(x), 1).double()], 1) for x in rows]
    grams = [(x.T @ x / len(x))[None] for x in full]
    targets = [x @ w[0].T + 0.3 * torch.randn(len(x), 2).double() for x, w in zip(full, weights)]
    drifts: list[Tensor | None] = [((y - x @ w[0].T).T @ x / len(x))[None] for x, y, w in zip(full, targets, weights)]
    about, pure, matrices = centred(grams, drifts, weights)
    gram = sum(a * g for a, g in zip(importance, about))
    right = sum(a * (w @ g + d) for a, w, g, d in zip(importance, matrices, about, pure) if d is not None)
    assert isinstance(gram, Tensor)
    assert isinstance(right, Tensor)
    matrix = torch.linalg.solve(gram.mT, right.mT).mT
    solved = with_task_biases([matrix] * 2, grams, drifts, weights)
    # With indicators of the tasks as further inputs it is one regression.
    inputs, outputs = [], []
    for number, (x, y, share) in enumerate(zip(rows, targets, importance)):
        indicator = torch.zeros(len(x), 2).double()
        indicator[:, number] = 1
        scale = (share / len(x)) ** 0.5
        inputs.append(torch.cat([x, indicator], 1) * scale)
        outputs.append(y * scale)
    expected = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs))[0].T
    torch.testing.assert_close(matrix[0], expected[:, :3])
    for number, own in enumerate(solved):
        torch.testing.assert_close(own[0, :, -1], expected[:, 3 + number])


def test_it_is_saved_loaded_validated_and_counted(tmp_path: Path) -> None:
    experts = {f"task{n}": expert for n, expert in enumerate(make_experts())}
    data = {f"task{n}": make_data(n, classes) for n, classes in enumerate((3, 4))}
    folder = tmp_path / "out"
    method = ChainOfMerges(private_biases=True, refit_heads=False)
    merger = ChainOfMergesCallback(dict(experts), method, private=["head"], output_dir=str(folder))
    tasks = MergeDataModule(data, num_samples=20)
    trainer = quiet_trainer(callbacks=[merger])
    trainer.validate(copy.deepcopy(experts["task0"]), datamodule=tasks, verbose=False)
    one, other = merger.modules.values()
    assert one.body[0].weight is other.body[0].weight  # type: ignore[index, union-attr]
    assert not torch.equal(one.body[0].bias, other.body[0].bias)  # type: ignore[index, union-attr]
    assert set(load_file(folder / "merged.safetensors")) == {"body.0.weight", "body.3.weight"}
    for task, module in load_results(folder, copy.deepcopy(experts["task0"]), list(experts)).items():
        for name, value in merger.modules[task].state_dict().items():
            assert torch.equal(module.state_dict()[name], value), (task, name)
    report = merger.report
    assert str(report.parameters["body.0.bias"]) == "private, solved for each task"
    own = sum(what.status == "private, solved for each task" for what in report.parameters.values())
    assert f"private to their tasks (head.weight, head.bias, {own} biases and norms solved for each task)" in str(
        report
    )
    heads = sum(p.numel() for expert in experts.values() for p in expert.head.parameters())
    assert report.sizes["private"] == heads + 2 * (8 + 8 + 8 + 8)
    assert set(report.metrics["merged"]) == set(experts)


def test_a_merge_goes_on_where_it_was(tmp_path: Path) -> None:
    from com_lightning.core.sweep.context import Context
    from com_lightning.results.journal import FileJournal

    class Stop(Exception):
        pass

    experts, batches = built(network), data_for("linear")

    def merge(stop: int | None) -> dict[str, list[Tensor]]:
        tasks = [Task(f"task{n}", expert, own) for n, (expert, own) in enumerate(zip(experts, batches))]
        states = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in tasks]
        merged: dict[str, Tensor] = {
            n: nn.Parameter(average([s[n] for s in states]), requires_grad=False) for n in states[0]
        }
        own = task_tensors(tasks, merged)
        seen: list[LayerRecord] = []

        def on_layer(record: LayerRecord) -> None:
            seen.append(record)
            if len(seen) == stop:
                raise Stop

        run = Context(on_layer, journal=FileJournal(tmp_path / "journal"))
        run.journal.bind({"what": "the same"})
        merge_layers(tasks, merged, [0.5, 0.5], PRIVATE["two-sided"], run, task_tensors=own)
        return {**own, **{name: [tensor] for name, tensor in merged.items()}}

    with pytest.raises(Stop):
        merge(2)
    resumed = merge(None)
    _, merged, own, _ = merged_by(PRIVATE["two-sided"], experts, batches)
    for name, each in {**own, **{name: [tensor] for name, tensor in merged.items()}}.items():
        for value, expected in zip(resumed[name], each):
            torch.testing.assert_close(value, expected, rtol=0.0, atol=0.0)
