"""Where the calibration sample is drawn, without changing the loaders that it comes from.

A loader with a map-style dataset is sampled by dataset index: the indices that it goes through (its population) are
read from its batch sampler, and some of them are drawn. A loader without indices (an iterable dataset, a DataLoader
with an ``__iter__`` of its own, or anything else that can be iterated) is sampled batch by batch as it goes by. In both
cases the data are read through a copy of the loader, because the loader itself may be in use for validation.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, Subset

from com_lightning.core.tensors import private_torch


@dataclass
class CalibrationSample:
    """The calibration data of one task.

    Attributes:
        batches: ``(batch, dataloader_idx)`` on the host, as the task's collate function makes them.
        numbers: the numbers of these batches among those of all processes.
        total: number of batches of all processes.
        samples: number of samples in the batches of all processes.
        overlap: how many of these samples are validated too; ``None`` if that cannot be known.
        warnings: what is odd about them, for the report.
    """

    batches: list[tuple[Any, int]]
    numbers: list[int]
    total: int
    samples: int
    overlap: int | None
    warnings: list[str] = field(default_factory=list)


def parts(given: Any) -> list[Any]:
    """The loaders that a datamodule gives as one loader, or as a collection of any depth."""
    if isinstance(given, CombinedLoader) and getattr(given, "_mode", "sequential") != "sequential":
        return [_Combined(given)]
    combined = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "sequential")
    return [] if given is None else list(combined.flattened)


class _Combined:
    """The batches of a CombinedLoader that reads several loaders at once."""

    def __init__(self, loader: CombinedLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Any]:
        for batch, _, _ in copy.copy(self.loader):
            yield batch


def population(loader: Any) -> list[int] | None:
    """The dataset indices that a loader goes through; ``None`` if it has no indices. No data are read."""
    if not has_indices(loader):
        return [] if sized_len(loader) == 0 else None
    first, second = ([index for batch in batches for index in batch] for batches in two_passes(loader))
    return list(dict.fromkeys(first)) if first == second else sorted({*first, *second})


def leaves_enough(loaders: Sequence[Any], count: int, generator: torch.Generator) -> bool:
    """Decide whether a sample is held out of validation.

    A loader must go through each of its samples once in every pass. Others, such as those that draw with replacement,
    would be validated on something else without the sample than the user means.

    Args:
        loaders: of one task.
        count: number of samples to draw.
        generator: makes the random choice, as for :func:`draw`.

    Returns:
        Whether each loader keeps some of its samples, and all together keep as many as are drawn.
    """
    populations = []
    for loader in loaders:
        if not has_indices(loader):
            return False
        passes = [sorted(index for batch in batches for index in batch) for batches in two_passes(loader)]
        if not passes[0] == passes[1] == sorted(set(passes[0])):
            return False
        populations.append(population(loader) or [])
    drawn = draw(populations, count, generator)
    left = [len(indices) - len(taken or ()) for indices, taken in zip(populations, drawn)]
    return min(left, default=0) > 0 and sum(left) >= count


def draw(populations: Sequence[Sequence[int] | None], count: int, generator: torch.Generator) -> list[list[int] | None]:
    """Draw ``count`` dataset indices at random from the loaders of one task.

    Args:
        populations: of each loader, see :func:`population`.
        count: number of indices to draw from all loaders together.
        generator: makes the random choice.

    Returns:
        The indices drawn from each loader; ``None`` for a loader without indices.
    """
    pairs = [(number, index) for number, indices in enumerate(populations) for index in indices or ()]
    order = torch.randperm(len(pairs), generator=generator)[:count].tolist()
    drawn: list[list[int] | None] = [None if indices is None else [] for indices in populations]
    for number, index in (pairs[position] for position in order):
        drawn[number].append(index)
    return drawn


def reservoir(loader: Iterable[Any], count: int, limit: int | None, generator: torch.Generator) -> list[Any]:
    """Draw batches uniformly from a stream, so many that they hold about ``count`` samples.

    Args:
        loader: the stream; it is read to its end, or to the limit.
        count: number of samples to draw.
        limit: number of batches to read at most; ``None``: all.
        generator: makes the random choice.

    Returns:
        The drawn batches.
    """
    drawn: list[Any] = []
    size = 0
    with _generators_kept(loader):
        # With persistent workers a loader has one iterator, which validation uses.
        for number, batch in enumerate(fresh(loader) if isinstance(loader, DataLoader) else loader):
            if limit is not None and number >= limit:
                break
            size = size or batches_for(count, batch)
            if len(drawn) < size:
                drawn.append(batch)
            elif (place := int(torch.randint(number + 1, (), generator=generator))) < size:
                drawn[place] = batch
    return drawn


def batches_for(count: int, batch: Any) -> int:
    """Number of batches like this one that hold about ``count`` samples, at least one."""
    return max(math.ceil(count / max(extract_batch_size(batch), 1)), 1)


def validated_indices(loader: DataLoader[Any], limit: int | None) -> set[int] | None:
    """The dataset indices in the first ``limit`` batches of a loader; ``None`` if they differ from pass to pass."""
    first, second = ({index for batch in batches[:limit] for index in batch} for batches in two_passes(loader))
    return first if first == second else None


def has_indices(loader: Any) -> bool:
    """Whether a loader draws from a dataset by index, and its batches are those of its batch sampler."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset) or has_own_iter(loader):
        return False
    return loader.batch_sampler is not None


