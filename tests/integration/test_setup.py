"""Modules that build layers in ``setup``, from what their task's datamodule knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError, MergeTrainer, merge
from com_lightning.validation import keep_weights
from tests.helpers import FEATURES, PointsData, quiet_trainer
from tests.helpers.running import save_lightning


class Data(PointsData):
    def __init__(self, seed: int, classes: int) -> None:
        super().__init__(seed, classes)
        self.classes = classes


class Built(LightningModule):
    """Its head is built by ``setup``, which also starts its body anew, as some do."""

    def __init__(self) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU())

    def setup(self, stage: str) -> None:
        classes = self.trainer.datamodule.classes  # type: ignore[attr-defined]
        self.head = nn.Linear(8, classes)
        nn.init.normal_(self.body[0].weight)  # type: ignore[arg-type]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits: Tensor = self.head(self.body(x))
        self.log("val_acc", (logits.argmax(1) == y).float().mean())


def made(classes: tuple[int, int]) -> tuple[dict[str, LightningModule], dict[str, float], MergeDataModule]:
    """Experts, what each of them reaches as its owner validates it, and the data."""
    experts: dict[str, LightningModule] = {}
    reached = {}
    torch.manual_seed(0)
    body = Built().body
    for number, (name, count) in enumerate(zip("ab", classes)):
        expert = Built()
        expert.body, expert.head = copy.deepcopy(body), nn.Linear(8, count)
        experts[name] = expert
        with torch.no_grad():
            expert.body[0].weight.add_(0.1 * torch.randn_like(expert.body[0].weight))  # type: ignore[operator,arg-type]
            x, y = Data(number, count).loaders.val_dataloader().dataset.tensors
            reached[name] = float((expert.head(expert.body(x)).argmax(1) == y).float().mean())
    data = MergeDataModule({"a": Data(0, classes[0]), "b": Data(1, classes[1])}, num_samples=16, holdout=False)
    return experts, reached, data


def files(experts: dict[str, LightningModule], folder: Path) -> dict[str, Any]:
    return {name: save_lightning(expert, folder / f"{name}.ckpt") for name, expert in experts.items()}


@pytest.mark.filterwarnings("ignore:every parameter is shared", "ignore:.*builds them anew")
@pytest.mark.parametrize("classes", [(3, 3), (3, 5)])
@pytest.mark.parametrize("from_files", [True, False])
def test_experts_are_built_by_setup(from_files: bool, classes: tuple[int, int], tmp_path: Path) -> None:
    """And validated with the weights of the merge, not with those that setup makes."""
    experts, reached, data = made(classes)
    model = Built()
    before = copy.deepcopy(model.state_dict())
    sources: dict[str, Any] = files(experts, tmp_path) if from_files else dict(experts)
    result = merge(model, sources, data, trainer=quiet_trainer(), output_dir=str(tmp_path / "merged"))
    for name, value in reached.items():
        assert result.report.metrics["expert"][name]["val_acc"] == pytest.approx(value, abs=1e-3)
        x, y = data.tasks[name].loaders.val_dataloader().dataset.tensors  # type: ignore[attr-defined]
        module: Any = result.modules[name].eval()
        exact = float((module.head(module.body(x)).argmax(1) == y).float().mean())
        assert result.report.metrics["merged"][name]["val_acc"] == pytest.approx(exact, abs=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any("Built.setup builds head." in text for text in result.report.warnings)
    trainer = MergeTrainer(logger=False, enable_progress_bar=False, accelerator="cpu")
    (one, two) = trainer.validate(Built(), datamodule=data, merged=str(tmp_path / "merged"), verbose=False)
    assert one == result.report.metrics["merged"]["a"]
    assert two == result.report.metrics["merged"]["b"]


@pytest.mark.filterwarnings("ignore:.*builds them anew", "ignore:every parameter is shared")
def test_the_model_that_is_validated_is_the_merged_one(tmp_path: Path) -> None:
    experts, _, data = made((3, 5))
    merger = ChainOfMergesCallback(files(experts, tmp_path))
    model = Built()
    (logged,) = quiet_trainer(callbacks=[merger]).validate(model, datamodule=data, verbose=False)
    assert logged["val_acc"] == pytest.approx(merger.report.metrics["merged"]["a"]["val_acc"])
    merged = merger.modules["a"].state_dict()
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())


class Failing(Built):
    def setup(self, stage: str) -> None:
        raise ValueError("no classes known")


def test_a_setup_that_fails_is_an_early_error(tmp_path: Path) -> None:
    experts, _, data = made((3, 3))
    with pytest.raises(MergeError, match=r"setup, which may build them, fails.*no classes known"):
        merge(Failing(), files(experts, tmp_path), data, trainer=quiet_trainer())


def test_layers_of_another_shape_after_setup_are_an_error() -> None:
    experts, _, _ = made((3, 5))
    with pytest.raises(
        MergeError, match=r"task 'b': after its setup, head.weight of Built is \(3, 8\), in the merge \(5, 8\)"
    ):
        keep_weights(experts["a"], experts["b"], "task 'b'")
