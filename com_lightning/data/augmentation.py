"""Perturbed copies of calibration batches: an expert can be asked about more inputs than there are samples.

What a layer is solved for is what the experts make of their inputs, and no label; so an input need not be one that
occurs. With few samples the fit knows too little of the directions that inputs take, and copies in which samples of
the same task are spliced, with noise on top, tell it more. Splices are those of CutMix (Yun et al., arXiv 1905.04899,
section 3.1), without its labels. That experts may be asked about such inputs is the observation of Beyer et al.,
"Knowledge distillation: A good teacher is patient and consistent", arXiv 2106.05237. It goes beyond Chain of Merges.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import Task

NOISE = 0.6
"""Standard deviation of the noise, relative to that of the numbers that it is added to."""
LEAST, MOST = 1 / 3, 2 / 3
"""How much of each dimension a splice takes."""


def with_copies(tasks: Sequence[Task], copies: int, peers: Peers) -> list[Task]:
    """The tasks with so many perturbed copies of each batch after the batches themselves.

    Batches of all processes are numbered on: copy c of batch n is number ``c * (number of batches) + n``, the number of
    batches rounded up to an even one, so that a copy is odd if its batch is.
    """
    result = []
    for task in tasks:
        numbers = list(task.batch_numbers)
        total = max((number + 1 for part in peers.exchange(numbers) for number in part), default=0)
        total += total % 2
        batches = list(task.batches)
        for copy in range(1, copies + 1):
            for number, batch in zip(numbers[: len(task.batches)], task.batches):
                numbers.append(copy * total + number)
                batches.append(perturbed(batch, zlib.crc32(f"{task.name} {numbers[-1]}".encode())))
        result.append(replace(task, batches=batches, numbers=numbers))
    return result


def perturbed(batch: Any, seed: int) -> Any:
    """A copy of a batch in which each sample has a part of another one of the batch.

    In every tensor that holds a row, ``(n, length, ...)``, or an image, ``(n, ..., height, width)``, for each sample,
    the same share of the same place is taken from the same other sample, so that tokens and their mask still go
    together. Floating-point tensors get noise as well, unless they hold nothing but 0 and 1.

    Args:
        batch: tensors in lists, tuples, dictionaries and dataclasses.
        seed: of what is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = Counter(len(tensor) for tensor in _tensors(batch))
    if not lengths:
        return batch
    samples = lengths.most_common(1)[0][0]
    order = torch.randperm(samples, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # of another sample each, if there are any
    share = LEAST + (MOST - LEAST) * torch.rand(samples, 2, generator=generator)
    start = (1 - share) * torch.rand(samples, 2, generator=generator)

    def changed(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or len(tensor) != samples:
            return tensor
        axes = (1,) if tensor.dim() < 4 else (tensor.dim() - 2, tensor.dim() - 1)
        taken = torch.ones((), dtype=torch.bool)
        for number, axis in enumerate(axes):
            place = (torch.arange(tensor.shape[axis]) + 0.5) / tensor.shape[axis]
            first = start[:, number, None]
            inside = (place >= first) & (place < first + share[:, number, None])
            shape = [1] * tensor.dim()
            shape[0], shape[axis] = inside.shape
            taken = taken & inside.view(shape)
        result = torch.where(taken.to(tensor.device), tensor[partner.to(tensor.device)], tensor)
        if tensor.is_floating_point() and not bool(((tensor == 0) | (tensor == 1)).all()):
            noise = torch.randn(tensor.shape, generator=generator).to(tensor)
            result = result + NOISE * tensor.float().std().to(tensor.dtype) * noise
        return result

    return apply_to_collection(batch, Tensor, changed)


def _tensors(batch: Any) -> Iterator[Tensor]:
    found: list[Tensor] = []
    apply_to_collection(batch, Tensor, lambda tensor: found.append(tensor) if tensor.dim() > 1 else None)
    return iter(found)
