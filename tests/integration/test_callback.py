"""The callback in a user's project: their module, their data, their trainer."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

from com_lightning import (
    Average,
    ChainOfMerges,
    ChainOfMergesCallback,
    MergeDataModule,
    MergeError,
    RegMean,
    TaskLoaders,
)
from tests.helpers import FEATURES, Classifier, make_data, make_experts, quiet_trainer
from tests.helpers.running import save_lightning


def make_tasks(**kwargs: Any) -> MergeDataModule:
    return MergeDataModule({"a": make_data(0, 3), "b": make_data(1, 4)}, **{"num_samples": 40, **kwargs})


def merged_by(trainer: Trainer, **kwargs: Any) -> tuple[ChainOfMergesCallback, Classifier]:
    first, second = make_experts()
    merger = ChainOfMergesCallback({"a": first, "b": second}, **kwargs)
    model = Classifier(3)
    trainer.callbacks.append(merger)  # type: ignore[attr-defined]
    trainer.validate(model, datamodule=make_tasks(), verbose=False)
    return merger, model


def test_five_lines() -> None:
    merger, model = merged_by(quiet_trainer())
    report = merger.report
    assert list(report.metrics) == ["expert", "average", "merged"]
    assert report.monitor == "val_acc"
    assert set(report.metrics["merged"]) == {"a", "b"}
    assert report.normalized("expert", "a") == 1.0
    first, second = merger.modules.values()
    assert isinstance(first, Classifier)
    assert isinstance(second, Classifier)
    assert all(torch.equal(p, dict(first.named_parameters())[n]) for n, p in model.named_parameters())
    assert first.body[0].weight is second.body[0].weight
    assert second.head.out_features == 4
    assert {r.name for r in report.layers} == {"body.0", "body.1", "body.3", "head of a", "head of b"}
    assert "mean" in str(report)


def test_metrics_are_those_of_validating_each_module_by_hand() -> None:
    merger, _ = merged_by(quiet_trainer())
    for (task, module), data in zip(merger.modules.items(), (make_data(0, 3), make_data(1, 4))):
        (by_hand,) = quiet_trainer().validate(module, datamodule=data, verbose=False)
        assert by_hand == pytest.approx(merger.report.metrics["merged"][task])


def test_the_users_trainer_sees_the_first_task_as_merged() -> None:
    trainer = quiet_trainer()
    merger, _ = merged_by(trainer)
    assert float(trainer.callback_metrics["val_acc"]) == pytest.approx(merger.report.metrics["merged"]["a"]["val_acc"])


def test_the_users_trainer_has_the_metrics_of_all_tasks_and_their_mean() -> None:
    trainer, experts = quiet_trainer(), make_experts()
    merger = ChainOfMergesCallback(dict(zip("ab", experts)))
    trainer.callbacks.append(merger)  # type: ignore[attr-defined]
    (returned,) = trainer.validate(Classifier(3), datamodule=make_tasks(), verbose=False)
    report = merger.report
    expected = {f"{t}/{name}": v for t, values in report.metrics["merged"].items() for name, v in values.items()}
    expected.update({f"{model}/mean": report.mean(model) or 0.0 for model in ("expert", "average", "merged")})
    expected["merged/mean_normalized"] = report.mean_normalized("merged") or 0.0
    for metrics in (returned, trainer.callback_metrics):
        assert {name: float(metrics[name]) for name in expected} == pytest.approx(expected)
    assert {f"{task}/val_acc" for task in "ab"} < set(expected)


def test_tasks_with_several_loaders_have_metrics_too() -> None:
    class Several(Classifier):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    two = TaskLoaders(val=[make_data(0).val_dataloader(), make_data(1).val_dataloader()])
    merger = ChainOfMergesCallback({"a": Several(), "b": Several()}, private=["head"], baselines=False)
    trainer = quiet_trainer(callbacks=[merger])
    trainer.validate(Several(), datamodule=MergeDataModule({"a": two, "b": make_data(1)}), verbose=False)
    assert {"a/val_loss/loader_0", "a/val_loss/loader_1", "b/val_loss"} < set(trainer.callback_metrics)


def test_calibration_leaves_no_trace_in_metrics() -> None:
    """The pass after the merge counts every validated sample once, and nothing else."""
    experts = make_experts()
    merger = ChainOfMergesCallback({"a": experts[0], "b": experts[1]}, baselines=False)
    model = Classifier(3)
    seen: list[int] = []

    def count() -> None:
        seen.append(int(torch.as_tensor(model.accuracy.tp).sum() + torch.as_tensor(model.accuracy.fn).sum()))

    model.on_validation_epoch_end = count  # type: ignore[method-assign]
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=make_tasks(), verbose=False)
    assert seen == [60]
    assert all(expert.accuracy.update_count == 0 for expert in experts)


@pytest.mark.parametrize("which", ["model", "module"])
def test_fit_after_a_merge(which: str) -> None:
    merger, model = merged_by(quiet_trainer())
    module: LightningModule = model if which == "model" else merger.modules["a"]
    before = module.get_parameter("body.0.weight").clone()
    quiet_trainer(max_steps=2, limit_val_batches=0).fit(module, make_data(0, 3).train_dataloader())
    assert not torch.equal(module.get_parameter("body.0.weight"), before)


def test_fit_does_not_merge() -> None:
    first, second = make_experts()
    merger = ChainOfMergesCallback({"a": first, "b": second})
    data = make_data(0, 3)
    with pytest.warns(UserWarning, match="merges in trainer.validate"):
        quiet_trainer(max_steps=1, callbacks=[merger]).fit(
            Classifier(3), data.train_dataloader(), data.val_dataloader()
        )
    assert not merger.merged
    assert str(merger.report) == "Nothing has been merged yet."
    with pytest.raises(RuntimeError, match="nothing has been merged yet"):
        merger.save("nowhere")


def test_a_second_validate_does_not_merge_again() -> None:
    trainer = quiet_trainer()
    merger, model = merged_by(trainer)
    report, modules = merger.report, merger.modules
    trainer.validate(model, datamodule=make_tasks(), verbose=False)
    assert merger.report is report
    assert merger.modules is modules


class DictClassifier(LightningModule):
    """Another user's module: the step takes dictionary batches apart, and keeps metrics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 4)
        self.mean = MeanMetric()
        self.outputs: list[Tensor] = []

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        target = batch.pop("y")
        prediction = self.body(batch["x"])
        self.outputs.append(prediction)
        self.mean.update((prediction.argmax(1) == target).float())
        self.log_dict({"loss": nn.functional.cross_entropy(prediction, target)})
        assert self.trainer.datamodule is not None  # type: ignore[attr-defined]

    def on_validation_epoch_end(self) -> None:
        assert sum(len(output) for output in self.outputs) == 30
        self.outputs.clear()
        self.log("score", self.mean.compute())
        self.mean.reset()


