"""The data of all tasks, and the calibration samples drawn from them."""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy
import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class TaskLoaders(LightningDataModule):
    """A task given by its loaders.

    Args:
        val: validated, and calibrated on by default.
        train: calibrated on with ``source="train"``.
        test: tested.
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


@dataclass
class CalibrationSample:
    """The calibration data of one task.

    Attributes:
        batches: ``(batch, dataloader_idx)`` on the host, as the task's own collate function makes them.
        numbers: of these batches among those of all processes.
        samples: number of samples in the batches of all processes.
        overlap: how many of them are validated too; ``None`` where that cannot be known.
    """

    batches: list[tuple[Any, int]]
    numbers: list[int]
    samples: int
    overlap: int | None


class MergeDataModule(LightningDataModule):
    """The datamodules of all tasks, as they are.

    Each task is validated through its own datamodule. Calibration data are a seeded random sample of a task's loader,
    in fresh loaders with its dataset and collate function, so that the loaders to be validated are left alone.

    Note:
        Given to ``trainer.validate``, it stands for its first task; :meth:`task` gives each of them.

    Args:
        tasks: task name -> its datamodule (:class:`TaskLoaders` where there are only loaders).
        samples: calibration samples per task.
        source: the loader they come from. ``"train"`` data fit the experts better than they should, but are never
            validated.
        holdout: validate on samples that were not calibrated on only (with ``source="val"``).
        seed: of the sample; the same one gives the same samples whatever ran before.
        batch_size: of calibration batches; the loader's own by default. It does not change the result.

    Example::

        >>> loader = DataLoader(torch.arange(10.0), batch_size=4)
        >>> tasks = MergeDataModule({"a": TaskLoaders(val=loader)}, samples=3, holdout=True)
        >>> tasks.setup("validate")
        >>> sample = tasks.calibration("a")
        >>> sample.samples, sample.overlap, sum(len(b) for b in tasks.task("a").val_dataloader())
        (3, 0, 7)
    """

    def __init__(
        self,
        tasks: Mapping[str, LightningDataModule],
        samples: int = 256,
        source: Literal["val", "train"] = "val",
        holdout: bool = False,
        seed: int = 0,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        for name, data in tasks.items():
            if not isinstance(data, LightningDataModule):
                raise TypeError(
                    f"task '{name}': a {type(data).__name__} is no LightningDataModule; loaders are given as "
                    "TaskLoaders(val=loader)"
                )
            if str(data.hparams.get("_class_path", "")).endswith("MergeDataModule"):
                raise TypeError(
                    f"task '{name}': LightningCLI gave its datamodule the hyperparameters of MergeDataModule in place "
                    "of its own; use com_lightning.MergeCLI, which does not"
                )
        self.tasks, self.samples, self.source, self.holdout = tasks, samples, source, holdout
        self.seed, self.batch_size = seed, batch_size
        self._prepared = False
        self._set_up: set[str] = set()
        if tasks:
            _lend_hooks(next(iter(tasks.values())), self)

    def prepare_data(self) -> None:
        if not self._prepared:
            for data in self.tasks.values():
                data.prepare_data()
        self._prepared = True

    def setup(self, stage: str) -> None:
        needed = [stage, "fit"] if stage == "validate" and self.source == "train" else [stage]
        for each in needed:
            if each not in self._set_up:
                for data in self.tasks.values():
                    data.trainer = self.trainer
                    data.setup(each)
                self._set_up.add(each)

    def teardown(self, stage: str) -> None:
        for data in self.tasks.values():
            data.teardown(stage)
        self._set_up.clear()

    def task(self, name: str, prepared: bool = False) -> LightningDataModule:
        """One task's data for ``trainer.validate``, without what is held out for calibration.

        Args:
            name: of the task.
            prepared: whether the data have been prepared already. In several processes, ``prepare_data`` is where each
                waits for all others, also those that validate fewer tasks.
        """
        return _Task(self, name) if prepared else _UnpreparedTask(self, name)

    def val_dataloader(self) -> Any:
        return self.task(next(iter(self.tasks))).val_dataloader()

    def test_dataloader(self) -> Any:
        return self.task(next(iter(self.tasks))).test_dataloader()

    def train_dataloader(self) -> Any:
        raise TypeError("a MergeDataModule holds tasks to merge; fit each expert with its own datamodule")

    def problems(self) -> list[str]:
        """What is wrong with the settings and the loaders, each as one sentence. To be called after :meth:`setup`."""
        found = []
        if not self.tasks:
            found.append("data.tasks: no task is given")
        if self.source not in ("val", "train"):
            return [*found, f"data.source: must be 'val' or 'train', got '{self.source}'"]
        if self.samples < 1:
            found.append(f"data.samples: must be 1 or more, got {self.samples}")
        if self.batch_size is not None and self.batch_size < 1:
            found.append(f"data.batch_size: must be 1 or more, got {self.batch_size}")
        if self.holdout and self.source == "train":
            found.append("data.holdout: there is nothing to hold out of validation when calibrating on train data")
        holdout = self.holdout and self.source == "val"
        for name in self.tasks:
            try:
                loaders = {split: self._loaders(name, split) for split in dict.fromkeys(["val", self.source])}
            except Exception as error:
                found.append(f"task '{name}': its datamodule gives no loader ({type(error).__name__}: {error})")
                continue
            for split, parts in loaders.items():
                sizes = [_population(loader) for loader in parts]
                if not parts or all(size is not None and not size for size in sizes):
                    found.append(f"task '{name}': its {split} loader is empty")
                elif holdout and None in sizes:
                    found.append(f"task '{name}': samples of an iterable dataset cannot be held out; use source: train")
                elif holdout and sum(len(s or ()) for s in sizes) <= self.samples:
                    total = sum(len(s or ()) for s in sizes)
                    found.append(
                        f"task '{name}': all {total} samples would be held out for calibration; lower data.samples"
                    )
        return found

    def calibration(
        self, name: str, limit_batches: int | float | None = None, rank: int = 0, processes: int = 1
    ) -> CalibrationSample:
        """Draw the calibration data of a task, and load the share of one process.

        Args:
            name: of the task.
            limit_batches: the trainer's ``limit_val_batches``: a number of batches, or a share of them.
            rank, processes: the batches that one process would get are dealt out in turn, without padding.
        """
        with self.seeded(name):  # loaders draw a seed, and a dataset may augment at random
            return self._calibration(name, limit_batches, rank, processes)

    @contextmanager
    def seeded(self, name: str, number: int = 0, cuda: bool = False) -> Iterator[None]:
        """The same random state whatever ran before."""
        with isolate_rng(include_cuda=cuda):
            seed = (self._generator(name).initial_seed() + number) % 2**32
            (torch if cuda else torch.default_generator).manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
            yield

    def _calibration(
        self, name: str, limit_batches: int | float | None, rank: int, processes: int
    ) -> CalibrationSample:
        batches: list[tuple[Any, int]] = []
        numbers: list[int] = []
        samples = total = 0
        overlap: int | None = 0
        for index, (loader, chosen) in enumerate(zip(self._loaders(name, self.source), self._chosen(name))):
            size = self.batch_size or getattr(loader, "batch_size", None)
            if not size:  # a batch sampler of the user's own
                size = max(map(len, _passes(loader)[0]), default=1) if _indexed(loader) else 1
            limit = _limit(limit_batches, loader)
            if chosen is None:
                part = list(_reservoir(loader, self.samples, limit, self._generator(name)))
                samples += sum(extract_batch_size(batch) for batch in part)
                count = len(part)
                mine = range((rank - total) % processes, count, processes)
                part = [part[number] for number in mine]
                overlap = None
            else:
                chosen = chosen if limit is None else chosen[: limit * size]
                samples += len(chosen)
                groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
                count = len(groups)
                mine = range((rank - total) % processes, count, processes)
                part = list(_subset(loader, [i for number in mine for i in groups[number]], size))
                if not self.holdout:
                    validated = _validated(loader, limit)
                    known = overlap is not None and validated is not None
                    overlap = (overlap or 0) + len((validated or set()) & set(chosen)) if known else None
            batches += [(batch, index) for batch in part]
            numbers += [total + number for number in mine]
            total += count
        return CalibrationSample(batches, numbers, samples, overlap if self.source == "val" else 0)

    def _loaders(self, name: str, split: str) -> list[Any]:
        loader = getattr(self.tasks[name], f"{split}_dataloader")()
        return [] if loader is None else list(CombinedLoader(loader, "sequential").flattened)

    def _generator(self, name: str) -> torch.Generator:
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    def _chosen(self, name: str) -> list[list[int] | None]:
        """For each loader of a task the dataset indices to calibrate on; ``None`` where a dataset has no indices."""
        populations = [_population(loader) for loader in self._loaders(name, self.source)]
        pairs = [(number, index) for number, population in enumerate(populations) for index in population or ()]
        order = torch.randperm(len(pairs), generator=self._generator(name))[: self.samples].tolist()
        chosen: list[list[int] | None] = [None if population is None else [] for population in populations]
        for number, index in (pairs[position] for position in order):
            chosen[number].append(index)
        return chosen

    def _validation_loaders(self, name: str) -> Any:
        if not self.holdout:
            return self.tasks[name].val_dataloader()
        loaders, rest = self._loaders(name, "val"), []
        for loader, chosen in zip(loaders, self._chosen(name)):
            held_out = set(chosen or ())
            if type(loader.batch_sampler) is BatchSampler:
                remaining = [index for index in _population(loader) or () if index not in held_out]
                rest.append(_subset(loader, remaining, loader.batch_size or 1))
            else:  # the user's own grouping
                groups = [[index for index in batch if index not in held_out] for batch in _passes(loader)[0]]
                rest.append(_fresh(loader, loader.dataset, batch_sampler=[group for group in groups if group]))
        return rest[0] if len(rest) == 1 else rest


class _Task(LightningDataModule):
    """One task of a :class:`MergeDataModule`, with the transfer hooks that the task's own datamodule overrides."""

    def __init__(self, tasks: MergeDataModule, name: str) -> None:
        super().__init__()
        self._tasks, self._name = tasks, name
        _lend_hooks(tasks.tasks[name], self)

    def setup(self, stage: str) -> None:
        self._tasks.trainer = self._tasks.trainer or self.trainer
        self._tasks.setup(stage)

    def val_dataloader(self) -> Any:
        return self._tasks._validation_loaders(self._name)

    def test_dataloader(self) -> Any:
        return self._tasks.tasks[self._name].test_dataloader()


