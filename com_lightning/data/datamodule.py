"""The data of all tasks, as one LightningDataModule."""

from __future__ import annotations

import copy
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from com_lightning.arguments import checked
from com_lightning.compat import of_other_package, renamed_options
from com_lightning.core.sweep.distributed import Peers
from com_lightning.data import sampling
from com_lightning.data.augmentation import with_copies
from com_lightning.data.one_task import OneTask, UnpreparedTask, lend_hooks
from com_lightning.data.sampling import CalibrationSample
from com_lightning.data.shares import (
    deal_out,
    is_iterator,
    loader_problems,
    loader_warnings,
    require_same_samples,
    warn_of_different_content,
)
from com_lightning.data.stock_cli import with_own_hyperparameters
from com_lightning.errors import MergeError


class TaskLoaders(LightningDataModule):
    """A task that is given by its loaders.

    Args:
        val: the loader to validate on, and to calibrate on by default.
        train: the loader to calibrate on with ``split="train"``.
        test: the loader to test on.
    """

    def __init__(self, val: Any, train: Any = None, test: Any = None) -> None:
        super().__init__()
        self._val, self._train, self._test = val, train, test

    def val_dataloader(self) -> Any:
        return self._val

    def train_dataloader(self) -> Any:
        return self._train

    def test_dataloader(self) -> Any:
        return self._test