def test_dict_batches_popped_logged_by_hand() -> None:
    torch.manual_seed(0)
    modules = [DictClassifier(), DictClassifier()]
    rows = [[{"x": torch.randn(FEATURES), "y": torch.tensor(n % 4)} for n in range(30)] for _ in modules]
    loaders = [DataLoader(part, 8) for part in rows]  # type: ignore[var-annotated, arg-type]
    tasks = MergeDataModule({str(n): TaskLoaders(loader) for n, loader in enumerate(loaders)}, num_samples=20)
    merger = ChainOfMergesCallback({"0": modules[0], "1": modules[1]})
    quiet_trainer(callbacks=[merger]).validate(DictClassifier(), datamodule=tasks, verbose=False)
    assert merger.report.monitor == "score"
    assert set(merger.report.metrics["merged"]["0"]) == {"score", "loss"}
    assert all(not module.outputs for module in modules)


class Elaborate(Classifier):
    """Uses what Lightning offers: its own logger, hooks before the steps, the trainer."""

    def on_validation_epoch_start(self) -> None:
        self.seen: list[int] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(len(batch[0]))
        self.logger.experiment.add_scalar("rows", len(batch[0]))  # type: ignore[union-attr]
        super().validation_step(batch, batch_idx)
        assert self.trainer.validating


