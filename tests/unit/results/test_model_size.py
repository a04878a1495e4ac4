"""How much merged models hold."""

from __future__ import annotations

import copy

import torch
from torch import nn

from com_lightning.core.tensors.modules import copy_module
from com_lightning.results.model_size import Amount, ModelSize, measure_size, size_rows, size_sentence


def network() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(4, 6), "norm": nn.BatchNorm1d(6), "head": nn.Linear(6, 2)})


def shared_body(first: nn.Module) -> nn.Module:
    """A copy with the body of another network, and the rest its own."""
    second = copy.deepcopy(first)
    ids = {id(second.get_parameter(f"body.{n}")): first.get_parameter(f"body.{n}") for n in ("weight", "bias")}
    return copy_module(second, ids)


def test_what_is_shared_counts_once() -> None:
    first = network()
    merged = {"a": first, "b": shared_body(first)}
    size = measure_size({"a": network(), "b": network()}, merged, {})
    assert size.shared == Amount(30, 4 * 30)
    own = 12 + 12 + 1 + 14  # norm, its statistics and its counter of batches, and the head
    assert size.tasks == {task: Amount(own, 4 * (own - 1) + 8) for task in "ab"}
    assert size.experts.values == 2 * (30 + own)
    assert size.merged.values == 30 + 2 * own
    assert size.share == size.merged.bytes / size.experts.bytes


def test_corrected_weights_count_once_and_corrections_for_each_task() -> None:
    first, second = network(), network()
    size = measure_size({"a": first}, {"a": first, "b": second}, {}, corrected=["body.weight"], corrections=20)
    assert size.shared == Amount(24, 96)
    assert size.tasks["a"].values == 6 + 39 + 20


def test_bytes_are_those_of_the_stored_precision() -> None:
    first = network()
    precision = {task: {"body.weight": torch.bfloat16} for task in "ab"}
    merged = {"a": first, "b": shared_body(first)}
    plain, half = (measure_size({}, merged, p, corrected=["body.weight"], corrections=7) for p in ({}, precision))
    assert plain.shared.bytes - half.shared.bytes == 2 * 24
    assert plain.tasks["b"].bytes - half.tasks["b"].bytes == 2 * 7


def test_tied_weights_count_once_and_adapters_that_were_merged_do_not() -> None:
    net = nn.ModuleDict({"table": nn.Embedding(5, 4), "out": nn.Linear(4, 5, bias=False), "lora_A": nn.Linear(4, 2)})
    net["out"].weight = net["table"].weight
    assert measure_size({}, {"a": net}, {}, left_out=["lora_A.weight", "lora_A.bias"]).merged.values == 20


def test_the_table_and_the_sentence() -> None:
    size = ModelSize(Amount(1_000_000, 4_000_000), {"a": Amount(10, 40), "b": Amount(20, 80)}, Amount(2, 8_000_000))
    assert [row[0] for row in size_rows(size)][1:] == ["shared by all tasks", "for each task", "merged, 2 tasks",
                                                       "2 experts as full models"]  # fmt: skip
    assert size_rows(size)[2][1:3] == ["10 to 20", "0.04 kB to 0.08 kB"]
    assert size_sentence(size).startswith("Size: 4 MB shared and ")
    assert size_sentence(size).endswith("in all 4 MB, 50.0 % of 8 MB of 2 experts.")
