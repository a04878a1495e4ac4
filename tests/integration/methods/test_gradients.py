"""Rules that differentiate, on the whole way from a trainer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from com_lightning import (
    ESM,
    LOT,
    AdaMerging,
    Average,
    ChainOfMergesCallback,
    Combined,
    FeatCal,
    Fisher,
    MergeDataModule,
    MergeError,
    MergeTrainer,
    MergingMethod,
    TaskArithmetic,
)
from tests.helpers import FEATURES, Classifier, make_data, make_experts, perturb, quiet_trainer, relative
from tests.helpers.gradients import close, made, run, tasks_of

# -- settings, and the whole way ---------------------------------------------------------------------------------------

BAD: list[tuple[MergingMethod, str]] = [
    (Fisher(floor=-1.0), "floor: must be 0 or more"),
    (Fisher({"a": 1}), "no weight for b"),
    (LOT(ridge=-1.0), "ridge: must be 0 or more"),
    (AdaMerging(-1), "steps: must be 0 or more"),
    (AdaMerging(learning_rate=0.0), "learning_rate: must be above 0"),
    (AdaMerging(start=1.5), "start: must be between 0 and 1"),
    (AdaMerging(density=0.0), "density: must be above 0"),
    (Combined(AdaMerging(), Average()), "matrices: AdaMerging merges the model as a whole"),
    (Combined(Fisher(), LOT()), "rest: LOT merges whole layers"),
]


@pytest.mark.parametrize(("method", "message"), BAD)
def test_bad_settings(method: MergingMethod, message: str) -> None:
    assert any(message in problem for problem in method.problems(["a", "b"]))


@pytest.mark.parametrize("method", [Fisher(), LOT(), AdaMerging(), AdaMerging(0), Combined(Fisher(), TaskArithmetic())])
def test_the_settings_here_are_good(method: MergingMethod) -> None:
    assert not method.problems(["a", "b"])


def test_fisher_of_the_matrices_alone() -> None:
    base, experts = made()
    whole, rest = run(Fisher(), tasks_of(experts))[0], run(TaskArithmetic(0.7), tasks_of(experts), base)[0]
    both, _, _ = run(Combined(Fisher(floor=0.0), TaskArithmetic(0.7)), tasks_of(experts), base)
    for name, value in both.items():
        assert relative(value, (whole if value.dim() > 1 else rest)[name]) < 1e-4, name


def make_base() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


@pytest.mark.parametrize(
    "method", [Fisher(), LOT(), AdaMerging(3), FeatCal(), ESM(), Combined(LOT(), TaskArithmetic())]
)
def test_the_trainer_merges(method: MergingMethod, tmp_path: Path) -> None:
    data = MergeDataModule({"a": make_data(0, 3), "b": make_data(1, 4)}, num_samples=20, batch_size=1)
    trainer = MergeTrainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    experts: dict[str, Any] = dict(zip("ab", make_experts()))
    report = trainer.merge(make_base(), data, experts, method, output_dir=str(tmp_path / "out"))
    told = {name: str(what) for name, what in report.parameters.items() if name.startswith("body")}
    kind = type(method).__name__
    some = {"averaged: ESM averages what is not one matrix"} if kind == "ESM" else set()
    assert set(told.values()) == {f"merged by {kind}" if kind in ("Fisher", "AdaMerging") else "solved", *some}
    assert report.method["class"] == kind
    assert not any("batch_size" in warning for warning in report.warnings)
    assert report.samples == {"a": 20, "b": 20}


def merge_modules(method: MergingMethod, kind: type[Classifier], **settings: Any) -> ChainOfMergesCallback:
    torch.manual_seed(0)
    base = kind()
    experts: dict[str, Any] = {task: perturb(copy.deepcopy(base), 0.3, n + 1) for n, task in enumerate("ab")}
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=20, **settings)
    merger = ChainOfMergesCallback(experts, method)
    quiet_trainer(callbacks=[merger]).validate(base, datamodule=data, verbose=False)
    return merger


def test_larger_batches_are_warned_of() -> None:
    with pytest.warns(UserWarning, match="data.batch_size is that of the loaders: Fisher squares the gradients"):
        assert any("set it to 1" in warning for warning in merge_modules(Fisher(), Classifier).report.warnings)


class Dictionary(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("loss", 1.0)
        assert not self.training
        return {"loss": super().training_step(batch, batch_idx), "more": 1}


class Nothing(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Labels(Classifier):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).argmax(1)


class Logits(Labels):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


class Detached(Labels):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).detach()


def test_a_loss_may_come_in_a_dictionary() -> None:
    one, other = (merge_modules(Fisher(), kind, batch_size=1).modules["a"] for kind in (Classifier, Dictionary))
    close(dict(other.named_parameters()), dict(one.named_parameters()), 1e-6)


def test_predict_step_goes_before_forward() -> None:
    one, other = (merge_modules(AdaMerging(3), kind).modules["a"] for kind in (Classifier, Logits))
    close(dict(other.named_parameters()), dict(one.named_parameters()), 1e-6)


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        (Fisher(), Nothing, "task 'a', batch 0: training_step returns nothing; the method needs a loss"),
        (AdaMerging(1), Labels, r"predict_step returns a tensor \(16,\) of int64, without a gradient, not logits"),
        (AdaMerging(1), Detached, "what predict_step returns does not depend on the shared parameters"),
    ],
)
def test_steps_that_do_not_fit_are_told_of(method: MergingMethod, kind: type[Classifier], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        merge_modules(method, kind)


def test_a_module_without_training_step_is_told_of_beforehand() -> None:
    class Plain(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(FEATURES, 3)

        def validation_step(self, batch: Any, batch_idx: int) -> None: ...

    data = MergeDataModule({"a": make_data(0), "b": make_data(1)})
    data.setup("validate")
    merger = ChainOfMergesCallback({"a": Plain(), "b": Plain()}, Fisher())
    with pytest.raises(MergeError, match="task 'b': Fisher needs a loss, but Plain has no training_step"):
        merger.plan(Plain(), data)
