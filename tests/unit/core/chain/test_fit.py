"""The chain with importance by similarity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers.base import Arguments, LayerCall
from com_lightning.core.layers.einsum import GroupedLinear
from com_lightning.core.solve.statistics import InputSums
from com_lightning.core.sweep.context import Context
from tests.helpers import built
from tests.helpers.chains import case, images, merge, points, worst

ONE_SIDED = ChainOptions(target="merged", normalize=False, by_similarity=True)
TWO_SIDED = ChainOptions(normalize=False, by_similarity=True)


def root_mean_square(data: Tensor) -> float:
    """Of the cosines between different rows."""
    cosines = F.normalize(data.double(), dim=1) @ F.normalize(data.double(), dim=1).T
    n = len(data)
    return float(((cosines.square().sum() - n) / (n * (n - 1))).sqrt())


@pytest.mark.parametrize("options", [ONE_SIDED, TWO_SIDED], ids=["one-sided", "two-sided"])
def test_each_layer_counts_tasks_by_the_similarity_of_the_merged_models_inputs(options: ChainOptions) -> None:
    experts = built(lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)))
    batches = [[points(10 * task + n) for n in range(2)] for task in range(2)]
    merged, records = merge(experts, batches, options)
    inputs = [torch.cat(part) for part in batches]
    hidden = [F.linear(x, merged["0.weight"], merged["0.bias"]).tanh() for x in inputs]
    for record, data in zip(records, (inputs, hidden)):
        similarities = list(map(root_mean_square, data))
        assert list(record.similarity.values()) == pytest.approx(similarities, rel=1e-4)
        shares = [value / sum(similarities) for value in similarities]
        assert list(record.importance.values()) == pytest.approx(shares, rel=1e-4)
        assert abs(shares[0] - 0.5) > 0.01
    shares = list(records[0].importance.values())
    alone = merge(experts, batches, ChainOptions(target=options.target, normalize=False), importance=shares)[0]
    assert torch.allclose(merged["0.weight"], alone["0.weight"], atol=1e-5)
    assert not torch.allclose(merged["0.weight"], merge(experts, batches, ChainOptions(normalize=False))[0]["0.weight"])


@pytest.mark.parametrize("name", ["cnn", "attention", "bert", "bilinear", "batch-norm"])
def test_batches_come_in_any_order_and_size(name: str) -> None:
    experts, batches = case(name)
    experts = [expert.double() for expert in experts]
    batches = [[b.double() if b.is_floating_point() else b for b in part] for part in batches]
    reference, records = merge(experts, batches, TWO_SIDED)
    single = [list(torch.split(torch.cat(part).flip(0), 1)) for part in batches]
    assert worst(merge(experts, single, TWO_SIDED)[0], reference) < 1e-8
    for record in records:
        assert sum(record.importance.values()) == pytest.approx(1.0)
        if record.layer_type in ("per channel", "batch normalisation", "embedding"):
            assert (record.similarity, list(record.importance.values())) == ({}, [0.5, 0.5])
        else:
            assert all(0 < value <= 1 for value in record.similarity.values())


def test_layers_of_one_input_share_its_similarity() -> None:
    records = merge(*case("llama"), TWO_SIDED)[1]
    by_name = {record.name: record for record in records}
    sharing = [record for record in records if record.shared_with]
    assert sharing
    assert all(record.similarity == by_name[record.shared_with or ""].similarity != {} for record in sharing)


def test_rows_of_a_convolution_are_its_patches() -> None:
    experts = built(lambda: nn.Sequential(nn.Conv2d(1, 4, 3, stride=2)))
    record = merge(experts, [[images(0)], [images(10)]], ONE_SIDED)[1][0]
    patches = [F.unfold(images(seed), 3, stride=2).mT.flatten(0, 1) for seed in (0, 10)]
    assert list(record.similarity.values()) == pytest.approx(list(map(root_mean_square, patches)), rel=1e-4)


def test_padding_has_no_part_in_it() -> None:
    experts = built(lambda: nn.Sequential(nn.Linear(5, 3)))
    data = [points(0).view(4, 6, 5), points(10).view(4, 6, 5)]
    keep = torch.tensor([6, 4, 3, 5])[:, None] > torch.arange(6)

    def call(module: nn.Module, batch: Any, index: int) -> None:
        module(torch.where(keep[..., None], batch, 100.0))

    record = merge(experts, [[x] for x in data], ONE_SIDED, call=call, mask=lambda batch: keep)[1][0]
    expected = [root_mean_square(x[keep]) for x in data]
    assert list(record.similarity.values()) == pytest.approx(expected, rel=1e-4)


def test_a_batch_that_is_left_out_has_no_part_in_it() -> None:
    experts = built(lambda: nn.Sequential(nn.Linear(5, 3)))
    bad = points(1).index_fill(0, torch.tensor([3]), torch.nan)
    expected = merge(experts, [[points(0)], [points(10)]], ONE_SIDED)[1][0]
    skipping = Context(on_bad_batch="skip")
    record = merge(experts, [[points(0), bad], [points(10)]], ONE_SIDED, context=skipping)[1][0]
    assert record.similarity == pytest.approx(expected.similarity, rel=1e-5)


def test_each_expert_of_a_mixture_compares_the_rows_that_it_gets() -> None:
    rows, ends = points(0), torch.tensor([10, 10, 24])
    sums = InputSums(False, False, measures_similarity=True)
    weight = torch.zeros(3, 2, 5)
    for data in (rows, rows.flip(1)):
        call = LayerCall(Arguments((data, ends)), None, weight)
        GroupedLinear().gather(nn.Identity(), sums, call)
    groups = [torch.cat([rows[a:b], rows.flip(1)[a:b]]) for a, b in ((0, 10), (10, 24))]
    pairs = [len(group) * (len(group) - 1) for group in groups]
    squares = [root_mean_square(group) ** 2 * count for group, count in zip(groups, pairs)]
    assert sums.to_means(weight).similarity == pytest.approx((sum(squares) / sum(pairs)) ** 0.5, rel=1e-5)


def test_tasks_that_have_drifted_more_can_also_count_more() -> None:
    experts, batches = case("mlp")
    both = merge(experts, batches, ChainOptions(normalize=False, by_similarity=True, balance=True))[1][-1]
    shares = [both.similarity[task] * both.distance[task] ** 2 for task in both.similarity]
    expected = [share / sum(shares) for share in shares]
    assert list(both.importance.values()) == pytest.approx(expected, rel=1e-4)
