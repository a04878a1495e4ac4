"""What was written, loaded as a user would, against the module in memory and what was validated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from com_lightning import Average, ChainOfMergesCallback, MergeDataModule, MergeTrainer
from com_lightning.results import verification
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer
from tests.helpers.adapters import LoraModule, trained
from tests.helpers.running import save_lightning
from tests.helpers.texts import expert_folder, make_texts


def merged(
    experts: dict[str, Any], model: LightningModule, folder: Path, data: Any = None, **kwargs: Any
) -> ChainOfMergesCallback:
    merger = ChainOfMergesCallback(experts, **{"baselines": False, "private": [], **kwargs}, output_dir=str(folder))
    tasks = data or MergeDataModule({task: make_data(number) for number, task in enumerate(experts)}, num_samples=32)
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=tasks, verbose=False)
    return merger


def pair() -> dict[str, Any]:
    return dict(zip("ab", make_experts((3, 3))))


def about_files(merger: ChainOfMergesCallback) -> list[str]:
    return [warning for warning in merger.report.warnings if "not the module in memory" in warning]


def test_files_are_the_modules_in_memory_and_the_report_says_so(tmp_path: Path) -> None:
    merger = merged(pair(), Classifier(3), tmp_path / "m")
    forwards, check = merger.report.checks
    assert forwards.startswith("calibration forwards: compared")
    assert check.startswith("merged.ckpt: loaded by Classifier.load_from_checkpoint, its 8 tensors, settings and")
    assert "settings and outputs are those in memory" in check
    assert not about_files(merger)
    assert json.loads((tmp_path / "m" / "report.json").read_text())["checks"] == [forwards, check]
    assert f"## Checked\n\n- {forwards}\n- {check}" in (tmp_path / "m" / "report.md").read_text()
    assert "What was checked" in (tmp_path / "m" / "report.html").read_text()
    assert f"\nChecked: {check}" in str(merger.report)
    before = torch.get_rng_state()
    merger.save(tmp_path / "again")
    assert merger.report.checks == [forwards, check]
    assert torch.equal(torch.get_rng_state(), before)


def test_a_setting_that_no_file_has_is_named(tmp_path: Path) -> None:
    experts = pair()
    for expert in experts.values():
        expert.body[1].eps = 0.5  # what hyperparameters do not say
    merger = merged(experts, Classifier(3), tmp_path / "m")
    (warning,) = about_files(merger)
    assert warning.startswith("merged.ckpt: loaded by Classifier.load_from_checkpoint, it is not the module in memory")
    assert "body.1.eps is 0.5 in memory and 1e-05 in the file; the outputs of body.1 differ by" in warning
    assert any("given to trainer.validate" in w and "body.1.eps" in w for w in merger.report.warnings)


class Computed(Classifier):
    """It computes with a copy of a weight that it takes when it is made, and so forgets what it loads later."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__(classes, width)
        self.first = [self.head.weight.detach().clone()]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.first[0], self.head.bias)


def test_other_outputs_of_the_same_tensors_and_settings(tmp_path: Path) -> None:
    torch.manual_seed(0)
    merger = merged({"a": Computed(), "b": Computed()}, Computed(), tmp_path / "m")
    (warning,) = about_files(merger)
    assert "the outputs of the module differ by" in warning


class Demanding(Classifier):
    """It cannot be made from its hyperparameters."""

    def __init__(self, classes: int, network: nn.Module) -> None:
        super().__init__(classes)
        self.save_hyperparameters("classes")
        del self.hparams["width"]


class Forgetful(Classifier):
    """It leaves its head out of its checkpoints."""

    strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {name: value for name, value in super().state_dict(*args, **kwargs).items() if "head" not in name}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Demanding(3, nn.ReLU()), "merged.ckpt: not compared, because Demanding.load_from_checkpoint cannot"),
        (Forgetful, "without head.weight, head.bias, which the class leaves out of its checkpoints; outputs were not"),
    ],
)
def test_what_cannot_be_compared_is_said(make: Any, expected: str, tmp_path: Path) -> None:
    merger = merged({"a": make(), "b": make()}, make(), tmp_path / "m", method=Average())
    (check,) = merger.report.checks
    assert expected in check
    assert not about_files(merger)


def test_without_data_tensors_and_settings_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merger = ChainOfMergesCallback(pair(), Average(), private=[], output_dir=str(tmp_path / "m"))
    (check,) = merger.merge(Classifier(3)).checks
    assert check.endswith(
        "8 tensors and settings are those in memory; outputs were not compared (no calibration batch is at hand)"
    )
    monkeypatch.setattr(verification, "free_memory", lambda device: 100)
    merger.save(tmp_path / "again")
    assert any("not compared, because that takes" in check for check in merger.report.checks)


class Network(LightningModule):
    """A user's module around a folder of transformers."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = AutoModelForSequenceClassification.from_pretrained(path, local_files_only=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch["ids"], attention_mask=batch["ids"] > 0).logits
        self.log("val_mean", logits.square().mean())


def test_each_task_is_written_with_its_own_configuration(tmp_path: Path) -> None:
    """Memory, checkpoint, transformers folder and ``validate --merged`` are one model, or it is said which is not."""
    settings: dict[str, Any] = {"a": {}, "b": {"layer_norm_eps": 0.5}}
    folders = {task: expert_folder(tmp_path / task, n + 1, **settings[task]) for n, task in enumerate("ab")}
    base = str(expert_folder(tmp_path / "base", 0))
    data = MergeDataModule({task: make_texts(n) for n, task in enumerate("ab")}, num_samples=16)
    merger = merged(folders, Network(base), tmp_path / "m", data)
    assert any("net.config.layer_norm_eps is 1e-12 in 'a' and 0.5 in 'b'" in w for w in merger.report.warnings)
    ids = torch.randint(5, 30, (2, 6))
    for task in "ab":
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "m" / "transformers" / task).eval()
        module: Any = merger.modules[task]
        with torch.no_grad():
            torch.testing.assert_close(loaded(ids).logits, module.net.eval()(ids).logits, rtol=0, atol=0)
    assert [check.partition(":")[0] for check in merger.report.checks if check.endswith("are those in memory")] == [
        "a.ckpt",
        "transformers/a, transformers/b",
    ]
    (warning,) = about_files(merger)
    assert warning.startswith("b.ckpt: ")
    assert "layer_norm_eps is 0.5 in memory" in warning
    trainer = MergeTrainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    again = trainer.validate(Network(base), datamodule=data, merged=str(tmp_path / "m"), verbose=False)
    assert again == list(merger.report.metrics["merged"].values())


def test_adapters_that_are_merged_into_their_layers(tmp_path: Path) -> None:
    experts = {task: save_lightning(trained(seed), tmp_path / f"{task}.ckpt") for seed, task in enumerate("ab")}
    data = MergeDataModule({task: make_texts(n) for n, task in enumerate("ab")}, num_samples=16)
    merger = merged(experts, LoraModule(), tmp_path / "m", data)
    _, first, *files = merger.report.checks
    assert "LoraModule.load_from_checkpoint gives the same tensors and settings" in first
    assert [check.partition(":")[0] for check in files] == ["a.ckpt, b.ckpt", "transformers"]
    assert all(check.endswith("outputs are those in memory") for check in files)
    assert not [warning for warning in merger.report.warnings if "module" in warning]
