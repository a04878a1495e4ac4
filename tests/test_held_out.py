"""A ridge that is chosen at each layer, on rows that it was not solved with."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import HELD_OUT, Ridge, Rule
from com_lightning.core.solve.held_out import CANDIDATES, FALLBACK, choose_ridge
from com_lightning.core.solve.ridge import factorize, solve
from com_lightning.core.solve.statistics import InputStatistics
from com_lightning.core.sweep.task import LayerRecord, Task
from tests.helpers import built, make_data, make_experts, quiet_trainer, relative


def _statistics(rows: Tensor, expert: Tensor | None = None) -> InputStatistics:
    statistics = InputStatistics(bias=False, normalize=False)
    statistics.update(rows[:, None], None if expert is None else expert[:, None])
    return statistics


def _loss(ridge: float, train: list[Tensor], test: list[Tensor], weights: list[Tensor]) -> float:
    """With rows of ``[x̂, x]``, computed from rows."""
    grams, drifts = list[Tensor](), list[Tensor]()
    for rows, weight in zip(train, weights):
        seen, exact = rows.chunk(2, 1)
        grams.append((seen.T @ seen / len(seen))[None])
        drifts.append(weight @ ((exact - seen).T @ seen / len(seen)))
    solution = solve(factorize(grams, [0.5, 0.5], ridge), grams, drifts, weights, [0.5, 0.5])[0]
    total = 0.0
    for rows, weight in zip(test, weights):
        seen, exact = rows.double().chunk(2, 1)
        total += float((seen @ solution.T - exact @ weight[0].double().T).square().sum(1).mean())
    return total


@pytest.mark.parametrize("count", [8, 20, 400])
@pytest.mark.parametrize("noise", [0.1, 2.0])
def test_the_choice_is_that_of_cross_validation_over_rows(count: int, noise: float) -> None:
    torch.manual_seed(count)
    weights = [torch.randn(1, 5, 12) for _ in range(2)]
    halves = []
    for _ in range(2):
        exact = [torch.randn(count, 12) for _ in weights]
        halves.append([torch.cat([x + noise * torch.randn_like(x), x], 1) for x in exact])
    first, second = halves
    losses = [_loss(r, first, second, weights) + _loss(r, second, first, weights) for r in CANDIDATES]
    even, odd = ([_statistics(*rows.chunk(2, 1)) for rows in half] for half in halves)
    before = copy.deepcopy([entry.gram for entry in (*even, *odd)])
    assert choose_ridge(even, odd, weights, [0.5, 0.5]) == CANDIDATES[losses.index(min(losses))]
    for entry, same in zip((*even, *odd), before):
        assert entry.gram is not None
        assert same is not None
        assert torch.equal(entry.gram, same)


def test_few_and_noisy_rows_ask_for_more() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(1, 5, 30) for _ in range(2)]
    chosen = []
    for count in (6, 2000):
        even, odd = ([_statistics(x + torch.randn_like(x), x) for x in torch.randn(2, count, 30)] for _ in range(2))
        chosen.append(choose_ridge(even, odd, weights, [0.5, 0.5]))
    assert chosen[0] is not None
    assert chosen[1] is not None
    assert chosen[0] > chosen[1]


def test_without_rows_there_is_no_choice() -> None:
    some = _statistics(torch.randn(4, 3))
    assert (
        choose_ridge([some, some], [some, InputStatistics(False, False)], [torch.ones(1, 2, 3)] * 2, [0.5] * 2) is None
    )


def _merged(
    ridge: Ridge, batches: list[list[Tensor]], residual: bool = False
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3))

    torch.manual_seed(0)
    experts = built(network)
    states = [dict(expert.named_parameters()) for expert in experts]
    merged: dict[str, Tensor] = {n: nn.Parameter((states[0][n] + states[1][n]) / 2, False) for n in states[0]}
    tasks = [Task(f"task{n}", expert, own) for n, (expert, own) in enumerate(zip(experts, batches))]
    return merged, merge_layers(tasks, merged, [0.5, 0.5], Rule(ridge=ridge, residual=residual))


@pytest.mark.parametrize("residual", [False, True])
def test_the_layer_is_solved_with_all_rows(residual: bool) -> None:
    """As with the number that was chosen, had it been given."""
    torch.manual_seed(1)
    batches = [[torch.randn(9, 6) for _ in range(3)] for _ in range(2)]
    merged, records = _merged(HELD_OUT, batches, residual=residual)
    assert {record.ridge for record in records} <= set(CANDIDATES)
    first = records[0].ridge
    assert first is not None
    alike, others = _merged(first, batches, residual=residual)
    assert relative(merged["0.weight"], alike["0.weight"]) < 1e-5
    assert records[0].rows == others[0].rows == {"task0": 27, "task1": 27}


def test_a_task_with_one_batch_falls_back() -> None:
    _, records = _merged(HELD_OUT, [[torch.randn(9, 6)], [torch.randn(9, 6), torch.randn(9, 6)]])
    assert [record.ridge for record in records] == [FALLBACK] * 3


def test_one_batch_is_told_before_anything_is_done(tmp_path: Path) -> None:
    experts = dict(zip("ab", make_experts()))
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, samples=16, batch_size=16)
    merge = ChainOfMergesCallback(experts, ChainOfMerges(ridge="held_out"), ["head"], output_dir=str(tmp_path / "out"))
    with pytest.raises(MergeError, match="two or more calibration batches of each task, and there is one of a, b"):
        quiet_trainer(callbacks=[merge]).validate(experts["a"], datamodule=data)


def test_a_ridge_is_a_number_or_held_out() -> None:
    (told,) = ChainOfMerges(ridge="best").problems(["a", "b"])  # type: ignore[arg-type]
    assert told == "ridge: must be 0 or more, and finite, or 'held_out', got 'best'"
