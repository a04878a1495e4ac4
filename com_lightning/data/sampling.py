"""Where the calibration sample is drawn, without changing the loaders that it comes from.

A loader with a map-style dataset is sampled by dataset index: the indices that it goes through (its population) are
read from its batch sampler, and some of them are drawn. A loader without indices (an iterable dataset, or anything else
that can be iterated) is sampled batch by batch as it goes by. In both cases the data are read through a fresh loader,
because the loader itself may be in use for validation.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset


@dataclass
class CalibrationSample:
    """The calibration data of one task.

    Attributes:
        batches: ``(batch, dataloader_idx)`` on the host, as the task's collate function makes them.
        numbers: the numbers of these batches among those of all processes.
        total: number of batches of all processes.
        samples: number of samples in the batches of all processes.
        overlap: how many of these samples are validated too; ``None`` if that cannot be known.
    """

    batches: list[tuple[Any, int]]
    numbers: list[int]
    total: int
    samples: int
    overlap: int | None


def population(loader: Any) -> list[int] | None:
    """The dataset indices that a loader goes through; ``None`` if it has no indices. No data are read."""
    if not has_indices(loader):
        return [] if sized_len(loader) == 0 else None
    first, second = ([index for batch in batches for index in batch] for batches in two_passes(loader))
    return list(dict.fromkeys(first)) if first == second else sorted({*first, *second})


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
    if isinstance(loader, DataLoader):  # with persistent workers it has one iterator, which validation uses
        sampler = None if isinstance(loader.dataset, IterableDataset) else loader.sampler
        options = {"batch_size": loader.batch_size, "sampler": sampler, "drop_last": loader.drop_last}
        loader = fresh(loader, loader.dataset, **options)
    drawn: list[Any] = []
    size = 0
    for number, batch in enumerate(loader):
        if limit is not None and number >= limit:
            break
        size = size or max(math.ceil(count / max(extract_batch_size(batch), 1)), 1)
        if len(drawn) < size:
            drawn.append(batch)
        elif (place := int(torch.randint(number + 1, (), generator=generator))) < size:
            drawn[place] = batch
    return drawn


def validated_indices(loader: DataLoader[Any], limit: int | None) -> set[int] | None:
    """The dataset indices in the first ``limit`` batches of a loader; ``None`` if they differ from pass to pass."""
    first, second = ({index for batch in batches[:limit] for index in batch} for batches in two_passes(loader))
    return first if first == second else None


def has_indices(loader: Any) -> bool:
    """Whether a loader draws from a dataset by index."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return False
    return loader.batch_sampler is not None


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
    generators = {id(g): g for g in (loader.generator, getattr(loader.sampler, "generator", None)) if g is not None}
    states = [(generator, generator.get_state()) for generator in generators.values()]
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(0)
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
    return fresh(loader, loader.dataset, batch_sampler=[group for group in groups if group])


def subset(loader: DataLoader[Any], indices: list[int], batch_size: int) -> DataLoader[Any]:
    """A fresh loader over the given dataset indices, in the given order."""
    return fresh(loader, Subset(loader.dataset, indices), batch_size=batch_size)


def fresh(loader: DataLoader[Any], dataset: Any, **batches: Any) -> DataLoader[Any]:
    """A new loader that reads a dataset as another loader does; ``batches`` are DataLoader's options on batches."""
    return DataLoader(
        dataset,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        **batches,
    )
