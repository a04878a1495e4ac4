"""Layer types: rows times weight is what the layer computes, and the weight goes back into the layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from com_lightning.core.layers import LayerType, base, layer_type_of
from com_lightning.core.layers.base import Arguments, LayerCall, RowMask
from com_lightning.core.layers.embedding import Embedding
from com_lightning.core.layers.linear import Bilinear
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.solve.statistics import InputSums
from tests.helpers import perturb, relative

CASES: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(4, 3), torch.randn(2, 5, 4)),
    "linear-no-bias": (nn.Linear(4, 3, bias=False), torch.randn(7, 4)),
    "conv2d": (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 7, 8)),
    "conv2d-patches": (nn.Conv2d(1, 4, 2, stride=2, bias=False), torch.randn(2, 1, 8, 8)),
    "conv2d-grouped": (nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2), torch.randn(2, 4, 7, 7)),
    "conv2d-depthwise": (nn.Conv2d(4, 4, (3, 1), groups=4, padding="same", dilation=2), torch.randn(2, 4, 7, 7)),
    "conv2d-reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), torch.randn(2, 2, 5, 5)),
    "conv1d": (nn.Conv1d(2, 3, 3, padding=2), torch.randn(2, 2, 9)),
    "conv3d": (nn.Conv3d(2, 3, 2), torch.randn(2, 2, 4, 4, 4)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), torch.randn(2, 3, 5, 4)),
    "transposed-grouped": (nn.ConvTranspose1d(4, 6, 4, stride=3, groups=2, dilation=2), torch.randn(2, 4, 5)),
    "transposed-cropped": (nn.ConvTranspose2d(2, 2, 2, padding=2, bias=False), torch.randn(2, 2, 6, 6)),
    "batch-norm": (nn.BatchNorm2d(6), torch.randn(4, 6, 5, 6)),
    "batch-norm-rows": (nn.BatchNorm1d(6), torch.randn(4, 6)),
    "instance-norm": (nn.InstanceNorm2d(6, affine=True), torch.randn(4, 6, 5, 6)),
    "layer-norm-of-images": (LayerNorm2d(6), torch.randn(2, 6, 5, 6)),
    "layer-norm": (nn.LayerNorm(6), torch.randn(2, 5, 6)),
    "layer-norm-2d": (nn.LayerNorm((3, 2)), torch.randn(4, 3, 2)),
    "layer-norm-no-bias": (nn.LayerNorm(6, bias=False), torch.randn(2, 5, 6)),
    "rms-norm": (nn.RMSNorm(6), torch.randn(2, 5, 6)),
    "llama-rms-norm": (LlamaRMSNorm(6), torch.randn(2, 5, 6)),
    "gemma-rms-norm": (GemmaRMSNorm(6), torch.randn(2, 5, 6)),
    "group-norm": (nn.GroupNorm(2, 6), torch.randn(2, 6, 5, 6)),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_times_weight_is_the_output(case: str) -> None:
    module, x = CASES[case]
    perturb(module.eval(), 0.5, seed=1)
    layer_type = layer_type_of(module)
    assert layer_type is not None
    assert layer_type.refuses(module, (x,), {}) is None
    rows = torch.cat([part.reshape(-1, *part.shape[-2:]) for part, _ in layer_type.rows(module, (x,), {})])
    weight = layer_type.to_matrix(module, module).float()
    if case == "gemma-rms-norm":
        weight = weight + 1  # it stores its scale less one; `gather` knows
    if layer_type.has_bias(module):
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    predicted = torch.einsum("ngk,gok->ngo", rows, weight).flatten(1)
    output = module(x)
    if isinstance(module, (nn.modules.conv._ConvNd, nn.GroupNorm, nn.modules.batchnorm._NormBase, LayerNorm2d)):
        output = output.movedim(1, -1)
    assert relative(predicted, output.reshape(predicted.shape)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_the_weight_goes_back_into_the_layer(case: str) -> None:
    module, _ = CASES[case]
    perturb(module, 0.5, seed=2)
    layer_type = layer_type_of(module)
    assert layer_type is not None
    own = dict(module.named_parameters())
    back = layer_type.from_matrix(module, layer_type.to_matrix(module, module).double())
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name].float(), own[name]) for name in own)


@pytest.mark.parametrize("case", CASES)
def test_rows_come_out_the_same_in_pieces(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = CASES[case]
    layer_type = layer_type_of(module)
    assert layer_type is not None
    whole = torch.cat([part.flatten() for part, _ in layer_type.rows(module, (x,), {})])
    monkeypatch.setattr(base, "MAX_ROW_ELEMENTS", 1)
    assert torch.equal(torch.cat([part.flatten() for part, _ in layer_type.rows(module, (x,), {})]), whole)


@pytest.mark.parametrize("one_too_small", [True, False])
def test_an_input_of_zeros_does_not_tell_how_a_scale_is_stored(one_too_small: bool) -> None:
    module: nn.Module = GemmaRMSNorm(6) if one_too_small else LlamaRMSNorm(6)
    perturb(module, 0.5, seed=1)
    x, layer_type = torch.randn(4, 6), layer_type_of(module)
    assert isinstance(layer_type, PerChannel)
    ((rows, _),) = layer_type.rows(module, (torch.zeros(4, 6),), {})
    assert not rows.any()
    ((rows, _),) = layer_type.rows(module, (x,), {})
    scale = layer_type.to_matrix(module, module)[:, 0, 0] + float(one_too_small)
    torch.testing.assert_close(rows[..., 0] * scale, module(x))


@pytest.mark.parametrize("bias", [True, False])
def test_bilinear(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module, left, right = nn.Bilinear(3, 4, 5, bias=bias), torch.randn(2, 6, 3), torch.randn(2, 6, 4)
    layer_type = layer_type_of(module)
    assert isinstance(layer_type, Bilinear)
    assert layer_type.refuses(module, (left, right), {}) is None
    (rows, tokens), *more = layer_type.rows(module, (left,), {"input2": right})
    assert tokens
    assert not more
    weight = layer_type.to_matrix(module, module)
    rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1) if bias else rows
    assert relative(torch.einsum("...gk,gok->...go", rows, weight)[..., 0, :], module(left, right)) < 1e-5
    back = layer_type.from_matrix(module, weight)
    assert back.keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(back[name], parameter) for name, parameter in module.named_parameters())
    # In pieces, from keywords in any order, with a mask: the same statistics as of the rows that it keeps.
    keep = torch.rand(2, 6) > 0.4
    expected, entry = InputSums(bias, True), InputSums(bias, True)
    plain = LayerCall(Arguments((left, right)), Arguments((-left, right)), weight, RowMask([(keep, None)]))
    LayerType.gather(layer_type, module, expected, plain)
    monkeypatch.setattr(base, "MAX_ROW_ELEMENTS", 12 * 2)
    merged, expert = (Arguments((), {"input2": right, "input1": values}) for values in (left, -left))
    assert layer_type.gather(module, entry, LayerCall(merged, expert, weight, RowMask([(keep, None)])))
    assert entry.rows == expected.rows == int(keep.sum())
    assert entry.gram is not None
    assert entry.drift is not None
    assert expected.gram is not None
    assert expected.drift is not None
    torch.testing.assert_close(entry.gram, expected.gram)
    torch.testing.assert_close(entry.drift, expected.drift)


def test_a_bilinear_layer_of_too_many_products_is_refused() -> None:
    module = nn.Bilinear(128, 65, 1, device="meta")
    layer_type = layer_type_of(module)
    assert layer_type is not None
    assert "8,320 entries" in str(layer_type.refuses(module, (), {}))


@pytest.mark.parametrize("padding", [False, True])
def test_embedding_counts_equal_one_hot_rows(padding: bool) -> None:
    torch.manual_seed(0)
    table, ids, layer_type = nn.Embedding(9, 4, padding_idx=0), torch.randint(0, 9, (3, 5)), Embedding()
    keep = torch.rand(3, 5) > 0.4
    counted, dense = InputSums(False, True), InputSums(False, True)
    call = LayerCall(Arguments((ids,)), None, table.weight[..., None], RowMask([(keep, None)]) if padding else None)
    layer_type.gather(table, counted, call)
    LayerType.gather(layer_type, table, dense, call)
    assert counted.gram is not None
    assert dense.gram is not None
    assert counted.rows == dense.rows
    torch.testing.assert_close(counted.gram, dense.gram)


class Shifted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Gate(nn.Module):
    """Two vectors like a normalisation's, that enter otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.weight) + self.bias


