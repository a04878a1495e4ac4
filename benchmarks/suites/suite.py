"""The base class of suites: tasks with one base, their experts (trained once, then stored), data, and a metric."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import TQDMProgressBar

from benchmarks.suites.packages import cache_folder
from benchmarks.suites.splits import SplitData
from com_lightning.validation import quiet_lightning


@dataclass(frozen=True)
class Recipe:
    """How a module is trained: AdamW, one cycle."""

    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.2

    def optimizer(self) -> dict[str, Any]:
        """Arguments for the module's optimizer."""
        return {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay, "warmup": self.warmup}


@dataclass
class Experts:
    """Base and experts of one seed.

    Attributes:
        base: the model that all experts were fine-tuned from, in the experts' class. Its head is not used.
        experts: task -> expert.
    """

    base: LightningModule
    experts: dict[str, LightningModule] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Stands for all weights: other experts have another digest, though they were trained in the same way."""
        digest = hashlib.blake2b(digest_size=6)
        for module in (self.base, *self.experts.values()):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                digest.update(tensor.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


class Suite(ABC):
    """Tasks, their experts and their data.

    Subclasses define models and data; this class trains models that are not in the cache yet.

    Attributes:
        name: name of the suite, its files and its command.
        title: what it is called in tables and pictures.
        tasks: the tasks, in the order of tables.
        metric: logged by ``test_step`` as ``test_<metric>`` and by ``validation_step`` as ``val_<metric>``.
        lower_is_better: whether the metric is a perplexity rather than an accuracy.
        private: patterns of parameters that stay with their task.
        not_applicable: rule -> why the suite is not measured with it.
        version: must be raised when data or modules change without a change of their settings.
        base_recipe: how the base is trained; ``None`` if it is pretrained.
        recipe: how the experts are trained.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    tasks: ClassVar[Sequence[str]]
    metric: ClassVar[str] = "acc"
    lower_is_better: ClassVar[bool] = False
    private: ClassVar[Sequence[str]] = ("head",)
    not_applicable: ClassVar[Mapping[str, str]] = {"slerp": "it takes two experts"}
    version: ClassVar[int] = 1
    base_recipe: Recipe | None = None
    recipe: Recipe

    @abstractmethod
    def base_module(self) -> LightningModule:
        """The base, untrained or pretrained."""

    def base_data(self) -> LightningDataModule:
        """The data that the base is trained on."""
        raise NotImplementedError(f"the base of {self.name} is not trained")

    @abstractmethod
    def expert_module(self, task: str, base: LightningModule) -> LightningModule:
        """The expert of a task before it is trained: the base with a fresh head."""

    @abstractmethod
    def data(self, task: str) -> SplitData:
        """The train, val and test data of a task."""

    def expert_recipe(self, task: str) -> Recipe:
        """How the expert of a task is trained."""
        return self.recipe

    def joint_recipe(self) -> Recipe:
        """How one model is trained on all tasks. A step has a batch of this size from each task.

        By default there are as many steps as in the longest training of an expert, and batches of the same size, so
        that no task gets less training than its expert.
        """
        return replace(self.recipe, steps=max(self.expert_recipe(task).steps for task in self.tasks))

    def settings(self) -> dict[str, Any]:
        """Everything that trained modules depend on, in plain values; other settings use another folder."""
        base = asdict(self.base_recipe) if self.base_recipe else None
        experts = {task: asdict(self.expert_recipe(task)) for task in self.tasks}
        return {"version": self.version, "base": base, "experts": experts}

    def folder(self, seed: int) -> Path:
        """The folder of the trained modules of a seed."""
        digest = hashlib.sha256(json.dumps(self.settings(), sort_keys=True).encode()).hexdigest()[:10]
        return cache_folder() / "trained" / f"{self.name}-{digest}" / f"seed{seed}"

    def load(self, seed: int) -> Experts:
        """Load base and experts of a seed, and train those that are not in the cache."""
        folder = self.folder(seed)
        seed_everything(seed, verbose=False)
        base = self.base_module()
        if self.base_recipe:
            trained_or_kept(base, self.base_data, self.base_recipe, folder / "base.ckpt", seed)
        experts = Experts(base)
        for task in self.tasks:
            seed_everything(seed, verbose=False)  # an expert must not depend on which others were in the cache
            expert = self.expert_module(task, base)
            path = folder / f"{task}.ckpt"
            trained_or_kept(expert, partial(self.data, task), self.expert_recipe(task), path, seed)
            experts.experts[task] = expert
        return experts

    def normalized(self, value: float, expert: float) -> float:
        """The share of the expert's performance that is left: 1 is as good as the expert, more is better."""
        return expert / value if self.lower_is_better else value / expert

    def mean(self, values: Sequence[float]) -> float:
        """Mean over tasks: geometric for perplexities, whose ratios count; 0 if a value is 0 (infinite perplexity)."""
        if not self.lower_is_better:
            return statistics.mean(values)
        return statistics.geometric_mean(values) if all(values) else 0.0


def trained_or_kept(module: LightningModule, data: Any, recipe: Recipe, path: Path, seed: int) -> None:
    """Load a module's trained weights, or train it and store them.

    Args:
        module: the untrained module; it is changed in place.
        data: returns the datamodule to train on.
        recipe: how to train.
        path: path of the checkpoint, which appears when training has ended.
        seed: seed of the order of batches.
    """
    if path.exists():
        load_weights(module, path)
        return
    print(f"Training {path.parent.parent.name}/{path.parent.name}/{path.stem}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    seed_everything(seed, verbose=False)
    with quiet_lightning():
        trainer = _trainer(recipe.steps)
        trainer.fit(module, datamodule=data())
    seconds = time.perf_counter() - start
    if trainer.interrupted:
        raise KeyboardInterrupt
    if trainer.global_step < recipe.steps:
        raise RuntimeError(f"{path.stem}: training ended after {trainer.global_step} of {recipe.steps} steps")
    values = {name: float(value) for name, value in trainer.callback_metrics.items()}
    message = ", ".join(f"{name} {value:.4f}" for name, value in values.items())
    print(f"{path.stem}: {seconds:.0f} s, {message}", file=sys.stderr, flush=True)
    trained = {name: value for name, value in module.state_dict().items() if name in _saved(module)}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.part")
    try:
        torch.save({"state_dict": trained, "seconds": seconds, "metrics": values, "recipe": asdict(recipe)}, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(module: LightningModule, path: Path) -> None:
    """Load weights that :func:`trained_or_kept` has stored."""
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    missing, unexpected = module.load_state_dict(state, strict=False)
    if unexpected or (lost := set(missing) & _saved(module)):
        raise RuntimeError(f"{path} does not fit {type(module).__name__}: {sorted(unexpected or lost)[:5]}")


def _saved(module: LightningModule) -> set[str]:
    """Names of tensors that training may change; frozen ones come with the base."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return set(module.state_dict()) - frozen


def _trainer(steps: int) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        max_steps=steps,
        # Validate once, after the last step.
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[TQDMProgressBar(refresh_rate=50)],
        log_every_n_steps=10,
    )
