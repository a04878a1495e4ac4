"""A step sees the trainer with its own task's data, and loggers that write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from com_lightning import ChainOfMergesCallback, MergeDataModule
from com_lightning.data.trainer_view import muted, trainer_of_task
from tests.helpers import Classifier, PointsData, make_experts, quiet_trainer


class Shifted(PointsData):
    """Data with a property that the step needs."""

    def __init__(self, seed: int, shift: float, classes: int) -> None:
        super().__init__(seed, classes)
        self.shift = shift


Seen = list[tuple[float, Any, Any, bool]]
SEEN: Seen = []


class Asking(Classifier):
    """Asks the trainer for what belongs to the data, in each validation step."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        trainer: Any = self.trainer
        calibrates = "log" in vars(self)
        SEEN.append(
            (trainer.datamodule.shift, len(trainer.val_dataloaders.dataset), trainer.num_val_batches, calibrates)
        )
        super().validation_step(batch, batch_idx)


def merge(module: type[Classifier], loggers: list[Logger], data: dict[str, Any], **kwargs: Any) -> Any:
    first, second = make_experts()
    experts: dict[str, Any] = {}
    for (task, count), expert in zip({"a": 3, "b": 4}.items(), (first, second)):
        experts[task] = module(count)
        experts[task].load_state_dict(expert.state_dict())
    merger = ChainOfMergesCallback(experts, baselines=False)
    trainer = quiet_trainer(callbacks=[merger], logger=loggers or False, **kwargs)
    trainer.validate(module(3), datamodule=MergeDataModule(data, num_samples=20), verbose=False)
    return merger


def test_each_task_sees_its_own_data_in_calibration_and_validation() -> None:
    SEEN.clear()
    data = {"a": Shifted(0, 1.0, 3), "b": Shifted(1, 2.0, 4)}
    merge(Asking, [], data, limit_val_batches=2)
    assert {(shift, count, tuple(batches)) for shift, count, batches, calibrates in SEEN if calibrates} == {
        (1.0, 60, (2,)),
        (2.0, 60, (2,)),
    }
    assert {shift for shift, _, _, calibrates in SEEN if not calibrates} == {1.0, 2.0}


def test_what_is_not_of_the_task_is_the_trainers_own() -> None:
    trainer: Any = quiet_trainer(max_epochs=7)
    data = MergeDataModule({"a": Shifted(0, 1.0, 3)})
    view: Any = trainer_of_task(trainer, data, "a")
    assert view.max_epochs == 7
    assert view.datamodule is data.tasks["a"]
    view.note = "written through the view"
    assert trainer.note == "written through the view"
    assert isinstance(view.logger, DummyLogger)
    assert data.shift == 1.0
    with pytest.raises(AttributeError):
        _ = data.unheard_of
    assert isinstance(view, Trainer)


class Drawing(Classifier):
    """Uses loggers as projects do: their folders, their classes, their number, their experiments."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert isinstance(self.logger, TensorBoardLogger)
        assert isinstance(self.loggers[1], CSVLogger)
        assert Path(str(self.logger.log_dir)).name == "version_3"
        assert self.trainer.log_dir == self.logger.log_dir
        if "log" in vars(self):
            self.logger.experiment.add_scalar("mine", 1.0, 0)
            self.loggers[1].log_metrics({"mine": 1.0})
            self.loggers[1].save()
            self.loggers[1].finalize("success")
        super().validation_step(batch, batch_idx)


def test_loggers_are_there_and_write_nothing(tmp_path: Path) -> None:
    loggers: list[Logger] = [TensorBoardLogger(tmp_path, version=3), CSVLogger(tmp_path / "csv")]
    data: dict[str, LightningDataModule] = {"a": Shifted(0, 1.0, 3), "b": Shifted(1, 2.0, 4)}
    merge(Drawing, loggers, data)
    (written,) = (tmp_path / "csv").rglob("metrics.csv")
    head = written.read_text().splitlines()[0]
    assert "merge/" in head  # the merge itself does log
    assert "mine" not in head


class Own(Logger):
    """A logger of the user's."""

    name, version = "own", 5

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Any] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lines.append(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self.lines.append(args)

    def log_pictures(self, pictures: Tensor) -> None:
        self.lines.append(pictures)

    def folder(self) -> str:
        return f"{self.name}/{self.version}"


def test_a_logger_of_the_users_own_is_muted() -> None:
    own = Own()
    (view,) = muted([own])
    assert isinstance(view, Own)
    assert view.folder() == "own/5"
    view.log_metrics({"a": 1.0})
    view.log_hyperparams({"a": 1})
    view.log_pictures(None)  # type: ignore[arg-type]
    view.save()
    view.experiment.add_image("a", None)  # type: ignore[attr-defined]
    assert not own.lines
    assert isinstance(muted([])[0], DummyLogger)
