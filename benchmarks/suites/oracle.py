"""What bounds a merge from above: one model that is trained on the data of all tasks at once, as no merge is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn

from benchmarks.suites.modules import OneCycle
from benchmarks.suites.suite import Recipe, Suite, trained_or_kept
from com_lightning.core.tensors.modules import matches_any

JOINT = "joint training"
"""Its name among the methods of a suite."""


class Joint(OneCycle):
    """The modules of all tasks, which share every tensor that is not private. A step sees a batch of each task.

    Args:
        modules: task -> module before it is trained.
        private: patterns of what is not shared.
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
            module.log = lambda *_, **__: None  # type: ignore[assignment]  # it has no trainer to log to

    def on_fit_end(self) -> None:
        for module in self.tasks.values():
            del module.log

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        modules: Mapping[str, Any] = self.tasks  # type: ignore[assignment]
        losses: list[Tensor] = [modules[task].training_step(part, batch_idx) for task, part in batch.items()]
        return sum(losses[1:], losses[0]) / len(losses)


class JointData(LightningDataModule):
    """A batch of each task at a time; a task whose data end sooner begins again."""

    def __init__(self, tasks: Mapping[str, LightningDataModule]) -> None:
        super().__init__()
        self.tasks = tasks

    def setup(self, stage: str) -> None:
        for data in self.tasks.values():
            data.setup(stage)

    def train_dataloader(self) -> CombinedLoader:
        loaders = {task: data.train_dataloader() for task, data in self.tasks.items()}
        return CombinedLoader(loaders, "max_size_cycle")


def train_jointly(suite: Suite, seed: int) -> dict[str, LightningModule]:
    """Task -> module; all are one model but for what is private. Trained, or had from the cache.

    It takes as many steps as the expert that takes most, with a batch of every task in each, so that no task sees
    less than its expert has.

    Args:
        suite: whose base it begins with.
        seed: of base, heads and order of batches.
    """
    base = suite.load(seed).base
    modules = {}
    for task in suite.tasks:
        seed_everything(seed, verbose=False)
        modules[task] = suite.expert_module(task, base)
    recipe: Recipe = replace(suite.recipe, steps=max(suite.expert_recipe(task).steps for task in suite.tasks))
    joint = Joint(modules, tuple(suite.private), **recipe.optimizer())
    data = {task: suite.data(task) for task in suite.tasks}
    trained_or_kept(joint, lambda: JointData(data), recipe, suite.folder(seed) / "joint.ckpt", seed)
    return modules


def _share(source: nn.Module, target: nn.Module, private: tuple[str, ...]) -> None:
    """Put the parameters and buffers of one module in the place of another's, unless they are private."""
    sources = dict(source.named_modules())
    for prefix, module in target.named_modules():
        for kind in ("_parameters", "_buffers"):
            for own in getattr(module, kind):
                if not matches_any(f"{prefix}.{own}".lstrip("."), private):
                    getattr(module, kind)[own] = getattr(sources[prefix], kind)[own]
