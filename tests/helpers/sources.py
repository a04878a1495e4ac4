"""Experts from every kind of source, and the problems that a merge finds with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError, TaskLoaders
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.experts.load import ExpertSource
from tests.helpers.classifier import Classifier, make_data
from tests.helpers.running import quiet_trainer, save_lightning

TASKS = ("a", "b")
SOURCES = ["ckpt", "pt", "safetensors", "module", "state dict"]


class Unread(Dataset[Any]):
    """Data that must not be read."""

    def __init__(self, count: int = 20) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("data were read before all problems were known")


class NeedsWidth(Classifier):
    """Its checkpoints lack an argument that it needs."""

    def __init__(self, width: int) -> None:
        super().__init__(3, width)


class TiedClassifier(Classifier):
    """The head is the last layer of the body."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__(8)
        self.save_hyperparameters()
        if tied:
            self.head.weight = self.body.get_submodule("3").weight  # type: ignore[assignment]


def unread_data(count: int = 20) -> TaskLoaders:
    return TaskLoaders(val=DataLoader(Unread(count), batch_size=4))


def as_source(kind: str, expert: Classifier, folder: Path, name: str = "expert") -> ExpertSource:
    """An expert in one of the forms that experts come in."""
    if kind == "ckpt":
        return save_lightning(expert, folder / f"{name}.ckpt")
    if kind == "pt":
        torch.save(expert.state_dict(), folder / f"{name}.pt")
        return folder / f"{name}.pt"
    if kind == "safetensors":
        save_file(expert.state_dict(), folder / f"{name}.safetensors")
        return str(folder / f"{name}.safetensors")
    return expert if kind == "module" else expert.state_dict()


def merge(
    sources: Mapping[str, ExpertSource], data: MergeDataModule | None = None, model: Any = None, **kwargs: Any
) -> ChainOfMergesCallback:
    """Merge through ``trainer.validate``."""
    data = data or MergeDataModule({task: make_data(number) for number, task in enumerate(sources)}, num_samples=16)
    callback = ChainOfMergesCallback(dict(sources), baselines=False, **kwargs)
    quiet_trainer(callbacks=[callback]).validate(model or Classifier(), datamodule=data, verbose=False)
    return callback


def problems(
    sources: Mapping[str, Any], data: Mapping[str, Any] | None = None, model: Any = None, **kwargs: Any
) -> list[str]:
    """What a merge that must fail says, without reading data."""
    tasks = MergeDataModule(dict(data or {task: unread_data() for task in TASKS}), num_samples=4)
    with pytest.raises(MergeError) as caught:
        merge(sources, tasks, model, **kwargs)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def only(found: list[str]) -> str:
    assert len(found) == 1, found
    return found[0]


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor, _ in named_tensors(module)}
