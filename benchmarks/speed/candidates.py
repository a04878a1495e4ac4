"""What might make a merge faster: the computation as it is, and in another way, timed in turn in one process.

The sizes are those of one batch of the vision tower of CLIP ViT-B/32 at the layers after its attention ("narrow", 768
inputs and outputs) and at the end of its MLP ("wide", 3,072 inputs, 768 outputs), and of one solve. A ratio above 1
says that the other way is faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed.timing import in_turn, ratios, spread
from benchmarks.speed.tower import Tower
from com_lightning.core.tensors.matmul import add_product, aligned_length, outputs

LOOPS = 4
"""How often a computation is done in one measurement."""
Measured = dict[str, dict[str, list[float]]]
"""Candidate -> "as it is" or "other" -> seconds of each repeat."""


@dataclass(frozen=True)
class Rows:
    """Inputs of one batch, as statistics are gathered from them.

    Attributes:
        scaled: ``[x̂, 1]``, ``(n, 1, k)``, with rows that begin at multiples of 64 bytes.
        drift: ``x - x̂``, ``(n, 1, f)``.
        weight: of the expert, ``(1, o, f)``.
    """

    scaled: Tensor
    drift: Tensor
    weight: Tensor

    @classmethod
    def random(cls, count: int, features: int, out: int) -> Rows:
        scaled = torch.randn(count, 1, aligned_length(features + 1))[..., : features + 1]
        return cls(scaled, torch.randn(count, 1, features), torch.randn(1, out, features))


def two_products(rows: Rows) -> None:
    add_product(None, rows.scaled, rows.scaled, symmetric=True)
    add_product(None, rows.drift, rows.scaled)


def one_product(rows: Rows) -> None:
    add_product(None, torch.cat([rows.scaled, rows.drift], 2), rows.scaled)


def multiplied_in_each_batch(rows: Rows) -> None:
    add_product(None, outputs(rows.drift, rows.weight), rows.scaled)


def multiplied_once(rows: Rows) -> None:
    """The product with the weight is that of all batches, so it is not counted here."""
    add_product(None, rows.drift, rows.scaled)


def with_lengths(rows: Rows) -> None:
    two_products(rows)
    for values in (rows.scaled, rows.drift, rows.drift):  # of x̂, x and the drift
        torch.linalg.vector_norm(values, dim=(1, 2))


def solved(dtype: torch.dtype, size: int, out: int) -> Callable[[], None]:
    gram = torch.eye(size, dtype=dtype) + 0.5 / size
    right = torch.ones(size, out, dtype=dtype)

    def solve() -> None:
        torch.cholesky_solve(right, torch.linalg.cholesky(gram))

    return solve


def run(tower: Tower, repeats: int) -> Measured:
    """Time each candidate beside the computation that it might replace."""
    count, width = tower.batch_size * ((tower.image // tower.patch) ** 2 + 1), tower.width
    inputs = {"narrow": Rows.random(count, width, width), "wide": Rows.random(count, 4 * width, width)}
    pairs: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {}
    for name, rows in inputs.items():
        as_it_is = partial(two_products, rows)
        pairs |= {
            f"Gram matrix and drift by one product, {name}": (as_it_is, partial(one_product, rows)),
            f"drift multiplied by the weight once, {name}": (
                partial(multiplied_in_each_batch, rows),
                partial(multiplied_once, rows),
            ),
            f"no pass over rows for their lengths, {name}": (partial(with_lengths, rows), as_it_is),
        }
    for name, size in (("narrow", width + 1), ("wide", 4 * width + 1)):
        pairs[f"solved in float32, {name}"] = solved(torch.float64, size, width), solved(torch.float32, size, width)
    return {name: in_turn({"as it is": timed(a), "other": timed(b)}, repeats, name) for name, (a, b) in pairs.items()}


def timed(work: Callable[[], None]) -> Callable[[], float]:
    """A function that does some work and returns its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        for _ in range(LOOPS):
            work()
        return (time.perf_counter() - start) / LOOPS

    return seconds


def rows(measured: Measured) -> list[list[str]]:
    """The rows of a table."""
    lines = [["candidate", "as it is, ms", "other way, ms", "times as fast"]]
    for name, values in measured.items():
        times = [spread([1e3 * each for each in values[which]]) for which in ("as it is", "other")]
        lines.append([name, *times, spread(ratios(values["as it is"], values["other"]))])
    return lines
