"""Ranking the magnitudes of many tensors together, without holding them in memory together."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

_HALF = 16


def kth_largest(tensors: Callable[[], Iterable[Tensor]], k: int) -> float:
    """Return the ``k``-th largest magnitude among all elements, in float32, exactly.

    The bits of non-negative floats rank like the floats themselves. So two histograms find the value: one of the upper
    halves of all bits, and one of the lower halves of those values that have the right upper half. This takes two
    passes, and 2¹⁶ counters.

    Args:
        tensors: returns the tensors; called twice.
        k: 1 for the largest.

    Returns:
        The magnitude.

    Example::

        >>> kth_largest(lambda: [torch.tensor([1.0, -5.0]), torch.tensor([3.0])], 2)
        3.0
    """
    upper, k = _bucket(_histogram(_bits(tensor) >> _HALF for tensor in tensors()), k)
    rest = (_bits(tensor) for tensor in tensors())
    lower, _ = _bucket(_histogram(bits[bits >> _HALF == upper] & (1 << _HALF) - 1 for bits in rest), k)
    return torch.tensor(upper << _HALF | lower, dtype=torch.int32).view(torch.float32).item()


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().to(torch.float32).abs().view(torch.int32)


def _histogram(parts: Iterable[Tensor]) -> Tensor:
    total = torch.zeros(1 << _HALF, dtype=torch.int64)
    for part in parts:
        total += torch.bincount(part, minlength=1 << _HALF).cpu()
    return total


def _bucket(counts: Tensor, k: int) -> tuple[int, int]:
    """The bucket that holds the ``k``-th largest value, and the place of the value within it."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, k))
    bucket = len(counts) - 1 - place
    return bucket, k - int(above[place] - counts[bucket])
