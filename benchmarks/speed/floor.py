"""The floor of a merge: the work that no chain can avoid, each part timed alone in plain PyTorch.

It consists of the forwards of the merged model and, if the rule is two-sided, as many of the experts; of one matrix
product in float32 for the Gram matrix of each distinct input; and of one Cholesky factorisation in float64 for each
distinct input, with a solve for each layer that has this input. The products for the drift of a two-sided rule are not
part of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

import torch

from benchmarks.speed.tower import Tower
from com_lightning.core.tensors.matmul import aligned_length


def inputs(tower: Tower) -> Iterator[tuple[int, int, list[int]]]:
    """The distinct inputs of a tower's layers: numbers in a row, rows in a sample, outputs of each layer."""
    width, patches = tower.width, (tower.image // tower.patch) ** 2
    yield 3 * tower.patch**2, patches, [width]
    for _ in range(tower.blocks):
        yield width + 1, patches + 1, [width] * 3  # query, key and value
        yield width + 1, patches + 1, [width]
        yield width + 1, patches + 1, [4 * width]
        yield 4 * width + 1, patches + 1, [width]


@torch.no_grad()
def forwards(tower: Tower) -> float:
    """Seconds of one forward for each batch, through the experts; the merged model takes as long."""
    _, experts, batches = tower.made()
    start = time.perf_counter()
    for expert, data in zip(experts, batches):
        for batch in data:
            expert(batch)
    return time.perf_counter() - start


def products(tower: Tower) -> float:
    """Seconds of the matrix products for the Gram matrices."""
    seconds = 0.0
    for numbers, rows, _ in inputs(tower):
        length = aligned_length(numbers)  # products of odd sizes take half as long again
        batch = torch.randn(tower.batch_size * rows, length)[:, :numbers]
        gram = torch.zeros(numbers, length)[:, :numbers]
        start = time.perf_counter()
        for _ in range(tower.tasks * tower.samples // tower.batch_size):
            gram.addmm_(batch.T, batch)
        seconds += time.perf_counter() - start
    return seconds


def solves(tower: Tower) -> float:
    """Seconds of factorisations and solves."""
    seconds = 0.0
    for numbers, _, outputs in inputs(tower):
        gram = torch.eye(numbers, dtype=torch.float64) + 0.5 / numbers
        rights = [torch.ones(numbers, columns, dtype=torch.float64) for columns in outputs]
        start = time.perf_counter()
        lower = torch.linalg.cholesky(gram)
        for right in rights:
            torch.cholesky_solve(right, lower)
        seconds += time.perf_counter() - start
    return seconds


PARTS: Mapping[str, Callable[[Tower], float]] = {"forwards": forwards, "Gram products": products, "solves": solves}
