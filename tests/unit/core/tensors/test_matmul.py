"""Products of matrices by oneDNN: the same but for rounding, and only where nothing else is asked for."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.solve.statistics import InputSums
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors import matmul as products
from com_lightning.core.tensors.matmul import exact_products, linear
from com_lightning.core.tensors.modules import average, named_tensors
from tests.helpers import perturb, relative

pytestmark = pytest.mark.skipif(
    not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")), reason="PyTorch has no oneDNN"
)


@pytest.fixture(params=[True, False], ids=["oneDNN", "as PyTorch does"])
def faster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether oneDNN passes for faster, whatever this machine is."""
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: request.param)
    return bool(request.param)


def large(rows: tuple[int, ...] = (4, 64), numbers: int = 384, outputs: int = 400) -> tuple[Tensor, Tensor]:
    """Input and weight of a product that is worthwhile."""
    torch.manual_seed(0)
    return torch.randn(*rows, numbers), torch.randn(outputs, numbers)


@pytest.mark.parametrize("rows", [(4, 64), (256,), (2, 2, 64)])
def test_linear(faster: bool, rows: tuple[int, ...]) -> None:
    inputs, weight = large(rows)
    assert products._is_faster_with_onednn(inputs, weight) == faster
    assert relative(linear(inputs, weight), F.linear(inputs.double(), weight.double())) < 1e-6


def test_inputs_that_do_not_lie_in_order(faster: bool) -> None:
    inputs, weight = large((64, 4))
    assert relative(linear(inputs.transpose(0, 1), weight), F.linear(inputs.transpose(0, 1), weight)) < 1e-6


def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    inputs, weight = large()
    by_onednn = products._is_faster_with_onednn
    assert by_onednn(inputs, weight)
    assert not by_onednn(inputs[:1, :1], weight), "too small"
    assert not by_onednn(inputs.double(), weight.double())
    assert not by_onednn(inputs, large(numbers=400, outputs=384)[1].T), "oneDNN is slow with it"
    with torch.backends.mkldnn.flags(enabled=False):
        assert not by_onednn(inputs, weight)


@pytest.mark.usefixtures("low")
def test_statistics_have_all_digits_whatever_precision_forwards_are_given(faster: bool) -> None:
    inputs, weight = large()
    with exact_products():
        assert relative(linear(inputs, weight), F.linear(inputs.double(), weight.double())) < 1e-6


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("multiply", [True, False])
def test_statistics(faster: bool, bias: bool, multiply: bool) -> None:
    """Of a layer that is wide enough, and of batches of which one is too small for oneDNN."""
    torch.manual_seed(0)
    weight = torch.randn(1, 300, 600 + bias)
    wide, exact = (InputSums(bias, True, multiply) for _ in range(2))
    for rows in (256, 3, 200):
        merged, expert, offset = torch.randn(rows, 1, 600), torch.randn(rows, 1, 600), torch.randn(rows, 1, 300)
        extra = (weight, offset) if multiply else (None, None)
        wide.update(merged, expert, *extra)
        exact.update(merged.double(), expert.double(), *(None if t is None else t.double() for t in extra))
    ours, theirs = wide.to_means(weight), exact.to_means(weight.double())
    drift, expected = ours.weighted_drift(weight), theirs.weighted_drift(weight.double())
    assert drift is not None
    assert expected is not None
    assert relative(drift, expected) < 1e-6
    assert relative(ours.gram, theirs.gram) < 1e-6


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 1024), nn.Linear(1024, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "rule", [ChainOptions(target="merged"), ChainOptions(residual=True)], ids=["one-sided", "default"]
)
def test_a_merge_is_the_same(monkeypatch: pytest.MonkeyPatch, rule: ChainOptions) -> None:
    torch.manual_seed(0)
    base = Wide()
    experts = [perturb(copy.deepcopy(base), seed=seed) for seed in (1, 2)]
    batches = [torch.randn(2, 1024, 64) for _ in experts]
    found, used = [], []
    by_onednn = products._is_faster_with_onednn

    def noted(*tensors: Tensor) -> bool:
        used.append(by_onednn(*tensors))
        return used[-1]

    monkeypatch.setattr(products, "_is_faster_with_onednn", noted)
    for faster in (True, False):
        monkeypatch.setattr(products, "_onednn_is_faster", lambda faster=faster: faster)
        used.clear()
        tensors = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
        merged = {name: average([each[name] for each in tensors]) for name in tensors[0]}
        tasks = [Task(str(i), e, [b], lambda m, x, _: m(x)) for i, (e, b) in enumerate(zip(experts, batches))]
        merge_layers(tasks, merged, [0.5, 0.5], rule)
        assert any(used) == faster
        found.append(merged)
    for name, value in found[0].items():
        assert relative(value, found[1][name]) < 1e-4, name


def test_forwards_of_the_user_are_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_onednn_is_faster", lambda: True)
    torch.manual_seed(0)
    expert, batch = Wide(), torch.randn(2, 1024, 64)
    expected, outputs = expert(batch).detach(), list[Tensor]()

    def call(module: nn.Module, x: Tensor, index: int) -> None:
        outputs.append(module(x).detach())

    merged = {name: tensor.detach().clone() for name, tensor, _ in named_tensors(expert)}
    merge_layers([Task("a", expert, [batch], call)], merged, [1.0], ChainOptions(target="merged"))
    assert torch.equal(outputs[0], expected)  # to the bit: the only expert comes back, and so do its outputs
