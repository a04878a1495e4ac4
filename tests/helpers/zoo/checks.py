"""What a merge of any architecture has to be. None of them is known to the library by name."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch

from benchmarks.naive import naive_chain
from com_lightning.core.tensors.modules import named_tensors, tied_names
from tests.helpers.numbers import relative
from tests.helpers.zoo.merges import Merged, account, averages, make_experts, merge
from tests.helpers.zoo.shares import shares

# The least share of the parameters that is solved where it is not nearly all of them, in percent: to be raised, not
# lowered. What the rest is, `python -m tests.helpers.zoo` tells.
SHARES = {
    **{"Mamba": 94.9},  # its decay rates go through an exponential; 0.6 % in the default size
    **{"DeBERTa-v2": 97.7},  # its relative positions are themselves an input; 0.3 % in the default size
    **{"LSTM": 7},  # a recurrent layer, averaged
    **{"FNO": 7},  # products of frequencies with complex weights, averaged
}


@cache
def merged(name: str) -> Merged:
    return merge(*make_experts(name))


def gives_identical_experts_back(name: str) -> None:
    experts, batches = make_experts(name)
    twins = [experts[0], copy.deepcopy(experts[0])]
    # One task's data for both: running statistics are that task's own.
    values = merge(twins, [batches[0], batches[0]]).values
    expected = {own: tensor for own, tensor, _ in named_tensors(experts[0])}
    for own, value in values.items():
        assert relative(value, expected[own]) < 1e-5, own


def is_closer_than_the_average(name: str) -> None:
    result = merged(name)
    plain, chain = result.error(averages(result.experts)), result.error(result.values)
    assert 1e-3 < plain < 1e3  # the experts differ, and all is finite
    assert chain < 0.95 * plain


def accounts_for_every_parameter(name: str) -> None:
    result = merged(name)
    what, start = account(result), averages(result.experts)
    assert set(what) == {own for own, _, _ in named_tensors(result.experts[0])}
    assert not [own for own, reason in what.items() if "MISSED" in reason]
    for own, reason in what.items():
        if reason not in ("solved", "buffer"):
            assert torch.equal(result.values[own], start[own]), own
    assert all(bool(record.parameters) != bool(record.note) for record in result.records)
    solved = [own for record in result.records for own in record.parameters]
    # Not all: the best is the average for rows looked up equally often, and behind units that are dead.
    moved = [own for own in solved if relative(result.values[own], start[own]) > 1e-6]
    assert len(moved) > 0.9 * len(solved)
    share = shares(result)
    assert share.share + sum(share.rest.values()) == pytest.approx(1)
    assert share.share >= SHARES.get(name, 99.7) / 100, str(share)


def solves_tied_parameters_once(name: str) -> None:
    result = merged(name)
    order = [record.name for record in result.records]
    ties = tied_names(result.experts[0])
    sizes = {own: tensor.numel() for own, tensor, _ in named_tensors(result.experts[0])}
    solved: dict[str, int] = {}
    for record in result.records:
        for own, count in record.parameters.items():
            solved[ties[own]] = solved.get(ties[own], 0) + count
            twins = [twin for twin, first in ties.items() if first == ties[own]]
            users = [record.name, *twins, *(twin.rpartition(".")[0] for twin in twins)]
            first = min((user for user in users if user in order), key=order.index)
            assert first == record.name, f"{own} was used by {first} before it was solved"
    assert all(count == sizes[own] for own, count in solved.items())


def merges_as_the_naive_chain(name: str) -> None:
    result = merged(name)
    reference = merge(result.experts, result.batches, using=naive_chain)
    assert [(r.name, r.parameters, r.note) for r in result.records] == [
        (r.name, r.parameters, r.note) for r in reference.records
    ]
    for own, value in reference.values.items():
        assert relative(result.values[own], value) < 1e-5, own


CHECKS = [
    gives_identical_experts_back,
    is_closer_than_the_average,
    accounts_for_every_parameter,
    solves_tied_parameters_once,
    merges_as_the_naive_chain,
]
FEW = ("resnet18", "U-Net", "ViT", "BERT", "GPT-2", "Mixtral", "Mamba", "TransformerEncoder", "LSTM")
"""One of each kind, which takes little time."""