class _UnpreparedTask(_Task):
    def prepare_data(self) -> None:
        self._tasks.trainer = self._tasks.trainer or self.trainer
        self._tasks.prepare_data()


def _lend_hooks(lender: LightningDataModule, borrower: LightningDataModule) -> None:
    for hook in TRANSFER_HOOKS:
        # Only those overridden: Lightning falls back on the module's own for the others.
        if is_overridden(hook, lender):
            setattr(borrower, hook, getattr(lender, hook))


def _population(loader: Any) -> list[int] | None:
    """The dataset indices that a loader goes through, without reading data; ``None`` if it has no indices."""
    if not _indexed(loader):
        return [] if sized_len(loader) == 0 else None
    first, second = ([index for batch in batches for index in batch] for batches in _passes(loader))
    return list(dict.fromkeys(first)) if first == second else sorted({*first, *second})


def _validated(loader: DataLoader[Any], limit: int | None) -> set[int] | None:
    """The dataset indices in the first ``limit`` batches of a loader; ``None`` if they differ from pass to pass."""
    first, second = ({index for batch in batches[:limit] for index in batch} for batches in _passes(loader))
    return first if first == second else None


def _indexed(loader: Any) -> bool:
    indexed = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    return indexed and loader.batch_sampler is not None


def _passes(loader: DataLoader[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The batches of dataset indices in two passes, which differ if the loader shuffles. No random state changes."""
    assert loader.batch_sampler is not None
    with _same_randomness(loader):
        first, second = ([[int(index) for index in batch] for batch in loader.batch_sampler] for _ in range(2))
    return first, second


@contextmanager
def _same_randomness(loader: DataLoader[Any]) -> Iterator[None]:
    """Samplers draw from the global random state, or from a generator of their own."""
    own = {id(g): g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None}
    states = [(generator, generator.get_state()) for generator in own.values()]
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            for generator, state in states:
                generator.set_state(state)


def _subset(loader: DataLoader[Any], indices: list[int], batch_size: int) -> DataLoader[Any]:
    """A fresh loader over part of a loader's dataset, in the given order."""
    return _fresh(loader, Subset(loader.dataset, indices), batch_size=batch_size)


def _fresh(loader: DataLoader[Any], dataset: Any, **batches: Any) -> DataLoader[Any]:
    return DataLoader(
        dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **batches,
    )


def _reservoir(loader: Iterable[Any], samples: int, limit: int | None, generator: torch.Generator) -> Iterator[Any]:
    """A uniform random sample of a stream's batches, about ``samples`` samples of them."""
    if isinstance(loader, DataLoader):  # a loader with persistent workers has one iterator, in use for validation
        sampler = None if isinstance(loader.dataset, IterableDataset) else loader.sampler
        how = {"batch_size": loader.batch_size, "sampler": sampler, "drop_last": loader.drop_last}
        loader = _fresh(loader, loader.dataset, **how)
    kept: list[Any] = []
    size = 0
    for number, batch in enumerate(loader):
        if limit is not None and number >= limit:
            break
        size = size or max(math.ceil(samples / max(extract_batch_size(batch), 1)), 1)
        if len(kept) < size:
            kept.append(batch)
        elif (place := int(torch.randint(number + 1, (), generator=generator))) < size:
            kept[place] = batch
    yield from kept


def _limit(limit_batches: int | float | None, loader: Any) -> int | None:
    """A trainer's limit as a number of batches; ``None``: all."""
    if limit_batches is None or (limit_batches == 1.0 and isinstance(limit_batches, float)):
        return None
    if isinstance(limit_batches, int):
        return limit_batches
    return max(int(limit_batches * len(loader)), 1)
