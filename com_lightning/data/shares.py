"""How the processes of a merge share the calibration data, and what is odd about loaders.

A merge deals out the batches that it has drawn. That is right if each process could read all of them. A loader may have
been shared out before, by the user's own sampler or stream, or be split at random in each process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.data import extract_batch_size

from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.tensors.digest import digest
from com_lightning.data import sampling
from com_lightning.data.sampling import CalibrationSample
from com_lightning.errors import MergeError


def deal_out(
    label: str,
    sample: CalibrationSample,
    whole: Sequence[Any],
    index: int,
    peers: Peers,
    count: int,
    generator: torch.Generator,
) -> None:
    """Add this process's share of the batches of a stream to a sample.

    Args:
        label: what messages call the stream.
        sample: to add to.
        whole: the batches that this process has drawn from its stream.
        index: number of the loader.
        peers: the processes. If their streams differ, each keeps a part of what it has drawn.
        count: number of samples that all processes are to draw together.
        generator: chooses that part.
    """
    if peers.size == 1 or len(set(peers.exchange(digest(list(whole))))) == 1:
        share = range((peers.rank - sample.total) % peers.size, len(whole), peers.size)
        sample.numbers += [sample.total + number for number in share]
        sample.total += len(whole)
        sample.samples += sum(extract_batch_size(batch) for batch in whole)
        sample.batches += [(whole[number], index) for number in share]
        return
    wanted = -(-sampling.batches_for(count, whole[0]) // peers.size) if whole else 0
    mine = [whole[n] for n in sorted(torch.randperm(len(whole), generator=generator)[:wanted].tolist())]
    counts = peers.exchange((len(mine), sum(extract_batch_size(batch) for batch in mine)))
    first = sample.total + sum(batches for batches, _ in counts[: peers.rank])
    sample.numbers += range(first, first + len(mine))
    sample.total += sum(batches for batches, _ in counts)
    sample.samples += sum(samples for _, samples in counts)
    sample.batches += [(batch, index) for batch in mine]
    sample.warnings.append(
        f"{label} gives each of the {peers.size} processes other data: each calibrates on its own, and the one that "
        "validates the task does so on its own"
    )


def require_same_samples(label: str, loaders: Sequence[Any], peers: Peers) -> None:
    """Check that the loaders of all processes go through the same samples of a dataset.

    Args:
        label: what messages call the loaders.
        loaders: of this process. Streams are not read.
        peers: the processes.

    Raises:
        MergeError: in all processes, if they do not.
    """
    if peers.size == 1:
        return
    everyones = peers.exchange([digest(sampling.identity(loader)) for loader in loaders])
    if any(theirs != everyones[0] for theirs in everyones):
        raise MergeError(
            [
                f"{label} goes through other samples in each process. If it shares them out, use a DistributedSampler "
                "or a plain loader (a merge shares the data out itself); if it splits them at random, give "
                "random_split a seeded generator"
            ]
        )


def warn_of_different_content(label: str, loader: Any, drawn: Sequence[int], peers: Peers) -> list[str]:
    """Read the first sample that was drawn in all processes, and return a warning if it differs."""
    if peers.size == 1 or not drawn:
        return []
    content = digest(list(sampling.subset(loader, list(drawn[:1]), 1)))
    if len(set(peers.exchange(content))) == 1:
        return []
    return [
        f"{label} gives sample {drawn[0]} another content in each process: unless it augments by a random generator of "
        "its own, the data are split or shuffled at random in each process; seed that"
    ]


def is_iterator(loader: Any) -> bool:
    """Whether it can be iterated once only, as far as can be known. (A CombinedLoader can be iterated again.)"""
    return isinstance(loader, Iterator) and not isinstance(loader, CombinedLoader)


def loader_problems(
    task: str, split: str, loaders: Sequence[Any], again: Sequence[Any], holdout: int | None
) -> list[str]:
    """Find out why a task's loaders of one split cannot be used.

    Args:
        task: what messages call the task.
        split: ``"val"`` or ``"train"``.
        loaders: the loaders.
        again: what the task gives when it is asked again.
        holdout: number of samples to hold out; ``None`` if there are none.

    Returns:
        The problem, if there is one.
    """
    if spent := [loader for loader, other in zip(loaders, again) if is_iterator(loader) and loader is other]:
        return [
            f"{task}: its {split} loader is one {type(spent[0]).__name__}, which can be read only once, while a merge "
            f"reads it several times; give a DataLoader, or let {split}_dataloader() make a new iterator at each call"
        ]
    sizes = [None if indices is None else len(indices) for indices in map(sampling.population, loaders)]
    total = sum(size or 0 for size in sizes)
    if all(size == 0 for size in sizes):
        return [f"{task}: its {split} loader is empty"]
    if holdout is not None and None in sizes:
        own = next((type(loader).__name__ for loader in loaders if sampling.has_own_iter(loader)), None)
        what = f"a {own}, which has an __iter__ of its own," if own else "an iterable dataset"
        return [f"{task}: samples of {what} cannot be held out; use split: train"]
    if holdout is not None and total <= holdout:
        return [f"{task}: all {total} samples would be held out for calibration; lower data.num_samples"]
    return []


def loader_warnings(label: str, loader: Any, is_sampled: bool, batch_size: int | None, processes: int) -> list[str]:
    """Find out what is odd about a loader.

    Args:
        label: what messages call it.
        loader: the loader.
        is_sampled: whether calibration data are drawn from it.
        batch_size: the size of calibration batches that was asked for.
        processes: number of processes of the merge.

    Returns:
        One sentence for each.
    """
    found = []
    sampler = sampling.shared_out(loader)
    if sampler is not None and sampler.num_replicas > processes:
        found.append(
            f"{label} has a DistributedSampler, and gives the share of process {sampler.rank} of "
            f"{sampler.num_replicas} in a merge by {processes}: the others are neither calibrated on nor validated"
        )
    if is_sampled and sampling.has_own_iter(loader):
        found.append(
            f"{label} is a {type(loader).__name__}, which has an __iter__ of its own: whole batches are drawn from it, "
            "and how many of them are validated is not known"
        )
    if is_sampled and batch_size and not sampling.has_indices(loader):
        found.append(f"{label} is a stream, whose batches stay as they are; data.batch_size does not apply to it")
    return found