class MergeDataModule(LightningDataModule):
    """The datamodules of all tasks.

    Each task is validated through its own datamodule, which is asked for each of its loaders once. The calibration data
    are a seeded random sample of a task's loader. They are read through a copy of that loader, so that the loader for
    validation is not touched.

    Note:
        Given to ``trainer.validate`` without a merge, it stands for its first task, with a warning; :meth:`task` gives
        each of them.

    Args:
        tasks: task name -> its datamodule (:class:`TaskLoaders` if there are only loaders).
        num_samples: number of calibration samples per task.
        split: the loader that they come from. Experts fit ``"train"`` data better than they should, but these data are
            never validated.
        holdout: validate only on samples that were not calibrated on (with ``split="val"``). ``None``: do so for each
            task whose loaders go through the same samples in each pass, of which at least as many remain as are
            calibrated on, if the method reads calibration data at all. The report says what was done.
        seed: of the sample. The same seed gives the same samples, whatever ran before.
        batch_size: of calibration batches; the loader's by default. It does not change the result, unless there are
            ``augmented_copies``.
        augmented_copies: number of perturbed copies of each calibration batch to calibrate on as well, see
            :mod:`com_lightning.data.augmentation`. Time and memory grow as with that many more samples. Copies help
            if samples are few and ``sensitivity`` is on: on eight image tasks, seven copies of 32 samples raise the
            normalised accuracy from 51.9 to 65.4 %, and three copies of 128 samples from 76.6 to 78.6 %. They hurt if
            there are enough samples: with 256, one copy costs the default chain 1.6 points with a vision transformer
            and 10.9 points with a ResNet, and changes nothing on a language model (``benchmarks/results/ablation.md``).

    Example::

        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader(torch.arange(10.0), batch_size=4)
        >>> tasks = MergeDataModule({"a": TaskLoaders(val=loader)}, num_samples=3, holdout=True)
        >>> tasks.setup("validate")
        >>> sample = tasks.calibration("a")
        >>> sample.samples, sample.overlap, sum(len(b) for b in tasks.task("a").val_dataloader())
        (3, 0, 7)
    """

    @renamed_options
    @checked
    def __init__(
        self,
        tasks: Mapping[str, LightningDataModule],
        num_samples: int = 256,
        split: Literal["val", "train"] = "val",
        holdout: bool | None = None,
        seed: int = 0,
        batch_size: int | None = None,
        augmented_copies: int = 0,
    ) -> None:
        super().__init__()
        for name, data in tasks.items():
            if problems := of_other_package(f"task '{name}'", data):
                raise MergeError(problems)
            if not isinstance(data, LightningDataModule):
                raise TypeError(
                    f"task '{name}': a {type(data).__name__} is no LightningDataModule; give loaders as "
                    "TaskLoaders(val=loader)"
                )
        tasks = with_own_hyperparameters(tasks, type(self))
        self.tasks, self.num_samples, self.split, self.holdout = tasks, num_samples, split, holdout
        self.seed, self.batch_size, self.augmented_copies = seed, batch_size, augmented_copies
        self.calibrates = True
        """Whether the method reads calibration data. A merge sets it. If not, there is nothing to hold out."""
        self._prepared = False
        self._set_up: set[str] = set()
        self._given: dict[tuple[str, str, int, bool], Any] = {}
        """The loaders that the tasks' datamodules gave, by task, split and process."""
        if tasks:
            lend_hooks(next(iter(tasks.values())), self)

    @property
    def settings(self) -> dict[str, Any]:
        """The options, without the tasks."""
        names = ("num_samples", "split", "holdout", "seed", "batch_size", "augmented_copies")
        return {name: getattr(self, name) for name in names}

    def prepare_data(self) -> None:
        if not self._prepared:
            for data in self.tasks.values():
                data.prepare_data()
        self._prepared = True

    def setup(self, stage: str) -> None:
        stages = [stage, "fit"] if stage == "validate" and self.split == "train" else [stage]
        for stage in stages:
            if stage not in self._set_up:
                for data in self.tasks.values():
                    data.trainer = self.trainer
                    data.setup(stage)
                self._set_up.add(stage)
                self._given.clear()  # it may have split the data anew

    def teardown(self, stage: str) -> None:
        for data in self.tasks.values():
            data.teardown(stage)
        self._set_up.clear()
        self._given.clear()

    def task(self, name: str, prepared: bool = False) -> LightningDataModule:
        """Return one task's data for ``trainer.validate``, without the samples that are held out for calibration.

        Args:
            name: of the task.
            prepared: whether the data have been prepared already. With several processes, ``prepare_data`` makes each
                wait for all others, including those that validate fewer tasks.
        """
        return OneTask(self, name) if prepared else UnpreparedTask(self, name)

    def val_dataloader(self) -> Any:
        return self._first("validated").val_dataloader()

    def test_dataloader(self) -> Any:
        return self._first("tested").test_dataloader()

    def _first(self, what: str) -> LightningDataModule:
        """The first task. Who asks for it in a trainer that merges nothing may have meant all of them."""
        callbacks: Any = self.trainer.callbacks if self.trainer else []  # type: ignore[attr-defined]
        first = next(iter(self.tasks))
        if self.trainer and len(self.tasks) > 1 and not any(hasattr(each, "merges_tasks") for each in callbacks):
            rank_zero_warn(
                f"only the first task, '{first}', is {what}. `datamodule=tasks.task(NAME)` gives each of them, and "
                "`MergeTrainer().validate(model, datamodule=tasks, merged=FOLDER)` goes through a merge on all tasks"
            )
        return self.task(first)

    def train_dataloader(self) -> Any:
        raise TypeError("a MergeDataModule holds tasks to merge; fit each expert with its own datamodule")

    def problems(self) -> list[str]:
        """What is wrong with the options and the loaders, each as one sentence. Call it after :meth:`setup`."""
        problems = []
        if not self.tasks:
            problems.append("data.tasks: no task is given")
        if self.split not in ("val", "train"):
            return [*problems, f"data.split: must be 'val' or 'train', got '{self.split}'"]
        if self.num_samples < 1:
            problems.append(f"data.num_samples: must be 1 or more, got {self.num_samples}")
        if self.batch_size is not None and self.batch_size < 1:
            problems.append(f"data.batch_size: must be 1 or more, got {self.batch_size}")
        if self.augmented_copies < 0:
            problems.append(f"data.augmented_copies: must be 0 or more, got {self.augmented_copies}")
        if self.holdout and self.split == "train":
            problems.append("data.holdout: there is nothing to hold out of validation when calibrating on train data")
        for name in self.tasks:
            try:
                loaders = {split: self.loaders(name, split) for split in dict.fromkeys(("val", str(self.split)))}
            except Exception as error:
                problems.append(f"task '{name}': its datamodule gives no loader ({type(error).__name__}: {error})")
                if "process group" in str(error):
                    problems[-1] += ". Processes start later: give a plain loader, a merge shares the data out itself"
                continue
            for split, parts in loaders.items():
                holdout = self.num_samples if self.holdout and self.split == "val" else None
                problems += loader_problems(f"task '{name}'", split, parts, self.loaders(name, split), holdout)
        return problems

    def warnings(self) -> list[str]:
        """What is odd about the loaders, each as one sentence. Call it after :meth:`problems` has found nothing."""
        return [
            warning
            for name in self.tasks
            for split in dict.fromkeys(("val", str(self.split)))
            for loader in self.loaders(name, split)
            for warning in loader_warnings(
                f"task '{name}': its {split} loader", loader, split == self.split, self.batch_size, self._processes
            )
        ]

    def calibration(
        self, name: str, limit_batches: int | float | None = None, peers: Peers | None = None
    ) -> CalibrationSample:
        """Draw the calibration data of a task, and load the share of one process.

        The batches of a single process are dealt out to the processes in turn, without padding. If each process reads
        other data from a stream, each draws its part of the samples from its own stream.

        Args:
            name: of the task.
            limit_batches: the trainer's ``limit_val_batches``: a number of batches, or a share of them.
            peers: the processes, which all call this; ``None``: this is the only one.

        Returns:
            The share of this process.

        Raises:
            MergeError: if the processes see different samples of a dataset.
        """
        with self.seeded(name):  # loaders draw a seed, and a dataset may augment at random
            return self._calibration(name, limit_batches, peers or Peers())

    def _calibration(self, name: str, limit_batches: int | float | None, peers: Peers) -> CalibrationSample:
        sample = CalibrationSample([], [], total=0, samples=0, overlap=0)
        loaders = self.loaders(name, self.split)
        label, holds_out = f"task '{name}': its {self.split} loader", self.holds_out(name)
        require_same_samples(label, loaders, peers)
        for index, (loader, drawn) in enumerate(zip(loaders, self.calibration_indices(name))):
            limit = sampling.batch_limit(limit_batches, loader)
            if drawn is None:
                whole = sampling.reservoir(loader, self.num_samples, limit, self._generator(name))
                sample.overlap = None
                deal_out(label, sample, whole, index, peers, self.num_samples, self._generator(f"{name}/share"))
                continue
            size = self.batch_size or sampling.batch_size_of(loader)
            drawn = drawn if limit is None else drawn[: limit * size]
            groups = [drawn[start : start + size] for start in range(0, len(drawn), size)]
            if not holds_out and sample.overlap is not None:
                validated = sampling.validated_indices(loader, limit)
                sample.overlap = None if validated is None else sample.overlap + len(validated & set(drawn))
            share = range((peers.rank - sample.total) % peers.size, len(groups), peers.size)
            batches = sampling.subset(loader, [i for number in share for i in groups[number]], size)
            sample.batches += [(batch, index) for batch in batches]
            sample.numbers += [sample.total + number for number in share]
            sample.total += len(groups)
            sample.samples += len(drawn)
            sample.warnings += warn_of_different_content(label, loader, drawn, peers)
        if self.split == "train":
            sample.overlap = 0
        return sample

    def augmented(self, name: str, batches: Sequence[Any], sample: CalibrationSample) -> tuple[list[Any], list[int]]:
        """Return the calibration batches of a task followed by their ``augmented_copies``, and the number of each.

        Args:
            name: of the task.
            batches: those of ``sample`` on the device, with the transfer hooks applied.
            sample: what the batches were made from.
        """
        return with_copies(batches, sample.numbers, sample.total, self.augmented_copies, name)

    @contextmanager
    def seeded(self, name: str, number: int = 0, cuda: bool = False) -> Iterator[None]:
        """Within it, the random state depends on nothing but the seed, the task's name and the number."""
        with isolate_rng(include_cuda=cuda):
            seed = (self._generator(name).initial_seed() + number) % 2**32
            (torch if cuda else torch.default_generator).manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
            yield

    def given(self, name: str, split: str) -> Any:
        """Return what a task's datamodule gives for a split. It is asked once, until the data are set up anew.

        A datamodule may split its data at each call. It is asked in each process when that has joined the others, and
        from the same random state. If it gives an iterator, it is asked anew, for a second one.
        """
        key = (name, split, os.getpid(), dist.is_available() and dist.is_initialized())
        if key not in self._given:
            with self.seeded(name):
                loader = getattr(self.tasks[name], f"{split}_dataloader")()
            before = sampling.parts(loader)
            after = [sampling.undistributed(part, self._processes) for part in before]
            if any(one is not other for one, other in zip(before, after)):
                combined = copy.copy(loader) if isinstance(loader, CombinedLoader) else CombinedLoader(loader)
                combined.flattened = after
                loader = combined if isinstance(loader, CombinedLoader) else combined.iterables
            if any(map(is_iterator, before)):
                return loader
            self._given[key] = loader
        loader = self._given[key]
        return copy.copy(loader) if isinstance(loader, CombinedLoader) else loader  # it keeps the place that it is at

    def loaders(self, name: str, split: str) -> list[Any]:
        """The loaders of one task: ``split`` is ``"train"``, ``"val"`` or ``"test"``."""
        return sampling.parts(self.given(name, split))

    def set_up_module(self, name: str, module: LightningModule) -> None:
        """Call ``setup("validate")`` of a module, where its trainer has the task's own datamodule.

        Args:
            name: of the task.
            module: the module.
        """
        before, view = module._trainer, copy.copy(self.trainer)
        if view is not None:
            view.datamodule = self.tasks[name]  # type: ignore[attr-defined]
            module.trainer = view
        try:
            module.setup(stage="validate")
        finally:
            module._trainer = before

    def __getattr__(self, name: str) -> Any:
        """Attributes of the first task's datamodule, for which this one stands."""
        if name.startswith("_") or not (tasks := vars(self).get("tasks")):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(next(iter(tasks.values())), name)

    @property
    def _processes(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def calibration_indices(self, name: str) -> list[list[int] | None]:
        """The dataset indices to calibrate on, for each loader of a task; ``None`` for a dataset without indices."""
        populations = [sampling.population(loader) for loader in self.loaders(name, self.split)]
        return sampling.draw(populations, self.num_samples, self._generator(name))

    def holds_out(self, name: str) -> bool:
        """Whether a task is validated without its calibration samples; the same in all processes of a merge."""
        if self.holdout is not None or self.split != "val" or not self.calibrates:
            return bool(self.holdout)
        return sampling.leaves_enough(self.loaders(name, "val"), self.num_samples, self._generator(name))

    def validation_loaders(self, name: str) -> Any:
        """What one task is validated on: its val loaders, without the samples that are held out."""
        if not self.holds_out(name):
            return self.given(name, "val")
        loaders = [
            sampling.restricted(loader, set(sampling.population(loader) or ()) - set(drawn or ()))
            for loader, drawn in zip(self.loaders(name, "val"), self.calibration_indices(name))
        ]
        return loaders[0] if len(loaders) == 1 else loaders

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