@pytest.mark.parametrize("logger", [False, True])
def test_modules_that_use_logger_hooks_and_trainer(logger: bool, tmp_path: Path) -> None:
    experts: dict[str, Any] = {}
    for task, expert in zip("ab", make_experts((3, 3))):
        experts[task] = Elaborate(3)
        experts[task].load_state_dict(expert.state_dict())
    merger = ChainOfMergesCallback(experts)
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
    used = TensorBoardLogger(tmp_path) if logger else DummyLogger()
    quiet_trainer(callbacks=[merger], logger=used).validate(Elaborate(3), datamodule=tasks, verbose=False)
    assert set(merger.report.metrics["merged"]) == {"a", "b"}


def test_calibration_step_and_mask_of_the_module_are_used() -> None:
    calls: list[str] = []

    class Own(Classifier):
        def calibration_step(self, batch: Any) -> None:
            calls.append("step")
            self.body(batch[0])

        def calibration_mask(self, batch: Any) -> Tensor:
            calls.append("mask")
            return batch[0][:, 0] > 0  # type: ignore[no-any-return]

    experts = make_experts((3, 3))
    own = {}
    for task, expert in zip("ab", experts):
        own[task] = Own(3)
        own[task].load_state_dict(expert.state_dict())
    merger = ChainOfMergesCallback(dict(own), baselines=False)
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
    quiet_trainer(callbacks=[merger]).validate(Own(3), datamodule=tasks, verbose=False)
    assert calls.count("mask") == 6
    # One that finds what layers add to; before that, a check: one batch of each task by itself, and three in lockstep
    assert calls.count("step") == 12 + 1 + (2 + 3)
    assert all(0 < rows < 40 for rows in merger.report.layers[0].rows.values())


def test_a_padding_mask_that_fits_nowhere_is_told() -> None:
    class Odd(Classifier):
        def calibration_mask(self, batch: Any) -> Tensor:
            return torch.tensor([True, False, True])

    merger = ChainOfMergesCallback({task: Odd(3) for task in "ab"}, baselines=False)
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
    quiet_trainer(callbacks=[merger]).validate(Odd(3), datamodule=tasks, verbose=False)
    assert [w for w in merger.report.warnings if "task 'b': its padding mask, (3,), fits" in w]


def test_other_data_than_tasks_are_refused() -> None:
    first, second = make_experts()
    trainer = quiet_trainer(callbacks=[ChainOfMergesCallback({"a": first, "b": second})])
    with pytest.raises(MergeError, match="MergeDataModule"):
        trainer.validate(Classifier(3), datamodule=make_data(), verbose=False)


def test_a_model_unlike_the_first_expert_is_refused() -> None:
    first, second = make_experts()
    trainer = quiet_trainer(callbacks=[ChainOfMergesCallback({"a": first, "b": second})])
    with pytest.raises(MergeError, match=r"head.weight is \(4, 8\), in its expert \(3, 8\)"):
        trainer.validate(Classifier(4), datamodule=make_tasks(), verbose=False)


def test_an_error_in_a_users_step_names_task_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Classifier, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        raise RuntimeError("my own bug")

    monkeypatch.setattr(Classifier, "validation_step", broken)
    with pytest.raises(RuntimeError, match="my own bug") as caught:
        merged_by(quiet_trainer())
    assert "task 'a', batch 0" in "".join(getattr(caught.value, "__notes__", ["task 'a', batch 0"]))


