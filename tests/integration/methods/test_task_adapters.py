"""A correction of low rank for each task, on top of any rule."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from com_lightning import (
    TIES,
    Average,
    ChainOfMerges,
    MergeDataModule,
    MergeError,
    MergeResult,
    MergingMethod,
    Refitted,
    TaskAdapters,
    TaskArithmetic,
    TaskLoaders,
    merge,
)
from com_lightning.cli import main
from tests.helpers import Classifier, make_data, make_experts, perturb, relative
from tests.helpers.commands import MODEL, QUIET, base_file, expert_files

INNER = {
    "average": Average(),
    "ties": TIES(0.5),
    "base": TaskArithmetic(scale=0),
    "chain": ChainOfMerges(refit_heads=False),
    "biases": ChainOfMerges(private_biases=True, refit_heads=False),
}


def base() -> Classifier:
    """What ``make_experts`` starts from."""
    torch.manual_seed(0)
    return Classifier()


def points(seed: int) -> TaskLoaders:
    """Points that vary more in some directions than in others."""
    x, y = next(iter(make_data(seed, count=96, batch_size=96).val_dataloader()))
    return TaskLoaders(DataLoader(TensorDataset(x * torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]), y), batch_size=16))


def merged(method: MergingMethod) -> MergeResult:
    experts = dict(zip("ab", make_experts((3, 3), scale=0.5)))
    data = MergeDataModule({task: points(n) for n, task in enumerate("ab")}, num_samples=96)
    return merge(Classifier(), experts, data, method, private=["head"], base=base(), baselines=False)


def error(result: MergeResult) -> float:
    """The larger error of both bodies' outputs, relative to the experts'."""
    errors = []
    for number, expert in enumerate(make_experts((3, 3), scale=0.5)):
        x = torch.cat([batch[0] for batch in points(number).val_dataloader()])
        body, theirs = result.modules["ab"[number]].body, expert.body
        errors.append(relative(body(x).detach(), theirs(x).detach()))  # type: ignore[operator]
    return max(errors)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("rule", INNER)
def test_shared_weights_stay_as_the_rule_makes_them(rule: str, data: bool) -> None:
    without, result = merged(INNER[rule]), merged(TaskAdapters(INNER[rule], 2, data))
    assert result.corrections is not None
    names = [name for name in without.shared if name in result.corrections.names or name in result.shared]
    assert len(names) >= 2
    for name in names:
        ours, theirs = (dict(m.named_parameters())[name] for m in (result.corrections.base, without.modules["a"]))
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", INNER)
def test_the_error_falls_with_the_rank(rule: str) -> None:
    none = error(merged(INNER[rule]))
    few, some, full = (error(merged(TaskAdapters(INNER[rule], rank))) for rank in (1, 3, 64))
    assert full < some < few < none
    assert full < 0.1  # the ridge


@pytest.mark.parametrize("rule", INNER)
def test_full_rank_without_data_is_the_expert(rule: str) -> None:
    assert error(merged(TaskAdapters(INNER[rule], 64, data=False))) < 1e-5


def test_data_make_better_corrections_than_weights_alone() -> None:
    assert error(merged(TaskAdapters(Average(), 2))) < 0.8 * error(merged(TaskAdapters(Average(), 2, data=False)))


def test_without_data_it_is_the_singular_value_decomposition() -> None:
    experts, rule = dict(zip("ab", make_experts((3, 3), scale=0.5))), TaskAdapters(TaskArithmetic(scale=0), 2, False)
    assert rule.needs == {"base"}
    result = merge(Classifier(), experts, method=rule, private=["head"], base=base())
    for task, expert in experts.items():
        start, theirs = base().body[3], expert.body[3]
        assert isinstance(start, nn.Linear)
        assert isinstance(theirs, nn.Linear)
        left, values, right = torch.linalg.svd((theirs.weight - start.weight).detach().double())
        wanted = start.weight + (left[:, :2] * values[:2] @ right[:2]).float()
        parameters = dict(result.modules[task].named_parameters())
        torch.testing.assert_close(parameters["body.3.weight"], wanted)
        for name, parameter in expert.named_parameters():
            if parameter.dim() == 1 or "head" in name:
                assert torch.equal(parameters[name], parameter), name


def test_the_report_counts_shared_values_and_those_of_tasks() -> None:
    report = merged(TaskAdapters(TIES(0.5), 2)).report
    assert str(report.parameters["body.0.weight"]) == "merged by TIES, with a correction of rank 2 for each task"
    assert report.parameters["body.0.bias"].status == "private, solved for each task"
    assert report.sizes["correction"] == 2 * 2 * (6 + 8 + 8 + 8)
    assert report.sizes["merged by TIES"] == 6 * 8 + 8 * 8
    assert report.sizes["private"] == 2 * (4 * 8 + 3 * 8 + 3)
    assert [layer.rank for layer in report.layers] == [2, 0, 2]
    assert "averaged" not in str(merged(TaskAdapters(Average(), 2)).report.parameters["body.0.weight"].detail)


def test_a_layer_has_one_record() -> None:
    report = merged(TaskAdapters(ChainOfMerges(refit_heads=False), 2)).report
    assert [layer.name for layer in report.layers] == ["body.0", "body.1", "body.3"]
    assert str(report.parameters["body.3.weight"]) == "solved: with a correction of rank 2 for each task"
    chain = merged(ChainOfMerges()).report
    assert report.layers[2].distance["a"] < chain.layers[2].distance["a"]


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        (TaskAdapters(Average(), 0), "rank: must be 1 or more, got 0"),
        (TaskAdapters(Average(), ridge=-1.0), "ridge: must be 0 or more"),
        (TaskAdapters(ChainOfMerges(task_rank=2)), "ChainOfMerges gives each task corrections already"),
        (TaskAdapters(TaskAdapters(Average())), "TaskAdapters gives each task corrections already"),
        (TaskAdapters(Refitted(Average())), r"write Refitted\(method=TaskAdapters"),
        (TaskAdapters(ChainOfMerges()), r"write Refitted\(method=TaskAdapters"),
    ],
)
def test_what_cannot_be_is_an_early_error(method: MergingMethod, problem: str) -> None:
    with pytest.raises(MergeError, match=problem):
        merged(method)


def test_the_command_line_writes_adapters_that_peft_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    rule = ["--method=TaskAdapters", "--method.method=TIES", "--method.method.density=0.5", "--method.rank=2"]
    files = [*expert_files(tmp_path), base_file(tmp_path)]
    main(["merge", *MODEL, *QUIET, *files, *rule, "--method.data=false", f"--output_dir={out}"])
    for task in "ab":
        module = Classifier.load_from_checkpoint(out / f"{task}.ckpt", weights_only=True).eval()
        start = Classifier.load_from_checkpoint(out / "adapters" / "base.ckpt", weights_only=True)
        start.head = copy.deepcopy(module.head)  # which may have another shape
        loaded, x = PeftModel.from_pretrained(start, str(out / "adapters" / task)).eval(), torch.randn(5, 6)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), module(x), rtol=1e-4, atol=1e-5)


class Generator(LightningModule):
    """A user's module around GPT-2, whose linear layers are function calls."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net: Any = GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=12, n_embd=16, n_layer=2, n_head=2))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.net(batch, labels=batch).loss)


