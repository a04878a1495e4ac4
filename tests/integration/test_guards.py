"""What would do nothing, or something else than is meant, is told."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import nn

import com_lightning
from com_lightning import TIES, Average, ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.plan import make_plan
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer

MODULE = type("LightningModule", (nn.Module,), {"__module__": "pytorch_lightning.core.module"})
DATA = type("LightningDataModule", (), {"__module__": "pytorch_lightning.core.datamodule"})
TRAINER = type("Trainer", (), {"__module__": "pytorch_lightning.trainer.trainer"})


class Net(MODULE):  # type: ignore[misc, valid-type]
    """A user's module of the other package."""


def own() -> dict[str, Any]:
    return {"model": Classifier(), "experts": dict(zip("ab", make_experts())), "method": Average()}


@pytest.mark.parametrize(
    "other",
    [{"model": Net()}, {"trainer": TRAINER()}, {"datamodule": DATA()}, {"experts": {"a": Net(), "b": Net()}}],
    ids=["model", "trainer", "datamodule", "experts"],
)
def test_the_package_pytorch_lightning_is_told_with_what_to_change(other: dict[str, Any]) -> None:
    with pytest.raises(MergeError, match=r"import lightning\.pytorch as pl ") as error:
        com_lightning.merge(**{**own(), **other})
    assert "is a pytorch_lightning." in str(error.value)


def test_datamodules_and_models_of_pytorch_lightning_are_told_early() -> None:
    with pytest.raises(MergeError, match=r"task 'a': LightningDataModule is a pytorch_lightning\."):
        MergeDataModule({"a": DATA()})
    with pytest.raises(MergeError, match=r"model: Net is a pytorch_lightning\.LightningModule"):
        ChainOfMergesCallback({}, Average()).merge(Net())


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_a_callback_that_does_nothing_says_what_to_run(stage: str) -> None:
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())))
    trainer: Trainer = quiet_trainer(callbacks=[merger])
    with pytest.warns(UserWarning, match=rf"in trainer\.{stage} it does nothing. To merge, run trainer\.validate"):
        merger.setup(trainer, Classifier(), stage)
    assert not merger.merged


def test_one_source_for_two_tasks_is_told() -> None:
    expert, other = perturb(Classifier(3)), perturb(Classifier(3))
    plan = make_plan(Classifier(3), {"a": expert, "b": expert, "c": other}, None, Average())
    told = [warning for warning in plan.parameters.warnings if "same source" in warning]
    assert told == [
        "experts 'a', 'b': all come from the same source, which counts 2 times; is one of them meant to be another?"
    ]


@pytest.mark.parametrize("given", [TIES, "ties", "TIES()"])
def test_a_rule_in_python_may_be_a_class_or_a_text(given: Any) -> None:
    assert str(ChainOfMergesCallback({}, given).method) == "TIES()"
    with pytest.raises(MergeError, match="did you mean TIES"):
        ChainOfMergesCallback({}, "tise")


@pytest.mark.parametrize("method", ["TIES", "ties", "TIES(density=0.1)"])
def test_rules_by_name_merge_with_data(method: str) -> None:
    base = Classifier(3)
    experts = {task: perturb(Classifier(3)) for task in "ab"}
    for expert in experts.values():
        expert.load_state_dict(base.state_dict())
        perturb(expert, 0.1)
    merger = ChainOfMergesCallback(experts, method, base=base)
    tasks = MergeDataModule({"a": make_data(), "b": make_data(1)})
    quiet_trainer(callbacks=[merger]).validate(Classifier(3), datamodule=tasks)
    assert merger.report.method["class"] == "TIES"