def test_a_step_that_changes_its_batch_in_place() -> None:
    """Each forward sees the batch as the loader gave it."""

    class Normalising(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            batch[0].mul_(10)
            super().validation_step(batch, batch_idx)

    class Plain(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step((batch[0] * 10, batch[1]), batch_idx)

    weights = []
    for kind in (Normalising, Plain):
        experts: dict[str, Any] = {task: kind(3) for task in "ab"}
        for task, expert in zip("ab", make_experts((3, 3))):
            experts[task].load_state_dict(expert.state_dict())
        merger = ChainOfMergesCallback(experts, baselines=False)
        data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
        quiet_trainer(callbacks=[merger]).validate(kind(3), datamodule=data, verbose=False)
        weights.append(merger.modules["a"].get_parameter("body.3.weight"))
    assert torch.equal(*weights)


def test_frozen_parameters_stay_frozen_and_the_others_train() -> None:
    experts: dict[str, Any] = dict(zip("ab", make_experts()))
    model = Classifier(3)
    for module in (model, *experts.values()):
        module.body[0].requires_grad_(False)
    for expert in experts.values():  # as PEFT does with what it loads
        expert.head.requires_grad_(False)
    merger = ChainOfMergesCallback(experts, baselines=False)
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=make_tasks(), verbose=False)
    assert {n for n, p in merger.modules["b"].named_parameters() if not p.requires_grad} == {
        "body.0.weight",
        "body.0.bias",
    }
    assert not any(p.requires_grad for p in experts["a"].head.parameters())


def test_modules_are_given_back_in_the_mode_of_their_source(tmp_path: Path) -> None:
    """A network that its class makes in eval mode stays so, as after ``load_from_checkpoint``."""
    first, second = make_experts()
    second.body.eval()
    files: dict[str, Any] = {"a": save_lightning(first, tmp_path / "a.ckpt"), "b": second}
    merger = ChainOfMergesCallback(files, baselines=False)
    quiet_trainer(callbacks=[merger]).validate(Classifier(3), datamodule=make_tasks(), verbose=False)
    assert all(part.training for part in merger.modules["a"].modules())
    assert {n.partition(".")[0] for n, p in merger.modules["b"].named_modules() if not p.training} == {"body"}


class Probe(Callback):
    """An online evaluator, as those of self-supervised learning."""

    def __init__(self, adds: bool) -> None:
        self.adds = adds

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.adds:
            pl_module.probe = nn.Linear(3, 3)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.log("probe_acc", 0.5)


@pytest.mark.parametrize("after", [True, False])
def test_a_submodule_of_a_callback_is_an_early_error(after: bool) -> None:
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3)))), private=[])
    callbacks = [merger, Probe(True)] if after else [Probe(True), merger]
    with pytest.raises(MergeError, match=r"probe\.weight"):
        quiet_trainer(callbacks=callbacks).validate(Classifier(3), datamodule=make_tasks(), verbose=False)
    assert not merger.merged


def test_the_report_tells_that_callbacks_do_not_run_in_it() -> None:
    trainer = quiet_trainer(callbacks=[Probe(False)])
    merger, _ = merged_by(trainer, baselines=False)
    assert [w.split(":")[0] for w in merger.report.warnings if "callbacks of the trainer do not run" in w] == [
        "probe_acc"
    ]


@pytest.mark.parametrize(
    "where", ["com_lightning.callback.validate_tasks", "tests.helpers.Classifier.on_validation_batch_end"]
)
def test_a_merge_is_not_lost_if_validation_fails(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("my own bug")

    monkeypatch.setattr(where, broken)
    with pytest.raises(RuntimeError, match="my own bug"):
        merged_by(quiet_trainer(), output_dir=str(tmp_path / "out"))
    assert Classifier.load_from_checkpoint(tmp_path / "out" / "b.ckpt", weights_only=True).head.out_features == 4


def test_values_go_to_the_users_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    merger, _ = merged_by(quiet_trainer(logger=logger))
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    layers = [row for row in rows if row["merge/residual"]]
    assert [float(row["merge/residual"]) for row in layers] == pytest.approx([r.residual for r in merger.report.layers])
    (logged,) = [row for row in rows if row["b/val_acc"]]
    assert float(logged["b/val_acc"]) == pytest.approx(merger.report.metrics["merged"]["b"]["val_acc"])
    assert float(logged["merged/mean"]) == pytest.approx(merger.report.mean("merged"))
    settings = yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())
    assert settings["merge/method"] == "ChainOfMerges"
    assert {name: settings[f"merge/{name}"] for name in ("ridge", "num_samples", "seed", "split")} == {
        "ridge": 0.01,
        "num_samples": 40,
        "seed": 0,
        "split": "val",
    }


