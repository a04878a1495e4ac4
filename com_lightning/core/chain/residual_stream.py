"""The drift of the residual streams that layers write to, which these layers can repair."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from com_lightning.core.sweep.task import BatchId, ForwardId
from com_lightning.core.tensors import private_torch


@dataclass(frozen=True)
class Source:
    """A tensor that the output of a layer is added to: the input or the output of a layer.

    Attributes:
        role, layer: the input or the output, and of which layer.
        swapped: whether its first two dimensions are in the other order than those of the writer's output (for
            instance in a module that has positions first).
    """

    role: Literal["input", "output"]
    layer: str
    swapped: bool = False

    def __str__(self) -> str:
        return f"{self.role} of {self.layer}"


class ResidualStreams:
    """Follows, in the forwards of a merge, the tensors that outputs of layers are added to.

    It keeps none of them alive. A tensor that was written to since counts as gone.

    Args:
        writers: layer -> what its output is added to, see
            :func:`~com_lightning.core.chain.find_residuals.find_residuals`.
    """

    def __init__(self, writers: Mapping[str, Sequence[Source]]) -> None:
        self.writers = writers
        self._seen: dict[tuple[str, str], dict[ForwardId, tuple[weakref.ref[Tensor], int]]] = {
            (source.role, source.layer): {} for sources in writers.values() for source in sources
        }
        self._ready: set[BatchId] = set()
        """Batches at whose present layer the stream is known in both models."""

    def enter(self, layer: str, inputs: Mapping[ForwardId, Any]) -> None:
        """All forwards that reach a layer wait there, with these inputs."""
        for forward, value in inputs.items():
            self._note("input", layer, forward, value)
        self._ready = {f.batch for f in inputs if layer in self.writers and self._is_known(layer, f.batch)}

    def leave(self, layer: str, forward: ForwardId, output: Any) -> Any:
        """A forward has left that layer. Returns the output, plus the stream where the layer repairs it."""
        self._note("output", layer, forward, output)
        sources = self._sources(layer, forward) if forward.batch in self._ready else None
        if not sources or not isinstance(output, Tensor) or sources[0].numel() != output.numel():
            return output
        return sum((_wide(source).reshape(output.shape) for source in sources), output)

    def drift(self, layer: str, batch: BatchId, exact: bool = False) -> Tensor | None:
        """What the stream lacks in the merged model, ``r - r̂``, with its elements in the order of the layer's output.

        Args:
            layer: that writes to the stream.
            batch: which one.
            exact: compute in float64, else in float32 or as it is.

        Returns:
            The drift. ``None`` where it is not known.
        """
        expert = self._sources(layer, ForwardId(batch, "expert"))
        merged = self._sources(layer, ForwardId(batch, "merged"))
        if batch not in self._ready or not expert or not merged:
            return None
        first, *others = (_wide(theirs, exact) - _wide(ours, exact) for theirs, ours in zip(expert, merged))
        return sum((drift.reshape(first.shape) for drift in others), first)

    def _note(self, role: str, layer: str, forward: ForwardId, value: Any) -> None:
        seen = self._seen.get((role, layer))
        if seen is not None and isinstance(value, Tensor) and not value.is_inference():
            seen[forward] = (weakref.ref(value), private_torch.version(value))

    def _is_known(self, layer: str, batch: BatchId) -> bool:
        """Whether all sources of a writer exist in both models, with the same shapes."""
        expert = self._living(layer, ForwardId(batch, "expert"))
        merged = self._living(layer, ForwardId(batch, "merged"))
        if expert is None or merged is None:
            return False
        same_shapes = all(theirs.shape == ours.shape for theirs, ours in zip(expert, merged))
        return same_shapes and len({source.numel() for source in expert}) == 1

    def _sources(self, layer: str, forward: ForwardId) -> list[Tensor] | None:
        """The sources of a writer in a forward, with dimensions in the order of its output. ``None``: one is gone."""
        living = self._living(layer, forward)
        if living is None:
            return None
        return [t.transpose(0, 1) if s.swapped and t.dim() > 1 else t for s, t in zip(self.writers[layer], living)]

    def _living(self, layer: str, forward: ForwardId) -> list[Tensor] | None:
        """The sources as they are. Nothing is computed with them, because they may have been paged out."""
        living = []
        for source in self.writers.get(layer, ()):
            reference, version = self._seen[source.role, source.layer].get(forward, (None, 0))
            tensor = reference() if reference is not None else None
            if tensor is None or private_torch.version(tensor) != version:
                return None
            living.append(tensor)
        return living


def _wide(tensor: Tensor, exact: bool = False) -> Tensor:
    return tensor.to(torch.float64 if exact else torch.promote_types(tensor.dtype, torch.float32))
