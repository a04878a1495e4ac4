"""Perturbed copies of calibration batches: what goes together stays together, and few samples go further."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from com_lightning import ChainOfMergesCallback, Fisher, MergeDataModule, MergeError, RegMean, TaskLoaders
from com_lightning.core.sweep.distributed import Alike
from com_lightning.core.sweep.task import Padding
from com_lightning.data.augmentation import perturbed, with_copies
from com_lightning.data.steps import Batch
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer


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


def test_copies_are_numbered_on_and_differ() -> None:
    batches = [torch.ones(2, 2), torch.randn(2, 2)]
    (first, numbers), (second, _) = (with_copies(batches, [0, 2], 5, 2, task) for task in "ab")
    assert numbers == [0, 2, 5, 7, 10, 12]
    assert torch.equal(first[1], batches[1])
    assert len({tuple(batch.flatten().tolist()) for copies in (first, second) for batch in copies[3::2]}) == 4


def test_processes_make_the_copies_that_one_would() -> None:
    loader = DataLoader(TensorDataset(torch.randn(22, 4)), batch_size=4)
    data = MergeDataModule({"a": TaskLoaders(val=loader)}, num_samples=18, augmented_copies=3)
    whole, *shares = (data.calibration("a", peers=Alike(*part)) for part in ((0, 1), (0, 2), (1, 2)))
    alone, *parts = (
        dict(zip(*reversed(data.augmented("a", [batch for batch, _ in sample.batches], sample))))
        for sample in (whole, *shares)
    )
    assert whole.total == 5
    assert sorted(alone) == list(range(20))
    assert sorted([*parts[0], *parts[1]]) == sorted(alone)
    for number, batch in {**parts[0], **parts[1]}.items():
        assert torch.equal(batch[0], alone[number][0])


def test_copies_reach_the_rule_and_are_not_counted_as_samples() -> None:
    merged = {}
    for copies in (0, 2):
        data = MergeDataModule(
            {"a": make_data(0), "b": make_data(1)}, num_samples=10, batch_size=5, augmented_copies=copies
        )
        experts = dict(zip("ab", make_experts()))
        callback = ChainOfMergesCallback(experts, RegMean(), baselines=False)
        quiet_trainer(callbacks=[callback]).validate(Classifier(3), datamodule=data, verbose=False)
        merged[copies] = callback.modules["a"].state_dict()
        assert callback.report.samples == {"a": 10, "b": 10}
        assert {layer.rows["a"] for layer in callback.report.layers} == {10 * (1 + copies)}
    assert not torch.equal(merged[0]["body.0.weight"], merged[2]["body.0.weight"])


def test_a_rule_that_needs_labels_refuses_copies() -> None:
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, augmented_copies=1)
    callback = ChainOfMergesCallback(dict(zip("ab", make_experts())), Fisher())
    with pytest.raises(MergeError, match=r"data\.augmented_copies: Fisher needs labels"):
        quiet_trainer(callbacks=[callback]).validate(Classifier(3), datamodule=data, verbose=False)


def test_masks_change_with_what_they_were_made_from() -> None:
    ids = torch.randint(1, 30, (6, 8)) * (torch.arange(8) < torch.arange(3, 9)[:, None])
    changed = perturbed(Batch({"input_ids": ids}, 0, {"attention_mask": Padding(ids != 0)}), 3)
    assert not torch.equal(changed.content["input_ids"], ids)
    assert torch.equal(changed.masks["attention_mask"].mask, changed.content["input_ids"] != 0)