def test_the_picture_goes_to_a_logger_that_takes_pictures(tmp_path: Path) -> None:
    board = TensorBoardLogger(tmp_path)
    merged_by(quiet_trainer(logger=board))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir).Reload()
    assert events.Tags()["images"] == ["merge/report"]
    assert "b/val_acc" in events.Tags()["scalars"]

    class Images(CSVLogger):
        """As Lightning's logger of Weights & Biases."""

        seen: ClassVar[list[tuple[str, Any]]] = []

        def log_image(self, key: str, images: list[Any]) -> None:
            self.seen.append((key, images[0].shape))

    merged_by(quiet_trainer(logger=Images(tmp_path)))
    assert [key for key, _ in Images.seen] == ["merge/report"]
    assert Images.seen[0][1][2] == 3


@pytest.mark.parametrize("method", [ChainOfMerges(target="merged"), RegMean(), Average()])
def test_other_methods(method: Any) -> None:
    merger, _ = merged_by(quiet_trainer(), method=method)
    assert merger.report.method["class"] == type(method).__name__
    if isinstance(method, Average):
        assert merger.report.metrics["merged"] == merger.report.metrics["average"]
        assert merger.report.samples == {}


@pytest.mark.parametrize("option", [{"limit_val_batches": 1}, {"fast_dev_run": True}])
def test_limits_are_honoured(option: dict[str, Any]) -> None:
    merger, _ = merged_by(quiet_trainer(**option))
    assert set(merger.report.samples.values()) == {16}


@pytest.mark.parametrize("data", ["PointsData", "SavedPointsData"])
def test_a_stock_lightning_cli(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with datamodules that save, and read, hyperparameters."""
    for task, expert in zip("ab", make_experts()):
        save_lightning(expert, tmp_path / f"{task}.ckpt")
    config = tmp_path / "config.yaml"
    config.write_text(f"""
trainer:
  logger: false
  enable_progress_bar: false
  callbacks:
    - class_path: com_lightning.ChainOfMergesCallback
      init_args:
        experts: {{a: {tmp_path}/a.ckpt, b: {tmp_path}/b.ckpt}}
        method: {{class_path: com_lightning.ChainOfMerges, init_args: {{ridge: 0.1}}}}
        output_dir: {tmp_path}/merged
        verbose: true
""")
    arguments = [argument.replace("PointsData", data) for argument in DATA]
    cli = LightningCLI(Classifier, save_config_callback=None, args=["validate", f"--config={config}", *arguments])
    content = json.loads((tmp_path / "merged" / "report.json").read_text())
    out = capsys.readouterr().out
    assert out.index("b/val_acc") < out.index("| mean |")  # Lightning's table has all tasks, and the report comes last
    assert content["headline"] in out.strip().splitlines()[-2:]
    assert float(cli.trainer.callback_metrics["b/val_acc"]) == pytest.approx(
        content["metrics"]["merged"]["b"]["val_acc"]
    )
    assert isinstance(cli.datamodule, MergeDataModule)
    saved = [dict(task.hparams) for task in cli.datamodule.tasks.values()]
    assert saved == ([{}, {}] if data == "PointsData" else [{"seed": 0, "classes": 3}, {"seed": 1, "classes": 4}])


def test_arguments_of_a_wrong_type_are_told() -> None:
    with pytest.raises(TypeError, match="must be a mapping"):
        ChainOfMergesCallback(["a.ckpt"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="TaskLoaders"):
        MergeDataModule({"a": make_data().val_dataloader()})
    with pytest.raises(TypeError, match="fit each expert"):
        make_tasks().train_dataloader()


DATA = [
    "--data=com_lightning.MergeDataModule",
    "--data.tasks.a=tests.helpers.PointsData",
    "--data.tasks.b=tests.helpers.PointsData",
    "--data.tasks.b.seed=1",
    "--data.tasks.b.classes=4",
]
