"""Similarity of rows, against all cosines written out, and the importance that follows from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from com_lightning.core.solve.similarity import by_similarity
from com_lightning.core.solve.statistics import InputSums


def rows(n: int, groups: int = 1, features: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return 0.5 + torch.randn(n, groups, features, generator=generator, dtype=torch.float64)


def sums_of(*batches: Tensor, bias: bool = True, normalize: bool = False) -> InputSums:
    sums = InputSums(bias, normalize, measures_similarity=True)
    for batch in batches:
        sums.update(batch)
    return sums


def measured(sums: InputSums, groups: int = 1, features: int = 5) -> float | None:
    return sums.to_means(torch.zeros(groups, 2, features + sums.bias)).similarity


def written_out(data: Tensor) -> float:
    """The root mean square of all cosines between different rows that are not zero."""
    squares: list[float] = []
    for group in data.unbind(1):
        unit = [row / row.norm() for row in group if row.norm() > 0]
        squares += [float(one @ other) ** 2 for i, one in enumerate(unit) for j, other in enumerate(unit) if i != j]
    return math.sqrt(sum(squares) / len(squares))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_similarity_is_that_of_all_cosines(groups: int, normalize: bool) -> None:
    """A bias has no part in it, nor has the size of rows; rows of zeros have no direction."""
    data = rows(9, groups)
    data[4], data[7, 0] = 0.0, 0.0
    expected = written_out(data)
    assert measured(sums_of(data, normalize=normalize), groups) == pytest.approx(expected)
    assert measured(sums_of(data, bias=False, normalize=normalize), groups) == pytest.approx(expected)
    scaled = data * torch.arange(1, 10)[:, None, None]
    assert measured(sums_of(scaled, normalize=normalize), groups) == pytest.approx(expected)


def test_batches_come_in_any_order_and_size() -> None:
    one, other = rows(7), rows(4)
    expected = written_out(torch.cat([one, other]))
    joined = sums_of(other)
    joined.join(sums_of(*torch.split(one, 2)))
    joined.join(sums_of())
    assert measured(joined) == pytest.approx(expected)
    assert measured(sums_of(torch.cat([other, one]).float())) == pytest.approx(expected, rel=1e-5)


def test_the_two_extremes() -> None:
    assert measured(
        sums_of(rows(1).expand(6, 1, 5) * torch.tensor([1.0, -2, 3, 1, 1, 1])[:, None, None])
    ) == pytest.approx(1.0)
    assert measured(sums_of(torch.eye(5)[:, None])) == 0.0


def test_without_two_rows_or_two_inputs_nothing_is_compared() -> None:
    assert measured(sums_of(rows(1))) is None
    assert measured(sums_of(torch.zeros(5, 1, 5))) is None
    assert measured(sums_of(rows(5, groups=4, features=1)), 4, 1) is None


def test_nothing_is_summed_unless_asked_for() -> None:
    sums = InputSums(bias=True, normalize=True)
    sums.update(rows(5))
    assert sums.unit_gram is None


def test_importance_is_in_proportion_to_similarity() -> None:
    assert by_similarity([0.5, 0.25, 0.25], [0.2, 0.4, 0.4]) == pytest.approx([1 / 3] * 3)
    assert by_similarity([1.0, 0.0], [0.1, 0.9]) == [1.0, 0.0]
    assert by_similarity([0.5, 0.25, 0.25], [0.3, None, 0.1]) == pytest.approx(
        [0.15 / 0.225, 0.05 / 0.225, 0.025 / 0.225]
    )
    for unknown in ([None, None], [0.0, 0.0], [0.0, None]):
        assert by_similarity([0.7, 0.3], unknown) == [0.7, 0.3]