def has_own_iter(loader: Any) -> bool:
    """Whether a subclass of DataLoader decides itself which batches it gives."""
    return isinstance(loader, DataLoader) and type(loader).__iter__ is not DataLoader.__iter__


def identity(loader: Any) -> list[int] | None:
    """What tells the samples of a loader from those of another process: their indices in the dataset below subsets."""
    dataset: Any = getattr(loader, "dataset", None)
    indices = population(loader)
    while indices is not None and isinstance(dataset, Subset):
        dataset, indices = dataset.dataset, [int(dataset.indices[index]) for index in indices]
    return indices


def batch_size_of(loader: Any) -> int:
    """Number of samples in a batch of a loader; the largest one if a batch sampler of the user's makes the batches."""
    if size := getattr(loader, "batch_size", None):
        return int(size)
    return max(map(len, two_passes(loader)[0]), default=1) if has_indices(loader) else 1


def batch_limit(limit_batches: int | float | None, loader: Any) -> int | None:
    """A trainer's ``limit_val_batches`` as a number of batches; ``None``: all."""
    if limit_batches is None or (limit_batches == 1.0 and isinstance(limit_batches, float)):
        return None
    if isinstance(limit_batches, int):
        return limit_batches
    return max(int(limit_batches * len(loader)), 1)


def two_passes(loader: DataLoader[Any]) -> tuple[list[list[int]], list[list[int]]]:
    """The batches of dataset indices in two passes, which differ if the loader shuffles. No random state changes."""
    assert loader.batch_sampler is not None
    with _same_randomness(loader):
        first, second = ([[int(index) for index in batch] for batch in loader.batch_sampler] for _ in range(2))
    return first, second


@contextmanager
def _same_randomness(loader: DataLoader[Any]) -> Iterator[None]:
    """Samplers draw from the global random state, or from a generator of the loader or the sampler."""
    with isolate_rng(include_cuda=False), _generators_kept(loader):
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def _generators_kept(loader: Any) -> Iterator[None]:
    """What is read in this context leaves the generators of a loader and its sampler as they were."""
    owners = (loader, getattr(loader, "sampler", None))
    generators = {id(g): g for g in (getattr(o, "generator", None) for o in owners) if isinstance(g, torch.Generator)}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def restricted(loader: DataLoader[Any], indices: Collection[int]) -> DataLoader[Any]:
    """Return a fresh loader over some of the samples, in the order of the loader.

    Args:
        loader: it has indices, see :func:`has_indices`.
        indices: dataset indices of the samples that remain.
    """
    if type(loader.batch_sampler) is BatchSampler:
        return subset(loader, [index for index in population(loader) or () if index in indices], loader.batch_size or 1)
    # A batch sampler of the user's: its batches become smaller, and stay apart.
    groups = [[index for index in batch if index in indices] for batch in two_passes(loader)[0]]
    return fresh(loader, batch_sampler=[group for group in groups if group])


def subset(loader: DataLoader[Any], indices: list[int], batch_size: int) -> DataLoader[Any]:
    """A fresh loader over the given dataset indices, in the given order."""
    batches = BatchSampler(indices, batch_size, drop_last=False)
    return fresh(loader, sampler=indices, batch_sampler=batches, batch_size=batch_size, drop_last=False)


def fresh(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """Return a loader of the same class and with the same attributes, which may be iterated while the other one is.

    A copy has all that a subclass keeps in its attributes, and that its constructor may not take. Only the generator is
    left out: it orders samples whose order is given here, and the state of the user's is not to change.

    Args:
        loader: the loader.
        changes: attributes with other values, such as ``batch_sampler``.
    """
    return private_torch.loader_copy(loader, generator=None, **changes)


def shared_out(loader: Any) -> DistributedSampler[Any] | None:
    """The DistributedSampler by which a loader goes through the share of one process only."""
    samplers = (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None))
    return next((sampler for sampler in samplers if isinstance(sampler, DistributedSampler)), None)


def undistributed(loader: Any, processes: int) -> Any:
    """Return a loader over the samples of all processes, in place of one over the share of this process.

    A merge deals out its sample itself, and validates each task in one process. Samples that a DistributedSampler
    repeats to make all shares equally long are there once.

    Args:
        loader: any loader. It is returned as it is unless it has a DistributedSampler for this number of processes.
        processes: number of processes.
    """
    sampler = shared_out(loader)
    plain = has_indices(loader) and type(loader.batch_sampler) is BatchSampler
    if processes == 1 or sampler is None or not plain or sampler.num_replicas != processes:
        return loader
    shares = []
    for rank in range(processes):
        one = copy.copy(sampler)
        one.rank = rank
        shares.append([int(index) for index in one])
    indices = dict.fromkeys(index for index in chain(*zip_longest(*shares)) if index is not None)
    return subset(loader, list(indices), loader.batch_size or 1)
