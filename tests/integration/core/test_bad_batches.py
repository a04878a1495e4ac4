"""NaN and infinity in calibration batches: named, or left out from the layer on where they were found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from com_lightning import Average, ChainOfMergesCallback, MergeDataModule, MergeError, TaskLoaders
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, NonFiniteError, Task
from tests.helpers import FEATURES, Classifier, built, make_data, make_experts, perturb, quiet_trainer, relative
from tests.helpers.chains import only
from tests.helpers.zoo import averages

RULES = {
    "two-sided": ChainOptions(),
    "one-sided": ChainOptions(target="merged"),
    "regmean": ChainOptions("expert", "merged"),
}
RULES["plain"], RULES["corrected"] = ChainOptions(normalize=False), ChainOptions(residual=True)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


class Rooted(nn.Module):
    """One whose second layer gets NaN from inputs that are finite: a root of what is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(5, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        wrong = (x[:, :1] > 50).float()
        hidden = hidden + (-wrong).sqrt()
        if bool(hidden.isnan().any()):
            hidden = self.norm(hidden)
            int(hidden.sum())  # cannot be made an integer: whoever goes on with NaN fails here
        return self.second(self.norm(hidden))  # type: ignore[no-any-return]


def points(seed: int, count: int = 12) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))


def merge(
    experts: list[nn.Module],
    batches: list[list[Any]],
    rule: ChainOptions,
    on_bad_batch: Literal["raise", "skip"] = "skip",
    mask: Callable[[Any], Tensor | None] = lambda batch: None,
    call: Callable[[nn.Module, Any, int], object] = lambda module, batch, index: module(batch),
) -> tuple[dict[str, Tensor], list[LayerRecord], Context]:
    tasks = [Task(f"task{n}", e, b, masks=only(mask), call=call) for n, (e, b) in enumerate(zip(experts, batches))]
    merged, run = averages(experts), Context(on_bad_batch=on_bad_batch)
    return merged, merge_layers(tasks, merged, [0.5, 0.5], rule, run), run


def same(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = 2e-5) -> bool:
    return all(relative(left[name], value) < tolerance for name, value in right.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", RULES)
def test_a_bad_batch_is_as_if_it_were_not_there(rule: str, value: float) -> None:
    experts, batches = built(net), [[points(n) for n in range(3)], [points(n) for n in range(10, 13)]]
    good = merge(experts, [batches[0][:1] + batches[0][2:], batches[1]], RULES[rule])
    batches[0][1][3, 2] = value
    merged, records, run = merge(experts, batches, RULES[rule])
    assert same(merged, good[0])
    [skipped] = run.skipped
    assert (skipped.task, skipped.batch, skipped.layer) == ("task0", 1, "0")
    for ours, theirs in zip(records, good[1]):
        assert ours.rows == theirs.rows
        assert ours.residual == pytest.approx(theirs.residual, rel=1e-4)
    with pytest.raises(NonFiniteError, match=r"inputs of layer '0' hold NaN or infinity: task 'task0', batch 1"):
        merge(experts, batches, RULES[rule], "raise")


@pytest.mark.parametrize("rule", RULES)
def test_a_batch_that_turns_bad_midway_is_left_out_from_there_on(rule: str) -> None:
    """And what its forwards raise from there on is nobody's concern."""
    experts, batches = built(Rooted), [[points(n) for n in range(3)], [points(n) for n in range(10, 13)]]
    batches[1][2][0, 0] = 60.0
    merged, records, run = merge(experts, batches, RULES[rule])
    [skipped] = run.skipped
    assert (skipped.task, skipped.batch, skipped.layer) == ("task1", 2, "norm")
    rows = {record.name: record.rows for record in records}
    assert rows["first"] == {"task0": 36, "task1": 36}
    assert rows["norm"] == rows["second"] == {"task0": 36, "task1": 24}
    assert all(bool(value.isfinite().all()) for value in merged.values())
    assert all(record.residual is None or record.residual < 10 for record in records)
    with pytest.raises(NonFiniteError, match=r"inputs of layer 'norm'.*task 'task1', batch 2"):
        merge(experts, batches, RULES[rule], "raise")


def test_a_task_that_loses_all_its_batches_is_an_error() -> None:
    experts, batches = built(net), [[points(0)], [points(1), points(2)]]
    for batch in batches[1]:
        batch[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"task 'task1': none of its calibration batches is left.*layer '0'"):
        merge(experts, batches, ChainOptions())


def test_nan_at_padded_positions_is_not_bad() -> None:
    experts = built(net)
    batches = [[points(n).reshape(2, 6, 5)] for n in range(2)]
    expected = merge(experts, batches, ChainOptions(), mask=lambda batch: torch.ones(2, 6).bool())[0]
    padded = [[torch.cat([part[0], torch.full((2, 3, 5), float("nan"))], 1)] for part in batches]
    mask = torch.cat([torch.ones(2, 6), torch.zeros(2, 3)], 1).bool()
    for mode in ("raise", "skip"):
        merged, _, run = merge(experts, padded, ChainOptions(), mode, mask=lambda batch: mask)
        assert not run.skipped
        assert same(merged, expected)


def test_batch_normalisation_takes_no_moments_of_bad_batches() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

    experts = built(make)
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(8, 2, 6, 6, generator=generator) for _ in range(3)] for _ in range(2)]
    good = merge(experts, [batches[0][:2], batches[1]], ChainOptions())[0]
    batches[0][2][0, 0, 0, 0] = float("nan")
    merged, _, run = merge(experts, batches, ChainOptions())
    assert [entry.layer for entry in run.skipped] == ["0"]
    assert same(merged, good, 1e-4)