@pytest.mark.parametrize("module", [Shifted(2, 2), nn.LSTM(2, 2), nn.PReLU()])
def test_layers_that_are_no_such_regression_are_not_taken_for_one(module: nn.Module) -> None:
    layer_type = layer_type_of(module)
    assert layer_type is None or layer_type.refuses(module, (torch.randn(3, 2),), {})


def test_a_scale_that_is_no_scale_is_refused_when_it_is_seen() -> None:
    gate = Gate()
    perturb(gate, 1.0, seed=0)
    assert isinstance(layer_type_of(gate), PerChannel)
    assert "scale" in str(PerChannel().refuses(gate, (torch.randn(3, 4),), {}))


def test_a_router_that_gives_several_tensors_is_refused() -> None:
    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x * self.weight).max(-1)

    assert "its output is a" in str(PerChannel().refuses(Router(), (torch.randn(3, 4),), {}))


@pytest.mark.parametrize("module", [nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_layers_give_rows_in_float32(module: nn.Module, dtype: torch.dtype) -> None:
    module = copy.deepcopy(module).eval().to(dtype)
    layer_type, x = layer_type_of(module), torch.randn(3, 4).to(dtype)
    assert layer_type is not None
    assert layer_type.refuses(module, (x,), {}) is None
    entry = InputSums(
        layer_type.has_bias(module), True, layer_type.multiplies_drift(layer_type.to_matrix(module, module))
    )
    layer_type.gather(module, entry, LayerCall(Arguments((x,)), Arguments((x,)), layer_type.to_matrix(module, module)))
    assert entry.gram is not None
    assert entry.gram.dtype == torch.float32
