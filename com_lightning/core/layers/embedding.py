"""Embeddings: each row is one-hot."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.layers.base import LayerCall, LayerType, first, parameter_value, rows_with_data
from com_lightning.core.layers.registry import register_layer_type
from com_lightning.core.solve.statistics import InputSums


@register_layer_type
class Embedding(LayerType):
    """``nn.Embedding``: rows are one-hot, so the Gram matrix is the diagonal of token counts.

    Each row of the table is a group with one input. Rows that no task uses keep the average. A subclass that overrides
    ``forward`` (positions with an offset, scaled words) calls ``F.embedding``, which is solved as a function call.
    """

    name = "embedding"
    reaches_all_groups = False

    def matches(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Embedding.forward and set(module._parameters) == {"weight"}

    def key(self, module: nn.Module) -> Hashable:
        assert isinstance(module, nn.Embedding)
        return (type(self), module.num_embeddings)

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        assert isinstance(module, nn.Embedding)
        one_hot = F.one_hot(first(args, kwargs).long(), module.num_embeddings)
        yield one_hot.unsqueeze(-1).to(torch.float32), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return parameter_value(layer, "weight")[:, :, None]

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight[:, :, 0]}

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        # Tokens are counted instead of summed over `rows`: a one-hot row has as many entries as the vocabulary.
        assert isinstance(module, nn.Embedding)
        ids = call.merged.input.long()
        index = rows_with_data(call.mask, ids.shape)
        ids = ids.flatten() if index is None else ids.flatten()[index]
        counts = torch.bincount(ids, minlength=module.num_embeddings).to(torch.float32)[:, None, None]
        sums.add(counts, None, len(ids))
        return call.expert is not None
