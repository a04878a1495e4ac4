"""Perturbed copies of calibration batches: more inputs for the experts than there are samples.

A layer learns what the experts make of their inputs, not labels, so an input need not be a real one. With few
samples, the fit sees too few of the directions that inputs take. A copy of a batch shows it others: each sample takes a
part of another sample of the same batch, and gets noise. The parts are those of CutMix (Yun et al., arXiv 1905.04899,
section 3.1), without its labels. That a teacher may be asked about such inputs is an observation of Beyer et al.,
"Knowledge distillation: A good teacher is patient and consistent", arXiv 2106.05237. All this goes beyond Chain of
Merges. ``docs/method.md`` has the figures: copies help with few samples, and hurt with many.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

NOISE = 0.6
"""Standard deviation of the noise, relative to that of the numbers that it is added to."""
SMALLEST, LARGEST = 1 / 3, 2 / 3
"""How much of each dimension the part from another sample takes."""


def with_copies(
    batches: Sequence[Any], numbers: Sequence[int], total: int, copies: int, task: str
) -> tuple[list[Any], list[int]]:
    """Return batches followed by perturbed copies of each, and the numbers of all of them.

    Copy c of batch n gets the number ``c * total + n``, so that all processes agree on the numbers. The copy depends on
    this number and on the task's name only.

    Args:
        batches: those of one process.
        numbers: their numbers among the batches of all processes.
        total: number of batches of all processes.
        copies: number of copies of each batch.
        task: its name.
    """
    batches, numbers = list(batches), list(numbers)
    originals = list(zip(numbers, batches))
    for copy in range(1, copies + 1):
        for number, batch in originals:
            numbers.append(copy * total + number)
            batches.append(perturbed(batch, zlib.crc32(f"{task} {numbers[-1]}".encode())))
    return batches, numbers


def perturbed(batch: Any, seed: int) -> Any:
    """Return a copy of a batch in which each sample has a part of another sample of the batch.

    A tensor may hold a row ``(n, length, ...)`` or an image ``(n, ..., height, width)`` for each sample. All tensors
    take the same part from the same other sample, so that tokens and their mask still belong together. Floating-point
    tensors get noise as well, unless they hold only 0 and 1. Tensors with one number for each sample stay as they are.

    Args:
        batch: tensors in lists, tuples, dictionaries and dataclasses.
        seed: of the random choices.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = Counter[int]()
    apply_to_collection(batch, Tensor, lambda tensor: lengths.update([len(tensor)] if tensor.dim() > 1 else []))
    if not lengths:
        return batch
    samples = lengths.most_common(1)[0][0]
    order = torch.randperm(samples, generator=generator)
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # never a sample itself, if there are two
    share = SMALLEST + (LARGEST - SMALLEST) * torch.rand(samples, 2, generator=generator, dtype=torch.float32)
    start = (1 - share) * torch.rand(samples, 2, generator=generator, dtype=torch.float32)

    def changed(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or len(tensor) != samples:
            return tensor
        axes = (1,) if tensor.dim() < 4 else (tensor.dim() - 2, tensor.dim() - 1)
        taken = torch.ones((), dtype=torch.bool)
        for number, axis in enumerate(axes):
            place = (torch.arange(tensor.shape[axis], dtype=torch.float32) + 0.5) / tensor.shape[axis]
            first = start[:, number, None]
            inside = (place >= first) & (place < first + share[:, number, None])
            shape = [1] * tensor.dim()
            shape[0], shape[axis] = inside.shape
            taken = taken & inside.view(shape)
        result = torch.where(taken.to(tensor.device), tensor[partner.to(tensor.device)], tensor)
        if tensor.is_floating_point() and not bool(((tensor == 0) | (tensor == 1)).all()):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
            result = result + NOISE * tensor.float().std().to(tensor.dtype) * noise
        return result

    return apply_to_collection(batch, Tensor, changed)
