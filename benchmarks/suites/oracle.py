"""An upper bound for merges: one model that is trained on the data of all tasks at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from benchmarks.suites.images8 import ImageClassifier
from benchmarks.suites.modules import OneCycle
from benchmarks.suites.suite import Experts, Suite, trained_or_kept
from com_lightning.core.tensors.modules import matches_any

JOINT = "joint training"
"""Its name as a method of a suite."""


class Joint(OneCycle):
    """The modules of all tasks, which share every tensor that is not private. A step gets a batch of each task.

    Images of all tasks go through the network as one batch, so that batch normalisation is trained with the statistics
    that it is used with later: those of the mixture of all tasks. Task by task, each batch would be normalised by the
    statistics of its own task, which one model does not have when it is used. Other networks treat each sample by
    itself. For them, one batch per task means the same, and needs less padding.

    Args:
        modules: task -> untrained module.
        private: patterns of tensors that are not shared.
        optimizer: see :class:`~benchmarks.suites.modules.OneCycle`.
    """

    def __init__(self, modules: Mapping[str, LightningModule], private: tuple[str, ...], **optimizer: float) -> None:
        super().__init__(**optimizer)
        self.tasks = nn.ModuleDict(modules)
        first, *others = modules.values()
        for other in others:
            _share(first, other, private)

    def on_fit_start(self) -> None:
        for module in self.tasks.values():
            module.log = lambda *_, **__: None  # type: ignore[assignment]  # a module without a trainer cannot log

    def on_fit_end(self) -> None:
        for module in self.tasks.values():
            del module.log

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        modules: Mapping[str, Any] = self.tasks  # type: ignore[assignment]
        if all(isinstance(modules[task], ImageClassifier) for task in batch):
            losses = self._mixed(batch)
        else:
            losses = [modules[task].training_step(part, batch_idx) for task, part in batch.items()]
        return sum(losses[1:], losses[0]) / len(losses)

    def _mixed(self, batch: Mapping[str, Any]) -> list[Tensor]:
        """The loss of each task, with the features of all tasks computed at once."""
        modules: Mapping[str, Any] = self.tasks  # type: ignore[assignment]
        images = [part[0] for part in batch.values()]
        features = modules[next(iter(batch))].features([torch.cat(images)]).split([len(each) for each in images])
        return [
            nn.functional.cross_entropy(modules[task].head(own), modules[task].labels(part))
            for (task, part), own in zip(batch.items(), features)
        ]


class JointData(LightningDataModule):
    """A batch of each task at a time; a task with less data starts again when it ends."""

    def __init__(self, tasks: Mapping[str, LightningDataModule]) -> None:
        super().__init__()
        self.tasks = tasks

    def setup(self, stage: str) -> None:
        for data in self.tasks.values():
            data.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        loaders = {task: data.train_dataloader() for task, data in self.tasks.items()}
        return CombinedLoader(loaders, "max_size_cycle")


def train_jointly(suite: Suite, seed: int, experts: Experts) -> dict[str, LightningModule]:
    """Train one model on all tasks, or load it from the cache.

    Training is described by :meth:`~benchmarks.suites.suite.Suite.joint_recipe`.

    Args:
        suite: the suite.
        seed: seed of heads and order of batches.
        experts: these experts' base is the start.

    Returns:
        Task -> module; the modules share all tensors that are not private.
    """
    modules = {}
    for task in suite.tasks:
        seed_everything(seed, verbose=False)
        modules[task] = suite.expert_module(task, experts.base)
    recipe = suite.joint_recipe()
    joint = Joint(modules, tuple(suite.private), **recipe.optimizer())
    data = {task: suite.data(task) for task in suite.tasks}
    for each in data.values():
        each.batch_size = recipe.batch_size
    trained_or_kept(joint, lambda: JointData(data), recipe, suite.folder(seed) / "joint.ckpt", seed)
    return modules


def _share(source: nn.Module, target: nn.Module, private: tuple[str, ...]) -> None:
    """Replace the parameters and buffers of a module by those of another, unless they are private."""
    sources = dict(source.named_modules())
    for prefix, module in target.named_modules():
        for members in ("_parameters", "_buffers"):
            for name in getattr(module, members):
                if not matches_any(f"{prefix}.{name}".lstrip("."), private):
                    getattr(module, members)[name] = getattr(sources[prefix], members)[name]
