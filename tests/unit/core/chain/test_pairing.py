"""Rows that change places are noticed, and rows that are alike for other reasons are not taken for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from com_lightning.core.chain.pairing import are_permuted


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shuffled(rows: Tensor, groups: int) -> Tensor:
    """Rows in another order within each of several groups."""
    parts = rows.chunk(groups)
    return torch.cat([p[torch.randperm(len(p), generator=torch.Generator().manual_seed(1))] for p in parts])


@pytest.mark.parametrize(("count", "groups"), [(8, 1), (40, 4), (900, 1), (4000, 16)])
@pytest.mark.parametrize("drift", [0.0, 0.1])
def test_permuted_rows(count: int, groups: int, drift: float) -> None:
    rows = noise(count, 64).relu()
    assert are_permuted(rows + drift * noise(count, 64, seed=2), shuffled(rows, groups))
    assert are_permuted(rows.bfloat16(), shuffled(rows, groups).bfloat16())


REPEATED = noise(10, 64).repeat(20, 1)
PADDED = torch.cat([noise(30, 64), torch.zeros(70, 64)])
ONE = noise(1, 64).expand(200, 64)


@pytest.mark.parametrize("drift", [0.0, 0.3, 1.0, 3.0])
@pytest.mark.parametrize(
    "rows",
    [noise(200, 64), noise(2000, 8), noise(200, 4), noise(200, 32).relu(), REPEATED, PADDED, ONE, noise(3, 64)],
    ids=["noise", "narrow", "very narrow", "after relu", "repeated tokens", "padding", "one row", "few rows"],
)
def test_other_rows_are_not(rows: Tensor, drift: float) -> None:
    theirs = rows + drift * noise(*rows.shape, seed=5)
    assert not are_permuted(rows, theirs)
    assert not are_permuted(theirs, rows)
    assert not are_permuted(theirs.mean(0).expand_as(theirs), rows)  # a model that has lost what distinguishes rows


def test_a_pair_of_rows_that_change_places_is_no_reason() -> None:
    rows = noise(64, 64)
    theirs = rows.clone()
    theirs[[0, 2]] = rows[[2, 0]]
    assert not are_permuted(rows, theirs)