@pytest.mark.parametrize("method", [TaskAdapters(Average(), 2), ChainOfMerges(task_rank=2)], ids=["around", "within"])
def test_conv1d_of_gpt_2_has_corrections_that_peft_loads(method: MergingMethod, tmp_path: Path) -> None:
    experts = {task: perturb(Generator(), 0.1, seed=n) for n, task in enumerate("ab")}
    batches = torch.randint(30, (3, 4, 9), generator=torch.Generator().manual_seed(0))
    texts: Any = list(batches)
    data = MergeDataModule({task: TaskLoaders(DataLoader(texts, batch_size=None)) for task in experts})
    result = merge(Generator(), experts, data, method, private=[], baselines=False)
    parameters = result.report.parameters
    corrected = {name for name, outcome in parameters.items() if "rank 2" in str(outcome.detail)}
    assert corrected == {n for n in parameters if n.endswith(("attn.weight", "proj.weight", "c_fc.weight"))}
    assert len(corrected) == 8
    [warning] = [text for text in result.report.warnings if text.startswith("no corrections")]
    assert "net.transformer.wpe.weight (embedding)" in warning
    assert "(tied)" in warning
    result.save(tmp_path / "out")
    for task, module in result.modules.items():
        start = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "adapters" / "base")
        loaded = PeftModel.from_pretrained(start, str(tmp_path / "out" / "adapters" / task)).eval()
        with torch.no_grad():
            ours, theirs = (each(batches[0]).logits for each in (module.eval().net, loaded))  # type: ignore[operator]
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-4)


def test_a_share_of_the_model_for_each_task() -> None:
    result = merged(ChainOfMerges(task_share=0.7, sensitivity="probabilities", normalize=False))
    own = sum(result.report.sizes[what] for what in ("correction", "private")) / 2 - (3 * 8 + 3)
    shared = sum(p.numel() for p in Classifier().body.parameters())
    assert 0.4 * shared < own <= 0.7 * shared
    assert error(result) < error(merged(ChainOfMerges(sensitivity="probabilities", normalize=False)))
    wrong = ChainOfMerges(task_share=1.5, task_rank=2)
    with pytest.raises(MergeError) as caught:
        merged(wrong)
    assert [text.split(":")[0] for text in caught.value.problems] == ["task_share"] * 3
