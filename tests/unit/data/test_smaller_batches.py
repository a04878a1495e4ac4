"""Small copies of batches: their sizes tell samples and positions apart, and what belongs together stays together."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from com_lightning.core.sweep.task import Cut
from com_lightning.data.padding import padding_masks
from com_lightning.data.smaller_batches import smaller_batches
from com_lightning.data.steps import Batch


def batch_of(content: Any, expert: nn.Module | None = None) -> Batch:
    return Batch(content, 0, padding_masks(content, expert or nn.Module(), "batch"))


def text(lengths: list[int], size: int, left: bool = False) -> dict[str, Tensor]:
    places = torch.arange(size).flip(0) if left else torch.arange(size)
    mask = (places < torch.tensor(lengths)[:, None]).long()
    ids = (torch.arange(len(lengths))[:, None] * 100 + torch.arange(1, size + 1)) * mask
    return {"input_ids": ids, "attention_mask": mask}


def sizes(cuts: tuple[Cut, Cut]) -> list[tuple[int, int]]:
    """The sizes in both copies: first of the samples, then of each mask's positions."""
    first, second = cuts
    return [(first.samples, second.samples), *((size, second.positions[n]) for n, size in first.positions.items())]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), size=st.integers(1, 9), samples=st.integers(1, 7), left=st.booleans())
def test_whatever_the_lengths_are(data: st.DataObject, size: int, samples: int, left: bool) -> None:
    lengths = data.draw(st.lists(st.integers(0, size), min_size=samples, max_size=samples).filter(any))
    whole = text(lengths, size, left)
    for number, cuts in enumerate(smaller_batches([batch_of(whole)])):
        pairs = sizes(cuts)
        assert any(one != two for one, two in pairs)
        if size > 2 and samples > 2 and number == 0:
            assert len(set(pairs)) == len(pairs)
            assert all(one != two for one, two in pairs)
        for cut in cuts:
            content = cut.batch.content
            assert content["input_ids"].shape == (cut.samples, cut.positions["attention_mask"])
            assert torch.equal(content["input_ids"] != 0, content["attention_mask"] == 1)  # still belong together
            kept = {tuple(row[row != 0].tolist()) for row in content["input_ids"]}
            rows = [row[row != 0].tolist() for row in whole["input_ids"]]
            assert all(any(set(row) <= set(other) for other in rows) for row in kept)


def test_the_shortest_samples_keep_all_their_data() -> None:
    whole = text([9, 2, 7, 3, 9], 12)
    first, second = next(smaller_batches([batch_of(whole)]))
    assert [cut.batch.content["input_ids"].tolist() for cut in (second, first)] == [
        [[101, 102, 0], [301, 302, 303]],
        [[101, 102, 0, 0, 0, 0, 0], [301, 302, 303, 0, 0, 0, 0], [201, 202, 203, 204, 205, 206, 207]],
    ]


class Named(NamedTuple):
    text: Any
    labels: Tensor


class Masked(nn.Module):
    def calibration_mask(self, batch: Any) -> Tensor:
        return (torch.arange(6) < torch.arange(2, 7)[:, None])[: len(batch[0].movedim(self.samples, 0))]

    samples = 0


class SequenceFirst(Masked):
    samples = 1


@pytest.mark.parametrize(
    ("content", "expert", "shapes"),
    [
        ((text([2, 3, 4, 5, 6], 6), torch.zeros(5)), None, "(3, 4) (3, 4) (3,)"),
        (Named(text([2, 3, 4, 5, 6], 6), torch.zeros(5, 7)), None, "(3, 4) (3, 4) (3, 7)"),
        ((torch.zeros(5, 6, 8), torch.zeros(5), torch.zeros(())), Masked(), "(3, 4, 8) (3,) ()"),
        ((torch.zeros(6, 5, 8), torch.zeros(5)), SequenceFirst(), "(4, 3, 8) (3,)"),
        ({"image": torch.zeros(5, 3, 9, 9), **text([2, 3, 4, 5, 6], 6)}, None, "(3, 3, 9, 9) (3, 4) (3, 4)"),
    ],
)
def test_batches_of_any_format(content: Any, expert: nn.Module | None, shapes: str) -> None:
    first, _ = next(smaller_batches([batch_of(content, expert)]))
    found: list[str] = []

    def look(value: Any) -> None:
        if isinstance(value, Tensor):
            found.append(str(tuple(value.shape)))
        for entry in value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ():
            look(entry)

    assert type(first.batch.content) is type(content)
    look(first.batch.content)
    assert " ".join(found) == shapes


def test_labels_may_have_positions_of_their_own_or_not() -> None:
    labels = text([6, 5, 4, 3, 2], 6)["input_ids"]
    content = {**text([2, 3, 4, 5, 6], 6), "labels": labels.masked_fill(labels == 0, -100)}
    pairs = list(smaller_batches([batch_of(content)]))
    own, shared = pairs[0][0].batch.content, pairs[1][0].batch.content
    assert own["labels"].shape != own["input_ids"].shape
    assert shared["labels"].shape == shared["input_ids"].shape
    assert set(pairs[0][0].positions) == {"attention_mask", "labels"}
    assert set(pairs[1][0].positions) == {"attention_mask"}


@pytest.mark.parametrize("name", ["decoder_input_ids", "labels"])
def test_a_decoder_has_positions_of_its_own_without_a_mask_too(name: str) -> None:
    content = {**text([2, 3, 4, 5, 6], 6), name: torch.ones(5, 6, dtype=torch.long)}
    first, second = next(smaller_batches([batch_of(content)]))
    assert {"attention_mask", name} == set(first.positions)
    assert len({*sizes((first, second))}) == 3


def test_what_cannot_be_cut_gives_no_copies() -> None:
    image_mask = type("OfImages", (nn.Module,), {"calibration_mask": lambda self, batch: torch.ones(2, 3, 3).bool()})
    assert not list(smaller_batches([batch_of((torch.zeros(2, 3, 3),), image_mask())]))
    assert not list(smaller_batches([batch_of(text([1, 1], 1))]))


def test_the_batch_that_shows_most_is_cut() -> None:
    batches = [batch_of(text([3, 3, 3, 3], 3)), batch_of(text([4], 4)), batch_of(text([2, 3, 4], 5))]
    first, _ = next(smaller_batches(batches))
    assert first.batch.content["input_ids"].tolist()[0][:2] == [1, 2]
    assert first.positions == {"attention_mask": 4}