@pytest.mark.parametrize("scale", [1e18, 1e25, 1e-18, 1e-20])
@pytest.mark.parametrize("rule", RULES)
def test_squares_that_float32_cannot_hold_are_not_bad(rule: str, scale: float) -> None:
    """Without a bias the solution does not depend on the scale of the inputs, one for all."""
    torch.manual_seed(0)
    base = nn.Linear(5, 3, bias=False)
    experts = [perturb(nn.Linear(5, 3, bias=False), 0.3, seed=n) for n in range(2)]
    for expert in experts:
        expert.load_state_dict({"weight": expert.get_parameter("weight") + base.weight})
    batches = [[points(n)] for n in range(2)]
    scaled = [[batch * scale for batch in part] for part in batches]
    assert same(merge(experts, scaled, RULES[rule], "raise")[0], merge(experts, batches, RULES[rule])[0], 1e-4)


def test_what_overflows_float64_too_is_told_as_it_is() -> None:
    experts = [expert.double() for expert in built(lambda: nn.Linear(5, 3))]
    batches = [[points(n).double()] for n in range(2)]
    batches[1][0][0, 0] = 1e200
    with pytest.raises(NonFiniteError, match=r"are finite \(at most 1e\+200\), but the statistics"):
        merge(experts, batches, ChainOptions(normalize=False), "raise")


def test_a_solution_that_its_precision_cannot_hold_is_named() -> None:
    experts = [expert.half() for expert in built(lambda: nn.Linear(5, 3, bias=False))]
    with torch.no_grad():
        experts[0].get_parameter("weight").fill_(6e4)
        experts[1].get_parameter("weight").fill_(49984.0)

    def call(module: nn.Module, batch: Tensor, index: int) -> None:
        expert = float(module.get_parameter("weight")[0, 0]) in (60000.0, 49984.0)
        module(batch.half() * (3 if expert else 1))

    with pytest.raises(NonFiniteError, match=r"solution of layer ''.*weight.*torch.float16.*wider precision"):
        merge(experts, [[points(0)], [points(1)]], ChainOptions(normalize=False, ridge=0.0), "raise", call=call)


# The callback


def tasks(bad: Callable[[Tensor], None] = lambda x: None) -> MergeDataModule:
    x, y = torch.randn(24, FEATURES, generator=torch.Generator().manual_seed(0)), torch.zeros(24).long()
    bad(x)
    loaders = TaskLoaders(val=DataLoader(TensorDataset(x, y), 4))
    return MergeDataModule({"a": loaders, "b": make_data(1)}, num_samples=24)


def spoil(x: Tensor) -> None:
    x[5, 0] = float("nan")


@pytest.mark.filterwarnings("ignore")
def test_the_report_lists_what_was_skipped(tmp_path: Path) -> None:
    merger = ChainOfMergesCallback(
        dict(zip("ab", make_experts((3, 3)))), on_bad_batch="skip", output_dir=str(tmp_path / "out")
    )
    quiet_trainer(callbacks=[merger]).validate(Classifier(3), datamodule=tasks(spoil), verbose=False)
    [skipped] = merger.report.skipped
    assert (skipped.task, skipped.layer) == ("a", "body.0")
    line = f"Skipped: task 'a', batch {skipped.batch}, from layer 'body.0' on: its inputs hold NaN or infinity."
    assert line in str(merger.report)
    assert line in merger.report.to_markdown()
    [told] = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert (told["task"], told["batch"], told["layer"]) == ("a", skipped.batch, "body.0")
    assert all(bool(p.isfinite().all()) for p in merger.modules["a"].parameters())


def test_by_default_it_is_an_error_that_says_what_can_be_done() -> None:
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3)))))
    with pytest.raises(NonFiniteError, match=r"layer 'body.0'.*task 'a', batch \d.*on_bad_batch='skip'"):
        quiet_trainer(callbacks=[merger]).validate(Classifier(3), datamodule=tasks(spoil), verbose=False)


def test_a_wrong_value_is_told_before_data_is_read() -> None:
    wrong: Any = "ignore"
    with pytest.raises(MergeError, match="on_bad_batch: must be 'raise' or 'skip', got 'ignore'"):
        ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3)))), on_bad_batch=wrong)


@pytest.mark.parametrize("name", ["body.0.weight", "head.bias"])
def test_nan_in_an_expert_is_an_error_whatever_becomes_of_batches(name: str) -> None:
    experts = make_experts((3, 3))
    with torch.no_grad():
        experts[1].get_parameter(name).view(-1)[1] = float("nan")
    for method in (None, Average()):
        merger = ChainOfMergesCallback(dict(zip("ab", experts)), method, on_bad_batch="skip")
        with pytest.raises(MergeError, match=f"expert 'b': NaN or infinity in {name}"):
            merger.plan(Classifier(3), tasks())
