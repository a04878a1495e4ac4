"""Sharded checkpoints are read as they are, and nothing in them is executed."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_saver import save

import com_lightning as com
from com_lightning import MergeDataModule, MergeError
from com_lightning.experts.load import load_expert
from com_lightning.experts.sharded import read_sharded
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer


def saved(expert: Classifier, folder: Path, container: str) -> Path:
    """A sharded checkpoint as one of Lightning's strategies writes it: tensors by DCP, the rest in ``meta.pt``."""
    trainer = quiet_trainer()
    trainer.strategy.connect(expert)
    trainer.save_checkpoint(folder / "whole.ckpt", weights_only=True)
    content = torch.load(folder / "whole.ckpt", weights_only=True)
    path = folder / f"{container}.sharded"
    optimizer = {"state": {"body.0.weight": {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    save({container: content.pop("state_dict"), "optimizer_0": optimizer}, checkpoint_id=path, no_dist=True)
    torch.save(content, path / "meta.pt")
    return path


@pytest.mark.parametrize("container", ["model", "state_dict"])  # FSDPStrategy, ModelParallelStrategy
def test_a_checkpoint_of_a_strategy_is_an_expert(container: str, tmp_path: Path) -> None:
    expert = make_experts()[1]  # with four classes, as its hyperparameters say
    path = saved(expert, tmp_path, container)
    loaded = load_expert("a", path, Classifier(3))
    assert loaded.hparams["classes"] == 4
    assert loaded.state_dict().keys() == expert.state_dict().keys()
    assert all(torch.equal(value, expert.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert all(p.untyped_storage().is_shared() for p in loaded.parameters()), "they are in mapped files"


def test_experts_of_both_kinds_give_the_same_merge(tmp_path: Path) -> None:
    experts = dict(zip("ab", make_experts()))
    paths = {}
    for task, expert in experts.items():
        (tmp_path / task).mkdir()
        paths[task] = saved(expert, tmp_path / task, "model")
    tasks = {"a": make_data(0), "b": make_data(1, 4)}
    results = []
    for sources in (paths, {task: path.parent / "whole.ckpt" for task, path in paths.items()}):
        data = MergeDataModule(tasks, num_samples=40)
        results.append(com.merge(Classifier(3), dict(sources), data, trainer=quiet_trainer(), offload="layers"))
    one, other = (result.modules["a"].state_dict() for result in results)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (lambda state: dict(state), {"a.weight"}),
        (lambda state: {"app": {"model": state, "optim": {"x": torch.ones(2)}}, "epoch": 3}, {"a.weight"}),
        (lambda state: {"state_dict": {"model.a.weight": state["a.weight"]}}, {"model.a.weight"}),
        (lambda state: {"optimus.weight": state["a.weight"]}, {"optimus.weight"}),
    ],
)
def test_only_tensors_of_the_model_are_read(content: Callable[[Any], Any], names: set[str], tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(3, 2).bfloat16()}
    save(content(state), checkpoint_id=tmp_path / "x", no_dist=True)
    (found,) = read_sharded(tmp_path / "x").values()
    assert found.keys() == names
    assert torch.equal(next(iter(found.values())), state["a.weight"])


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def changed(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with open(folder / ".metadata", "rb") as file:
            index: Metadata = pickle.load(file)
        (folder / ".metadata").write_bytes(pickle.dumps(change(index)))

    return apply


def with_size(index: Metadata) -> Metadata:
    entry = index.state_dict_metadata["a.weight"]
    assert isinstance(entry, TensorStorageMetadata)
    return replace(index, state_dict_metadata={"a.weight": replace(entry, size=torch.Size([2**40]))})


def elsewhere(index: Metadata) -> Metadata:
    stored = {key: replace(info, relative_path="../other") for key, info in index.storage_data.items()}
    return replace(index, storage_data=stored)


def of_data(folder: Path) -> Path:
    return next(folder.glob("*.distcp"))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (changed(lambda index: Evil()), "names builtins.print, which no index needs"),
        (changed(lambda index: replace(index, planner_data=Evil())), "names builtins.print"),
        (changed(lambda index: 3), ".metadata holds a int"),
        (changed(with_size), "its tensors claim .* bytes, and its files have"),
        (changed(elsewhere), "names files outside of the folder: ../other"),
        (changed(lambda index: replace(index, state_dict_metadata={})), "without tensors of a model"),
        (lambda folder: of_data(folder).unlink(), "names files that are not there: __0_0.distcp"),
        (lambda folder: of_data(folder).write_bytes(pickle.dumps(Evil())), "not a readable sharded checkpoint"),
        (lambda folder: torch.save(Evil(), folder / "meta.pt"), "not a readable sharded checkpoint"),
        (lambda folder: (folder / ".metadata").write_bytes(b""), "not a readable sharded checkpoint"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_executed(
    damage: Callable[[Path], None], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save({"a.weight": torch.randn(3, 2)}, checkpoint_id=tmp_path / "x", no_dist=True)
    damage(tmp_path / "x")
    with pytest.raises(MergeError, match=told):
        load_expert("a", tmp_path / "x", Classifier(3))
    assert "executed" not in capsys.readouterr().out
