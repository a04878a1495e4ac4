"""``nn.MultiheadAttention``, split into its linear layers.

It projects queries, keys and values by function calls with packed weights. It calls no module, so that a forward cannot
pause there. :func:`split_attention` gives it four linear layers on the same storage, and a forward that calls them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn


def split_attention(module: nn.Module) -> dict[str, tuple[str, slice]]:
    """Split every ``nn.MultiheadAttention`` in ``module``, in place.

    Args:
        module: a copy whose module objects nobody else uses. Its tensors are shared, not copied.

    Returns:
        Full name of each new parameter -> name of the packed parameter, and its rows.

    Example::

        >>> layers = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
        >>> parts = split_attention(layers)
        >>> parts["attention.k_proj.weight"]
        ('attention.in_proj_weight', slice(4, 8, None))
    """
    parts: dict[str, tuple[str, slice]] = {}
    for name, attention in module.named_modules():
        if getattr(type(attention), "forward", None) is not nn.MultiheadAttention.forward:
            continue
        assert isinstance(attention, nn.MultiheadAttention)
        prefix = f"{name}." if name else ""
        packed = attention._parameters.get("in_proj_weight")
        width = attention.embed_dim
        for number, letter in enumerate("qkv"):
            rows = slice(number * width, (number + 1) * width)
            separate = f"{letter}_proj_weight"
            weight = packed[rows] if packed is not None else attention._parameters[separate]
            assert weight is not None
            bias = attention.in_proj_bias
            linear = _linear(weight, None if bias is None else bias[rows])
            target = ("in_proj_weight", rows) if packed is not None else (separate, slice(None))
            parts[f"{prefix}{letter}_proj.weight"] = (f"{prefix}{target[0]}", target[1])
            if bias is not None:
                parts[f"{prefix}{letter}_proj.bias"] = (f"{prefix}in_proj_bias", rows)
            attention._modules[f"{letter}_proj"] = linear
        for packed_name in ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            attention._parameters[packed_name] = None
        attention.__class__ = _SplitAttention
    return parts


class _SplitAttention(nn.MultiheadAttention):
    """The same attention in eval mode, with calls of ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj``."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        projections = [self._modules[f"{letter}_proj"] for letter in "qkv"]
        return _attention(
            (query, key, value),
            (*projections, self.out_proj),  # type: ignore[arg-type]
            self.num_heads,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            key_padding_mask,
            attn_mask,
            need_weights,
            average_attn_weights,
            self.batch_first,
        )


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: None = None,
    static_v: None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``torch.nn.functional.multi_head_attention_forward`` without dropout, with calls of ``F.linear``."""
    if static_k is not None or static_v is not None:
        raise ValueError("attention with static_k or static_v is not supported")
    width = query.shape[-1]
    rows = [slice(number * width, (number + 1) * width) for number in range(3)]
    separate = (q_proj_weight, k_proj_weight, v_proj_weight)
    weights = separate if in_proj_weight is None or use_separate_proj_weight else [in_proj_weight[r] for r in rows]
    biases = [None] * 3 if in_proj_bias is None else [in_proj_bias[r] for r in rows]
    pairs = [*zip(weights, biases), (out_proj_weight, out_proj_bias)]
    projections = [partial(_linear_of, weight, bias) for weight, bias in pairs]
    return _attention(
        (query, key, value),
        projections,
        num_heads,
        bias_k,
        bias_v,
        add_zero_attn,
        key_padding_mask,
        attn_mask,
        need_weights,
        average_attn_weights,
        batch_first=False,
    )


def _linear_of(weight: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    assert weight is not None
    return nn.functional.linear(x, weight, bias)


def _attention(
    inputs: tuple[Tensor, Tensor, Tensor],
    projections: Sequence[Callable[[Tensor], Tensor]],
    heads: int,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    key_padding_mask: Tensor | None,
    attn_mask: Tensor | None,
    need_weights: bool,
    average_weights: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor | None]:
    """Attention with these projections of query, key, value and output."""
    query, key, value = inputs
    batched = query.dim() == 3
    if not (batched and batch_first):
        # The batch comes first, as in a padding mask. Equal inputs stay one tensor, so that they share statistics.
        transposed = {id(t): t.transpose(0, 1) if batched else t[None] for t in inputs}
        query, key, value = (transposed[id(t)] for t in inputs)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask[None]
    q, k, v = (project(t) for project, t in zip(projections, (query, key, value)))
    samples, length, width = q.shape
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat([t, b.expand(samples, 1, -1)], 1) for t, b in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (torch.cat([t, t.new_zeros(samples, 1, width)], 1) for t in (k, v))
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))  # type: ignore[no-untyped-call]
    scores = (q @ k.transpose(-2, -1)) / math.sqrt(width // heads)
    extra = k.shape[-2] - key.shape[1]  # positions that were added here and are in no mask
    if attn_mask is not None:
        mask = _additive(attn_mask, extra, scores.dtype)
        scores = scores + (mask.view(samples, heads, length, -1) if mask.dim() == 3 else mask)
    if key_padding_mask is not None:
        scores = scores + _additive(key_padding_mask, extra, scores.dtype)[:, None, None, :]
    weights = scores.softmax(-1)
    if not need_weights:  # scaled_dot_product_attention, too, gives zeros to a position that attends to nothing
        weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0.0)
    output = projections[3]((weights @ v).transpose(1, 2).flatten(-2))
    if batched and not batch_first:
        output = output.transpose(0, 1)
    elif not batched:
        output, weights = output[0], weights[0]
    if not need_weights:
        return output, None
    return output, weights.mean(-3) if average_weights else weights


def _additive(mask: Tensor, extra: int, dtype: torch.dtype) -> Tensor:
    """A mask to add to the scores. Where a boolean mask is true, it masks. ``extra`` positions are not masked."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)
    return nn.functional.pad(mask.to(dtype), (0, extra))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer on the storage of these tensors."""
    linear = nn.Linear(1, 1, bias=bias is not None, device="meta")
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear.eval()
