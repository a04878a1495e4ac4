"""Perturbed copies of calibration batches: what goes together stays together, and few samples go further."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import Task
from com_lightning.data.augmentation import perturbed, with_copies


@dataclass
class Padded:
    content: dict[str, Tensor]
    keep: Tensor | None = None


def _texts(samples: int = 6, length: int = 12) -> Padded:
    """Sample n holds the number n + 1, and 0 where it is padded."""
    mask = torch.arange(length) < torch.arange(length - samples, length)[:, None]
    ids = torch.arange(1, samples + 1)[:, None] * mask
    return Padded({"input_ids": ids, "labels": torch.arange(samples)}, mask)


def test_a_token_and_its_mask_stay_together() -> None:
    batch = _texts()
    other = perturbed(batch, 0)
    ids = other.content["input_ids"]
    assert torch.equal(ids > 0, other.keep)
    assert torch.equal(other.content["labels"], batch.content["labels"])
    spliced = [row.unique()[row.unique() > 0].tolist() for row in ids]
    assert all(number + 1 in found and len(found) <= 2 for number, found in enumerate(spliced))
    assert sum(len(found) == 2 for found in spliced) >= 4  # a span may hold nothing but padding
    assert torch.equal(batch.content["input_ids"], _texts().content["input_ids"])  # which is not changed


def test_images_take_a_box_and_noise() -> None:
    images = torch.arange(1.0, 5.0)[:, None, None, None].expand(4, 3, 12, 12)
    noisy = perturbed([images, torch.arange(4)], 0)[0]
    assert (noisy - noisy.round()).abs().max() > 0
    whole = perturbed([images.long(), torch.arange(4)], 0)[0]  # integers get no noise
    for number in range(4):
        taken = whole[number] != number + 1
        assert torch.equal(taken, taken[:1].expand_as(taken))  # the same place in every channel
        rows, columns = taken[0].any(1).sum().item(), taken[0].any(0).sum().item()
        assert taken[0].sum() == rows * columns  # a box
        assert 4 <= rows <= 8
        assert 4 <= columns <= 8


@pytest.mark.parametrize("value", [torch.ones(4, 3), torch.zeros(4, 3).bool(), torch.arange(4.0), torch.zeros(0, 3)])
def test_what_is_no_measured_number_gets_no_noise(value: Tensor) -> None:
    assert torch.equal(perturbed(value, 0), value)


def test_a_seed_tells_all() -> None:
    batch = torch.randn(5, 7)
    one, same, other = (perturbed(batch, seed) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


class _Two(Peers):
    """The other process has one batch more."""

    size = 2

    def exchange(self, value: Any) -> list[Any]:
        return [value, [1, 3, 4]]


def test_copies_are_numbered_on_and_differ() -> None:
    tasks = [Task(name, nn.Linear(2, 2), [torch.ones(2, 2), torch.randn(2, 2)], numbers=[0, 2]) for name in "ab"]
    first, second = with_copies(tasks, 2, _Two())
    assert first.numbers == [0, 2, 6, 8, 12, 14]
    assert torch.equal(first.batches[1], tasks[0].batches[1])
    assert len({tuple(batch.flatten().tolist()) for task in (first, second) for batch in task.batches[3::2]}) == 4
