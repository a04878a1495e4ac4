"""Attention taken apart computes what it did in one piece."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module
from tests.helpers import relative

FORMS = {
    "plain": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False, "batch_first": True},
    "other widths": {"kdim": 6, "vdim": 6},
    "learned positions": {"add_bias_kv": True, "batch_first": True},
    "zero position": {"add_zero_attn": True},
}


def masks(kind: str | None, *shape: int) -> Tensor | None:
    if kind is None:
        return None
    chosen = torch.rand(shape) > 0.7
    chosen[..., 0] = False  # something is left to attend to
    return chosen if kind == "bool" else torch.randn(shape)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("batched", [True, False])
def test_equals_the_original(form: dict[str, Any], batched: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, **form).eval()
    for parameter in attention.parameters():
        nn.init.normal_(parameter)
    holder = nn.ModuleDict({"it": copy_module(attention)})
    split_attention(holder)
    query, key = torch.randn(3, 4, 8), torch.randn(3, 5, attention.kdim)
    if not batched:
        query, key = query[0], key[0]
    elif not attention.batch_first:
        query, key = query.transpose(0, 1), key.transpose(0, 1)
    padded = (3, 5) if batched else (5,)
    heads = (6, 4, 5) if batched else (2, 4, 5)
    for padding, mask, shape, average in product(
        (None, "bool"), (None, "bool", "float"), ((4, 5), heads), (True, False)
    ):
        if padding and mask == "float":
            continue  # PyTorch warns of mixed kinds
        arguments = {"key_padding_mask": masks(padding, *padded), "attn_mask": masks(mask, *shape)}
        with torch.no_grad():
            expected, actual = (
                module(query, key, key, average_attn_weights=average, **arguments)
                for module in (attention, holder["it"])
            )
            short = holder["it"](query, key, key, need_weights=False, **arguments)
        assert relative(actual[0], expected[0]) < 1e-4
        assert relative(actual[1], expected[1]) < 1e-4
        assert expected[1].shape == actual[1].shape
        assert short[1] is None
        assert torch.equal(short[0], actual[0])


def test_the_parts_are_views_of_the_whole() -> None:
    attention = nn.MultiheadAttention(4, 2)
    holder = nn.ModuleDict({"it": copy_module(attention)})
    parts = split_attention(holder)
    with torch.no_grad():
        holder.get_parameter("it.v_proj.bias").fill_(7)
    assert attention.in_proj_bias.tolist() == [0.0] * 8 + [7.0] * 4
    assert parts["it.v_proj.bias"] == ("it.in_proj_bias", slice(8, 12))


def test_an_attention_of_ones_own_is_left_alone() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().forward(query, query, query)

    assert split_attention(nn.ModuleDict({"it": Own(4, 2)})) == {}


def test_a_position_that_may_attend_to_nothing_gets_zeros() -> None:
    attention = nn.MultiheadAttention(4, 2, batch_first=True).eval()
    holder = nn.ModuleDict({"it": copy_module(attention)})
    split_attention(holder)
    x, mask = torch.randn(2, 3, 4), torch.tensor([[True, True, True], [False, False, True]])
    # With gradients, so that PyTorch does not take its fused fast path, which gives NaN here.
    expected, actual = (m(x, x, x, key_padding_mask=mask, need_weights=False)[0] for m in (attention, holder["it"]))
    assert bool(expected.isfinite().all())
    assert relative(actual, expected) < 1e-5
