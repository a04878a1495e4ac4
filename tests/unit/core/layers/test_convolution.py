"""Convolutions of all kinds, and how much memory their rows take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.layers import base, layer_type_of
from com_lightning.core.layers.base import Arguments, LayerCall
from com_lightning.core.layers.convolution import Convolution
from com_lightning.core.solve.ridge import factorize, solve
from com_lightning.core.solve.statistics import InputSums
from tests.helpers import built, perturb, relative

SIZES = {1: (9,), 2: (8, 7), 3: (6, 5, 7)}
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "grouped": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 8},
    "strided": {"stride": 2},
    "dilated": {"dilation": 2},
    "all at once": {"groups": 2, "stride": 2, "padding": 1, "dilation": 2},
}
PADDED: dict[str, dict[str, Any]] = {
    **{mode: {"padding": 2, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")},
    "same": {"padding": "same"},
    "same, reflected": {"padding": "same", "padding_mode": "reflect"},
    "same, more on one side": {"padding": "same", "kernel_size": 2},
    "valid": {"padding": "valid"},
}
CASES = {
    **{f"{n}d {name}": (CONVOLUTIONS[n], n, kind) for n in SIZES for name, kind in {**KINDS, **PADDED}.items()},
    **{f"transposed {n}d {name}": (TRANSPOSED[n], n, kind) for n in SIZES for name, kind in KINDS.items()},
    "transposed 2d, longer": (nn.ConvTranspose2d, 2, {"stride": 3, "padding": 1, "output_padding": (2, 1)}),
    "transposed 2d, other strides": (nn.ConvTranspose2d, 2, {"stride": (1, 3), "kernel_size": (3, 2)}),
    "2d, other strides": (nn.Conv2d, 2, {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)}),
}


def layer(name: str) -> nn.Module:
    make, _, kind = CASES[name]
    module: nn.Module = make(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **kind})
    return module


def image(name: str, seed: int, count: int = 3) -> Tensor:
    """Noise; every seed has a mean and a scale of its own for each channel and pixel."""
    generator = torch.Generator().manual_seed(seed)
    shape = (4, *SIZES[CASES[name][1]])
    mean, scale = (torch.randn(shape, generator=generator) for _ in range(2))
    return mean + scale * torch.randn((count, *shape), generator=generator)


@pytest.mark.parametrize("name", CASES)
def test_rows_times_weight_is_the_output(name: str) -> None:
    module, x = perturb(layer(name), 0.5, seed=1), image(name, 0)
    layer_type = layer_type_of(module)
    assert isinstance(layer_type, Convolution)
    assert layer_type.refuses(module, (x,), {}) is None
    rows = torch.cat([part.reshape(-1, *part.shape[-2:]) for part, _ in layer_type.rows(module, (x,), {})])
    if layer_type.has_bias(module):
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)
    predicted = torch.einsum("ngk,gok->ngo", rows, layer_type.to_matrix(module, module)).flatten(1)
    output = module(x).movedim(1, -1)
    assert relative(predicted, output.reshape(predicted.shape)) < 1e-5
    back = layer_type.from_matrix(module, layer_type.to_matrix(module, module))
    assert back.keys() == dict(module.named_parameters()).keys()
    assert all(torch.equal(back[own], parameter) for own, parameter in module.named_parameters())


def merged(experts: list[nn.Module], inputs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, list[InputSums]]:
    layer_type = layer_type_of(experts[0])
    assert layer_type is not None
    weights = [layer_type.to_matrix(expert, experts[0]) for expert in experts]
    statistics = [InputSums(True, True) for _ in experts]
    for entry, (ours, theirs), weight in zip(statistics, inputs, weights):
        assert layer_type.gather(experts[0], entry, LayerCall(Arguments((ours,)), Arguments((theirs,)), weight))
    means = [entry.to_means(weight) for entry, weight in zip(statistics, weights)]
    grams = [entry.gram for entry in means]
    drifts = [entry.weighted_drift(weight) for entry, weight in zip(means, weights)]
    importance = [1 / len(experts)] * len(experts)
    return solve(factorize(grams, importance, 0.01), grams, drifts, weights, importance), statistics


@pytest.mark.parametrize("bound", [1, 50, 200])
@pytest.mark.parametrize("name", ["2d all at once", "3d plain", "1d circular", "transposed 2d strided"])
def test_the_solution_is_the_same_in_pieces_and_no_piece_is_larger(
    name: str, bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = built(lambda: layer(name))
    inputs = [(image(name, seed), image(name, 10 + seed)) for seed in range(2)]
    whole, entries = merged(experts, inputs)
    monkeypatch.setattr(base, "MAX_ROW_ELEMENTS", bound)
    sizes, update = [], InputSums.update

    def watched(self: InputSums, rows: Tensor, *rest: Any) -> None:
        sizes.append(rows.shape)
        update(self, rows, *rest)

    monkeypatch.setattr(InputSums, "update", watched)
    pieces, again = merged(experts, inputs)
    assert relative(pieces, whole) < 1e-4
    assert [entry.rows for entry in entries] == [entry.rows for entry in again]
    # One row is the least that there is.
    assert all(shape.numel() <= bound or shape[0] == 1 for shape in sizes)
    assert len(sizes) > 2


def test_a_large_image_under_a_large_kernel_is_split_too() -> None:
    module = nn.Conv2d(2, 4, 31, padding=15, device="meta")
    x = torch.zeros(1, 1, 1, 1).expand(1, 2, 160, 160)
    total = 160 * 160 * 2 * 31 * 31
    assert total > 2 * base.MAX_ROW_ELEMENTS
    sizes = [rows.numel() for rows, _ in Convolution().rows(module, (x,), {})]
    assert sum(sizes) == total
    assert max(sizes) <= base.MAX_ROW_ELEMENTS
    assert len(sizes) < 2 * total / base.MAX_ROW_ELEMENTS  # and not into crumbs


def test_images_of_different_sizes_are_not_paired_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "MAX_ROW_ELEMENTS", 1)  # every piece is one row, in both
    module, entry = nn.Conv2d(4, 6, 3), InputSums(True, True)
    ours, theirs = (Arguments((torch.randn(size, 4, 5, 5),)) for size in (2, 3))
    assert not Convolution().gather(module, entry, LayerCall(ours, theirs, Convolution().to_matrix(module, module)))
    assert entry.drift is None


def test_without_a_batch_dimension() -> None:
    module, x = nn.Conv2d(4, 6, 3), torch.randn(4, 8, 7)
    alone, batched = (torch.cat([r for r, _ in Convolution().rows(module, (i,), {})]) for i in (x, x[None]))
    assert torch.equal(alone, batched)


def test_an_output_size_is_refused() -> None:
    module: nn.Module = nn.ConvTranspose2d(2, 3, 3, stride=2)
    layer_type, x = layer_type_of(module), torch.randn(1, 2, 4, 4)
    assert layer_type is not None
    assert "output_size" in str(layer_type.refuses(module, (x,), {"output_size": [10, 10]}))
