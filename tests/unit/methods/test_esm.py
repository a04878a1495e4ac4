"""What ESM promises. Its numbers are compared with the authors' in test_references.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from com_lightning import ESM, Average, Combined
from com_lightning.core.sweep.task import Task
from com_lightning.methods.esm import merged_vector, rescale
from tests.helpers import relative
from tests.helpers.gradients import averages, close, made, run, state, tasks_of


def problem(count: int = 3, inputs: int = 7, outputs: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Task matrices and Gram matrices."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = [noise(40, inputs) * (1 + noise(inputs).abs()) for _ in range(count)]
    return [noise(outputs, inputs) for _ in range(count)], [x.T @ x / len(x) for x in rows]


@pytest.mark.parametrize("polarize", [False, True])
def test_it_depends_on_shifts_of_outputs_alone(polarize: bool) -> None:
    """Other units of an output, or another order of the tasks, change nothing but that."""
    vectors, grams = problem()
    expected = merged_vector(vectors, grams, [1.0] * 3, polarize)
    assert relative(merged_vector(vectors[::-1], grams[::-1], [1.0] * 3, polarize), expected) < 1e-9
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    assert relative(merged_vector([turn @ v for v in vectors], grams, [1.0] * 3, polarize), turn @ expected) < 1e-9
    assert relative(merged_vector(vectors, [9 * gram for gram in grams], [1.0] * 3, polarize), expected) < 1e-9


def test_each_task_has_its_share_of_directions_and_all_are_equally_large() -> None:
    vectors, grams = problem(2, inputs=12, outputs=9)
    values = torch.linalg.svdvals(merged_vector(vectors, grams, [1.0, 1.0], polarize=False))
    assert torch.allclose(values[:8], values[0].expand(8), rtol=1e-9)  # 9 // 2 directions of each
    assert float(values[8]) < 1e-9


def test_directions_that_no_input_shows_do_not_count() -> None:
    """The task matrix is large where there are no inputs, and its own directions would be others."""
    vectors, grams = problem(1, inputs=4, outputs=4)
    hidden = vectors[0].clone()
    hidden[:, -1] = 100.0
    grams[0][-1] = grams[0][:, -1] = 0.0
    shown = hidden.clone()
    shown[:, -1] = 0.0
    one, two = (merged_vector([v], grams, [1.0], polarize=False) for v in (hidden, shown))
    left = torch.linalg.svd(one)[0][:, :3]
    other = torch.linalg.svd(two)[0][:, :3]
    assert relative(left @ left.T, other @ other.T) < 1e-6


def test_tasks_that_shift_nothing() -> None:
    vectors, grams = problem()
    zeros = [torch.zeros_like(vector) for vector in vectors]
    assert not merged_vector(zeros, grams, [1.0] * 3).any()
    assert not merged_vector(vectors, [torch.zeros_like(gram) for gram in grams], [1.0] * 3).any()
    low_rank = [vector[:, :1] @ vector[:1] for vector in vectors]
    assert bool(merged_vector(low_rank, grams, [1.0] * 3).isfinite().all())


def test_large_layers_are_made_larger() -> None:
    def parameter(*values: float) -> nn.Parameter:
        return nn.Parameter(torch.tensor([values]).double(), requires_grad=False)

    merged = {"a.0.w": parameter(3.0), "a.1.w": parameter(1.0), "b.w": parameter(5.0), "a.0.bias": parameter(1.0)}
    merged["tied"] = merged["a.0.w"]
    merged["buffer"] = torch.tensor(4.0)  # type: ignore[assignment]
    base = {name: torch.zeros_like(value) for name, value in merged.items()}
    rescale(merged, base, 2.0, {"tied", "a.1.w", "b.w"})
    found = {name: value.item() for name, value in merged.items()}
    # 3 and 1 have a mean of 2
    assert found == {
        "a.0.w": 2 * 3 * 1.5**2,
        "a.1.w": 2 * 1 * 0.5**2,
        "b.w": 10.0,
        "a.0.bias": 2.0,
        "tied": 2 * 3 * 1.5**2,
        "buffer": 4.0,
    }


def test_scale_0_gives_the_base() -> None:
    base, experts = made()
    merged, _, _ = run(ESM(0.0), tasks_of(experts, 20), base)
    close(merged, state(base), 1e-12)


def test_what_is_no_matrix_is_averaged() -> None:
    base, experts = made(make=lambda: nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)))
    tasks = [Task("ab"[n], expert, [torch.tensor([[0, 1, 2 + n]])]) for n, expert in enumerate(experts)]
    merged, records, _ = run(ESM(), tasks, base)
    mean = averages(experts, [0.5, 0.5])
    for name, value in merged.items():
        assert (relative(value, mean[name]) < 1e-12) == (name != "2.weight"), name
    notes = {record.name: record.note for record in records if record.note}
    assert notes["0"] == notes["1"] == "ESM averages what is not one matrix"


def test_more_tasks_than_outputs() -> None:
    base, experts = made(3, make=lambda: nn.Sequential(nn.Linear(4, 2)))
    merged, records, _ = run(ESM(), tasks_of(experts), base)
    close(merged, averages(experts, [1 / 3] * 3), 1e-12)
    assert records[0].note == "ESM averages matrices with fewer outputs than there are tasks"


def test_importance_0_leaves_a_task_out() -> None:
    base, experts = made(3)
    some = ESM(importance={"a": 1.0, "b": 1.0, "c": 0.0})
    close(run(some, tasks_of(experts), base)[0], run(ESM(), tasks_of(experts[:2]), base)[0], 1e-9)


def test_settings() -> None:
    assert not ESM().problems(["a", "b"])
    assert any("scale: must be a finite number" in problem for problem in ESM(math.nan).problems(["a", "b"]))
    assert any("no weight for b" in problem for problem in ESM(importance={"a": 1.0}).problems(["a", "b"]))
    assert any("matrices: ESM merges the model" in p for p in Combined(ESM(), Average()).problems(["a", "b"]))
