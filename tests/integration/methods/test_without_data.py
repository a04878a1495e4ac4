"""The base model, merges without data, and rules on the command line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

import com_lightning
from com_lightning import (
    TIES,
    TSVM,
    Average,
    ChainOfMerges,
    ChainOfMergesCallback,
    Combined,
    KarcherMean,
    MergeDataModule,
    MergeError,
    MergeTrainer,
    MergingMethod,
    TaskArithmetic,
    methods,
)
from com_lightning.cli import main
from com_lightning.experts.load import load_expert
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer, relative
from tests.helpers.adapters import adapted, trained
from tests.helpers.commands import base_file, expert_files
from tests.helpers.running import save_lightning
from tests.helpers.texts import TextModule

MODEL = ["--model=tests.helpers.Classifier"]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


def make_base() -> Classifier:
    """What ``make_experts`` starts from."""
    torch.manual_seed(0)
    return Classifier()


def make_tasks() -> MergeDataModule:
    return MergeDataModule({"a": make_data(0, 3), "b": make_data(1, 4)}, num_samples=30)


def arithmetic(scale: float = 0.3) -> dict[str, Tensor]:
    """What task arithmetic makes of the body."""
    base = make_base().body.state_dict()
    experts = [expert.body.state_dict() for expert in make_experts()]
    return {n: base[n] + scale * sum(e[n] - base[n] for e in experts) for n in base}


def check(module: nn.Module, scale: float = 0.3) -> None:
    assert isinstance(module, Classifier)
    state = module.body.state_dict()
    for name, value in arithmetic(scale).items():
        assert relative(state[name], value) < 1e-5, name


@pytest.mark.parametrize("how", ["checkpoint", "state dict", "module", "part"])
def test_a_base_is_given_as_an_expert_is(how: str, tmp_path: Path) -> None:
    base = make_base()
    torch.save(base.state_dict(), tmp_path / "base.pt")
    sources: dict[str, Any] = {
        "checkpoint": save_lightning(base, tmp_path / "base.ckpt"),
        "state dict": tmp_path / "base.pt",
        "module": base,
        "part": base.body.state_dict(),
    }
    experts = make_experts()
    model = copy.deepcopy(experts[0])
    merger = ChainOfMergesCallback({"a": experts[0], "b": experts[1]}, TaskArithmetic(), base=sources[how])
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=make_tasks(), verbose=False)
    check(model)
    assert str(merger.report.parameters["body.0.weight"]) == "merged by TaskArithmetic"
    assert merger.report.sizes["merged by TaskArithmetic"] == sum(p.numel() for p in model.body.parameters())
    assert not merger.report.layers


def test_the_model_is_the_base_by_default() -> None:
    experts = make_experts()
    model = make_base()
    merger = ChainOfMergesCallback({"a": experts[0], "b": experts[1]}, TaskArithmetic())
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=make_tasks(), verbose=False)
    check(model)


def test_a_fresh_model_is_no_base() -> None:
    experts = make_experts()
    torch.manual_seed(1)
    sources: dict[str, Any] = {"a": experts[0], "b": experts[1]}
    with pytest.raises(
        MergeError, match="takes those of your model, but the experts seem not to be fine-tuned from it"
    ):
        ChainOfMergesCallback(sources, TIES()).plan(Classifier(), None)
    for method in (Average(), KarcherMean()):  # which need no base
        ChainOfMergesCallback(sources, method).plan(Classifier(), None)
    with pytest.warns(UserWarning, match="base: the experts seem not to be fine-tuned from it"):
        ChainOfMergesCallback(sources, TIES(), base=Classifier()).merge(Classifier())


def test_a_base_that_is_an_expert_is_told_of() -> None:
    experts = make_experts()
    merger = ChainOfMergesCallback({"a": experts[0], "b": experts[1]}, TIES())
    assert any("has the weights of expert 'a'" in w for w in merger.plan(experts[0], None).parameters.warnings)


def test_a_base_that_does_not_fit(tmp_path: Path) -> None:
    experts = make_experts()
    sources: dict[str, Any] = {"a": experts[0], "b": experts[1]}
    with pytest.raises(MergeError) as caught:
        ChainOfMergesCallback(sources, TIES(0), base=Classifier(width=5)).plan(make_base(), None)
    assert "body.0.weight is (5, 6), in the experts (8, 6)" in str(caught.value)
    assert "density: must be above 0" in str(caught.value)
    with pytest.raises(MergeError, match=r"base \(.*nowhere.ckpt\): no such file"):
        ChainOfMergesCallback(sources, TIES(), base=tmp_path / "nowhere.ckpt").plan(make_base(), None)


class Tabled(LightningModule):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.table = nn.Embedding(rows, 3)
        self.mix = nn.Linear(3, 3)

    def validation_step(self, batch: Any, batch_idx: int) -> None: ...


def test_a_shorter_table_of_the_base_grows() -> None:
    base = Tabled(5)
    experts = [copy.deepcopy(base), Tabled(7)]
    with torch.no_grad():
        experts[1].table.weight[:5] = base.table.weight
        experts[1].mix.load_state_dict(base.mix.state_dict())
    perturb(experts[0], 0.1)
    perturb(experts[1], 0.1)
    merger = ChainOfMergesCallback(dict(zip("ab", experts)), TaskArithmetic(1.0), resize_embeddings=True, base=base)
    merger.merge(base)
    result = merger.modules["a"].get_parameter("table.weight")
    expected = experts[0].table.weight + experts[1].table.weight[:5] - base.table.weight
    assert relative(result[:5], expected) < 1e-6
    assert relative(result[5:], experts[1].table.weight[5:]) < 1e-6


def test_rules_that_solve_layers_combine_with_others() -> None:
    """What the chain has no closed form for is left to the other rule; what it solves is as on its own."""

    class Extra(Classifier):
        def __init__(self, classes: int = 3) -> None:
            super().__init__(classes)
            self.shift = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.body(x), self.shift[None].exp() * 0])[: len(x)])  # type: ignore[no-any-return]

    torch.manual_seed(0)
    base = Extra()
    experts = [perturb(copy.deepcopy(base), 0.2, seed) for seed in (1, 2)]
    found = {}
    for name, method in {"alone": ChainOfMerges(), "both": Combined(ChainOfMerges(), TaskArithmetic(1.0))}.items():
        merger = ChainOfMergesCallback(dict(zip("ab", experts)), method, private=["head"], base=base)
        tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=30)
        quiet_trainer(callbacks=[merger]).validate(copy.deepcopy(base), datamodule=tasks, verbose=False)
        found[name] = merger
    one, two = (merger.modules["a"].state_dict() for merger in found.values())
    assert all(torch.equal(one[name], two[name]) for name in one if name.startswith("body"))
    expected = experts[0].get_parameter("shift") + experts[1].get_parameter("shift") - base.shift
    assert relative(two["shift"], expected) < 1e-6
    assert str(found["both"].report.parameters["shift"]) == "merged by TaskArithmetic"
    assert str(found["both"].report.parameters["body.0.weight"]) == "solved"
    assert found["both"].report.method["matrices"]["class"] == "ChainOfMerges"
    assert len(found["both"].report.layers) == len(found["alone"].report.layers)


# -- without data ------------------------------------------------------------------------------------------------------


def test_a_merge_without_data(tmp_path: Path) -> None:
    experts, base = make_experts(), make_base()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merger = ChainOfMergesCallback({"a": experts[0], "b": experts[1]}, TaskArithmetic(), output_dir=str(tmp_path / "m"))
    report = merger.merge(base)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    for task, expert in zip("ab", experts):
        loaded = Classifier.load_from_checkpoint(tmp_path / "m" / f"{task}.ckpt", weights_only=True)
        check(loaded)
        assert torch.equal(loaded.head.weight, expert.head.weight)
        check(merger.modules[task])
    assert all(parameter.requires_grad for parameter in merger.modules["a"].parameters())
    assert not report.metrics
    assert not report.samples
    assert json.loads((tmp_path / "m" / "report.json").read_text())["method"]["class"] == "TaskArithmetic"
    assert str(report).startswith("TaskArithmetic: no calibration data")


def test_a_rule_that_needs_data_says_so() -> None:
    experts = make_experts()
    sources: dict[str, Any] = {"a": experts[0], "b": experts[1]}
    for method in (ChainOfMerges(), Combined(ChainOfMerges(), Average())):
        with pytest.raises(MergeError, match=rf"{type(method).__name__} needs the tasks' data"):
            ChainOfMergesCallback(sources, method).merge(make_base())
    with pytest.raises(MergeError, match="experts: none is given"):
        ChainOfMergesCallback({}, Average()).merge(make_base())


def test_half_precision_experts_without_data() -> None:
    base, experts = make_base().bfloat16(), [expert.bfloat16() for expert in make_experts()]
    merger = ChainOfMergesCallback({"a": experts[0], "b": experts[1]}, TSVM())
    merger.merge(base)
    module = merger.modules["a"]
    assert all(parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def test_the_trainer_merges_without_data_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = {task: str(save_lightning(e, tmp_path / f"{task}.ckpt")) for task, e in zip("ab", make_experts())}
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.merge(make_base(), experts=sources, method=TaskArithmetic(), output_dir=str(tmp_path / "m"))
    check(Classifier.load_from_checkpoint(tmp_path / "m" / "a.ckpt", weights_only=True))
    assert "Written to" in capsys.readouterr().out
    assert isinstance(trainer, Trainer)


# -- on the command line -----------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [*expert_files(tmp_path), base_file(tmp_path)]


def test_without_data_on_the_command_line(files: list[str], tmp_path: Path) -> None:
    """And the configuration that is kept with the result makes it again."""
    rule = ["--method=TaskArithmetic", "--method.scale=0.5"]
    main(["merge", *MODEL, *QUIET, *files, *rule, f"--output_dir={tmp_path / 'm'}"])
    check(Classifier.load_from_checkpoint(tmp_path / "m" / "a.ckpt", weights_only=True), 0.5)
    main(["merge", f"--config={tmp_path / 'm' / 'config.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    one, two = (load_file(tmp_path / name / "merged.safetensors") for name in ("m", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_rules_within_a_rule_on_the_command_line(files: list[str], tmp_path: Path) -> None:
    rule = ["--method=Combined", "--method.matrices=TSVM", "--method.rest=TaskArithmetic", "--method.rest.scale=0.5"]
    main(["merge", *MODEL, *QUIET, *files, *rule, f"--output_dir={tmp_path / 'm'}"])
    report = json.loads((tmp_path / "m" / "report.json").read_text())
    assert report["parameters"]["body.0.weight"] == "merged by TSVM"
    assert report["parameters"]["body.0.bias"] == "merged by TaskArithmetic"
    assert report["method"]["rest"] == {"class": "TaskArithmetic", "importance": None, "scale": 0.5}


def test_problems_without_data_are_told_at_once(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "merge",
                *MODEL,
                *QUIET,
                *files,
                "--experts.c=nowhere.ckpt",
                "--method=SLERP",
                "--method.t=2",
                f"--output_dir={tmp_path}",
            ]
        )
    for part in ("SLERP is between two experts, got 3", "t: must be between 0 and 1", "no such file", "exists"):
        assert part in str(caught.value)


def test_dry_run_without_data(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["merge", *MODEL, *QUIET, *files, "--method=TIES", f"--output_dir={tmp_path / 'm'}", "--dry_run"])
    out = capsys.readouterr().out
    assert "merged: Linear.weight" in out
    assert "calibration" not in out.lower()
    assert not (tmp_path / "m").exists()


def test_every_rule_has_a_row_and_an_overlay() -> None:
    root = Path(__file__).parents[3]
    rows = (root / "docs" / "methods.md").read_text()
    overlays = [path.read_text() for path in (root / "configs").glob("*.yaml")]
    for name in methods.__all__:
        kind = getattr(methods, name)
        if issubclass(kind, methods.MergingMethod) and kind is not methods.MergingMethod:
            assert f"| `{name}` |" in rows, name
            assert any(f"com_lightning.{name}\n" in overlay for overlay in overlays), name
            assert getattr(com_lightning, name) is kind


# -- adapters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [TaskArithmetic(1.0), TSVM()], ids=lambda method: type(method).__name__)
def test_adapters_are_what_an_expert_has_learned(method: MergingMethod, tmp_path: Path) -> None:
    """The base of folders with adapters is the model that they are folded into."""
    model = TextModule()
    for seed, task in enumerate("ab"):
        net = adapted(0)
        torch.manual_seed(seed)
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.data += 0.03 * torch.randn_like(parameter)
        net.save_pretrained(str(tmp_path / task))
    merger = ChainOfMergesCallback({task: tmp_path / task for task in "ab"}, method)
    merger.merge(model)
    name = "net.bert.encoder.layer.0.attention.self.query.weight"
    base = model.get_parameter(name)
    experts = [load_expert(task, tmp_path / task, model).get_parameter(name) for task in "ab"]
    change = merger.modules["a"].get_parameter(name) - base
    if isinstance(method, TaskArithmetic):
        assert relative(change, experts[0] + experts[1] - 2 * base) < 1e-4
    assert int(torch.linalg.matrix_rank(change.detach(), rtol=1e-4)) == 4  # two of each
    table = "net.bert.embeddings.word_embeddings.weight"
    assert relative(merger.modules["a"].get_parameter(table), model.get_parameter(table)) < 1e-6


def test_the_base_of_modules_with_adapters_is_the_model_without_them() -> None:
    model, experts = trained(0), [trained(1), trained(2)]
    before = copy.deepcopy(model.state_dict())
    merger = ChainOfMergesCallback(dict(zip("ab", experts)), TaskArithmetic(0.0))
    merger.merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    folded = load_expert("base", model, model)
    for name, parameter in merger.modules["a"].named_parameters():
        if name in merger.result.shared:
            assert relative(parameter, folded.get_parameter(name)) < 1e-6, name
