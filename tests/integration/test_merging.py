"""The front door: one call with and without data, a trainer that is given back, and options that were renamed."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from com_lightning import (
    TIES,
    Average,
    ChainOfMergesCallback,
    MergeDataModule,
    MergeError,
    MergeOptions,
    TaskArithmetic,
    merge,
)
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer

EXPERTS: dict[str, Any] = dict(zip("ab", make_experts()))


def data() -> dict[str, Any]:
    return {"a": make_data(0, 3), "b": make_data(1, 4)}


def base() -> Classifier:
    torch.manual_seed(0)  # what make_experts starts from
    return Classifier()


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def differs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return any(not torch.equal(one[name], other[name]) for name in one)


MERGE_AND_FORGET = """
import gc, weakref
from com_lightning import merge
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer

def forgotten():
    data, trainer = {"a": make_data(0, 3), "b": make_data(1, 4)}, quiet_trainer()
    result = merge(Classifier(3), dict(zip("ab", make_experts())), data, trainer=trainer)
    return [weakref.ref(each) for each in (*data.values(), trainer, *result.modules.values())]

references = forgotten()
gc.collect()
print("alive:", [type(each()).__name__ for each in references if each() is not None])
"""


def test_nothing_of_a_merge_stays_alive() -> None:
    """A comparison or a sweep merges often in one process. In one of its own, because pytest keeps some frames."""
    done = subprocess.run([sys.executable, "-c", MERGE_AND_FORGET], capture_output=True, text=True, check=True)
    assert "alive: []" in done.stdout


def test_with_data(tmp_path: Path) -> None:
    model = Classifier(3)
    before = state(model)
    result = merge(model, EXPERTS, data(), trainer=quiet_trainer())
    assert not differs(state(model), before)
    assert set(result.modules) == {"a", "b"}
    assert set(result.report.metrics) == {"expert", "average", "merged"}
    assert "| mean" in str(result)
    assert repr(result) == str(result)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "a.ckpt").is_file()


def test_it_gives_what_the_callback_gives() -> None:
    result = merge(Classifier(3), EXPERTS, MergeDataModule(data(), num_samples=24), trainer=quiet_trainer())
    merger = ChainOfMergesCallback(EXPERTS)
    tasks = MergeDataModule(data(), num_samples=24)
    quiet_trainer(callbacks=[merger]).validate(Classifier(3), datamodule=tasks, verbose=False)
    for task, module in result.modules.items():
        assert not differs(state(module), state(merger.modules[task]))
    assert result.report.metrics == merger.report.metrics


def test_without_data_and_without_a_trainer() -> None:
    model = base()
    before = state(model)
    result = merge(model, EXPERTS, method=TIES())
    assert not differs(state(model), before)
    assert result.report.method["class"] == "TIES"
    assert not result.report.metrics
    with pytest.raises(MergeError, match="ChainOfMerges needs the tasks' data"):
        merge(model, EXPERTS)
    with pytest.raises(MergeError, match=r"data: must be a com_lightning\.MergeDataModule"):
        merge(model, EXPERTS, make_data(0))


def test_a_model_that_is_configured_late_is_not_changed() -> None:
    class Late(Classifier):
        def configure_model(self) -> None:
            self.configured = True

    experts: dict[str, LightningModule] = {task: Late(3) for task in "ab"}
    model = Late(3)
    merge(model, experts, {task: make_data(0) for task in "ab"}, Average(), quiet_trainer(), baselines=False)
    assert not hasattr(model, "configured")


def test_what_help_shows() -> None:
    named = inspect.signature(merge).parameters
    assert set(named) - {"model", "experts", "datamodule", "method", "trainer"} == set(
        inspect.signature(MergeOptions).parameters
    )
    for name in inspect.signature(MergeOptions).parameters:
        assert f"{name}: " in (MergeOptions.__doc__ or ""), name
    with pytest.raises(TypeError, match="outptu_dir"):
        merge(Classifier(3), EXPERTS, outptu_dir="x")


# -- the trainer -------------------------------------------------------------------------------------------------------


def condition(trainer: Trainer) -> list[Any]:
    """All that a merge touches."""
    loop = trainer.validate_loop
    return [
        trainer.callbacks,  # type: ignore[attr-defined]
        list(trainer.callbacks),  # type: ignore[attr-defined]
        trainer.loggers,
        list(trainer.loggers),
        trainer.datamodule,  # type: ignore[attr-defined]
        trainer.lightning_module,
        trainer.state.fn,
        trainer.state.stage,
        trainer.state.status,
        dict(trainer.callback_metrics),
        dict(trainer.logged_metrics),
        loop.verbose,
        loop._combined_loader,
        loop.batch_progress.total.completed,
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_is_given_back(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer(logger=CSVLogger(tmp_path), callbacks=[Callback()])
    own = make_experts()[0]
    trainer.validate(own, datamodule=make_data(0), verbose=False)
    before = condition(trainer)
    if fails:
        monkeypatch.setattr(Classifier, "validation_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge(Classifier(3), EXPERTS, data(), trainer=trainer)
    else:
        merge(Classifier(3), EXPERTS, data(), trainer=trainer)
    after = condition(trainer)
    assert after == before
    assert all(now is then for now, then in zip(after[:3:2], before[:3:2]))
    assert trainer.lightning_module is own


# -- one callback, several merges --------------------------------------------------------------------------------------


def validated(trainer: Trainer, model: LightningModule) -> LightningModule:
    trainer.validate(model, datamodule=MergeDataModule(data(), num_samples=24), verbose=False)
    return model


def test_another_model_is_merged_too() -> None:
    merger = ChainOfMergesCallback(EXPERTS, baselines=False)
    trainer = quiet_trainer(callbacks=[merger])
    first = validated(trainer, Classifier(3))
    result = merger.result
    validated(trainer, first)
    assert merger.result is result
    second = validated(trainer, Classifier(3))
    assert merger.result is not result
    assert not differs(state(first), state(second))


def test_what_is_set_later_counts() -> None:
    merger = ChainOfMergesCallback(EXPERTS, baselines=False)
    trainer = quiet_trainer(callbacks=[merger])
    model = validated(trainer, Classifier(3))
    merger.method = Average()
    validated(trainer, model)
    assert merger.report.method["class"] == "Average"
    merger.experts = dict(zip("ab", make_experts(scale=0.1)))
    before = state(model)
    validated(trainer, model)
    assert differs(state(model), before)
    merger.method = TaskArithmetic()
    with pytest.raises(MergeError, match="base: the model now holds the weights of an earlier merge"):
        validated(trainer, model)
    merger.options.base = base()
    validated(trainer, model)
    assert merger.report.method["class"] == "TaskArithmetic"


def test_a_plan_serves_its_own_model_only() -> None:
    merger = ChainOfMergesCallback(EXPERTS, baselines=False)
    tasks = MergeDataModule(data(), num_samples=24)
    tasks.setup("validate")
    merger.use(merger.plan(Classifier(3), tasks, becomes_first=False), Classifier(3))
    with pytest.raises(MergeError, match=r"but does not fit: head\.weight"):
        validated(quiet_trainer(callbacks=[merger]), Classifier(5))


def test_nothing_to_validate_is_told_and_lets_go_of_the_folder(tmp_path: Path) -> None:
    merger = ChainOfMergesCallback(EXPERTS, output_dir=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="nothing was merged: limit_val_batches"):
        validated(quiet_trainer(callbacks=[merger], limit_val_batches=0), Classifier(3))
    assert not merger.merged
    assert not list(tmp_path.iterdir())
    FileLock(tmp_path / "lock").acquire(timeout=0)
    validated(quiet_trainer(callbacks=[merger]), Classifier(3))
    assert (tmp_path / "out" / "a.ckpt").is_file()


# -- old names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"metric": "val_loss"}, {"monitor": "val_loss"}),
        ({"no_resume": True}, {"resume": False}),
        ({"experts_device": "cpu"}, {"offload": "experts"}),
        ({"experts_device": None}, {"offload": None}),
        ({"offload_experts": True}, {"offload": "experts"}),
        ({"offload_experts": False}, {"offload": None}),
        ({"grow_vocabulary": True}, {"resize_embeddings": True}),
    ],
)
def test_old_names_work_with_a_warning(old: dict[str, Any], new: dict[str, Any]) -> None:
    (name,) = new
    with pytest.warns(FutureWarning, match=f"is now {name}="):
        merger = ChainOfMergesCallback(EXPERTS, **old)
    assert getattr(merger.options, name) == new[name]
    with pytest.raises(TypeError, match="old name"):
        MergeOptions(**old, **new)


def test_the_direction_of_the_metric() -> None:
    result = merge(Classifier(3), EXPERTS, data(), trainer=quiet_trainer(), monitor="val_acc", mode="min")
    assert (result.report.monitor, result.report.mode) == ("val_acc", "min")
    with pytest.raises(MergeError, match="mode: must be 'min' or 'max' or None"):
        merge(Classifier(3), EXPERTS, data(), mode="best")
