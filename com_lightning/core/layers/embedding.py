"""Embeddings: rows are one-hot."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from com_lightning.core.layers.base import Call, LayerType, first, kept, own_parameter
from com_lightning.core.statistics import InputStatistics


class Embedding(LayerType):
    """``nn.Embedding`` and its subclasses: one-hot rows, so that the Gram matrix is the diagonal of token counts.

    Each row of the table is a group with one input. Rows that no task uses keep the average. A subclass may offset the
    indices or scale the output (learned positions, scaled words): what it looks up is seen when it runs.
    """

    name = "embedding"

    def matches(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and set(module._parameters) == {"weight"}

    def key(self, module: nn.Module) -> Hashable:
        return id(module)  # what is looked up may depend on more than the input

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        assert isinstance(module, nn.Embedding)
        one_hot = F.one_hot(self._indices(module, args, kwargs), module.num_embeddings)
        yield one_hot.unsqueeze(-1).to(torch.float32), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return own_parameter(layer, "weight")[:, :, None]

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight[:, :, 0]}

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        assert isinstance(module, nn.Embedding)
        if type(module).forward is nn.Embedding.forward:
            return None
        lookups = _Lookups(module.weight)
        with lookups:
            output = type(module).forward(module, *args, **kwargs)
        if len(lookups.indices) == 1 and isinstance(output, Tensor):
            tolerance = max(4 * torch.finfo(output.dtype).eps, 1e-4)
            plain, output = module.weight[lookups.indices[0]].float(), output.float()
            if output.shape == plain.shape:
                scale = (output * plain).sum() / plain.square().sum()
                if bool((output - scale * plain).abs().amax() <= tolerance * output.abs().amax()):
                    return None
        return "its output is not a multiple of rows of its table"

    def gather(
        self,
        module: nn.Module,
        statistics: InputStatistics,
        merged: Call,
        expert: Call | None,
        weight: Tensor,
        keep: Tensor | None,
    ) -> bool:
        # Counted rather than through `rows`: a one-hot row has as many entries as the vocabulary.
        assert isinstance(module, nn.Embedding)
        ids = self._indices(module, *merged)
        index = kept(keep, ids.shape)
        ids = ids.flatten() if index is None else ids.flatten()[index]
        counts = torch.bincount(ids, minlength=module.num_embeddings).to(torch.float32)[:, None, None]
        statistics.gram = counts if statistics.gram is None else statistics.gram.add_(counts)
        statistics.rows += len(ids)
        return expert is not None

    @staticmethod
    def _indices(module: nn.Embedding, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if type(module).forward is nn.Embedding.forward:
            return first(args, kwargs).long()
        lookups = _Lookups(module.weight)
        with lookups:
            type(module).forward(module, *args, **kwargs)
        return lookups.indices[0].long()


class _Lookups(TorchFunctionMode):
    """Notes the indices that are looked up in a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table, self.indices = table, list[Tensor]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding and args[1] is self.table:
            self.indices.append(args[0])
        return func(*args, **(kwargs or {}))
