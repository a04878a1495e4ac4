"""The drift of residual streams. A layer whose output is added to a stream can repair it."""

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
        role: whether the tensor is an input or an output.
        layer: the layer that has it as input or output.
        swapped: whether its first two dimensions are swapped, compared to the output that is added to it. This happens
            in modules with positions first.
    """

    role: Literal["input", "output"]
    layer: str
    swapped: bool = False

    def __str__(self) -> str:
        return f"{self.role} of {self.layer}"


class ResidualStreams:
    """Follows the residual streams in the forwards of a merge: the tensors that outputs of layers are added to.

    It does not keep tensors alive. A tensor that has been changed in place counts as gone.

    Args:
        writers: layer -> the tensors whose sum its output is added to, see
            :func:`~com_lightning.core.chain.find_residuals.find_residuals`.
    """

    def __init__(self, writers: Mapping[str, Sequence[Source]]) -> None:
        self.writers = writers
        self._seen: dict[tuple[str, str], dict[ForwardId, tuple[weakref.ref[Tensor], int]]] = {
            (source.role, source.layer): {} for sources in writers.values() for source in sources
        }
        self._ready: set[BatchId] = set()
        """Batches for which the stream at the present layer is known in both models."""

    def enter(self, layer: str, inputs: Mapping[ForwardId, Any]) -> None:
        """Note the inputs of a layer, at which all forwards that reach it wait."""
        for forward, value in inputs.items():
            self._note("input", layer, forward, value)
        self._ready = {f.batch for f in inputs if layer in self.writers and self._is_known(layer, f.batch)}

    def leave(self, layer: str, forward: ForwardId, output: Any) -> Any:
        """Note the output of the layer in one forward. Return the output, plus the stream that the layer repairs."""
        self._note("output", layer, forward, output)
        sources = self._sources(layer, forward) if forward.batch in self._ready else None
        if not sources or not isinstance(output, Tensor) or sources[0].numel() != output.numel():
            return output
        return sum((_wide(source).reshape(output.shape) for source in sources), output)

    def drift(self, layer: str, batch: BatchId, exact: bool = False) -> Tensor | None:
        """Compute the drift ``r - r̂`` of the stream from the expert to the merged model.

        Args:
            layer: the layer whose output is added to the stream.
            batch: the batch.
            exact: compute in float64, else in the stream's precision or float32.

        Returns:
            The drift, with its elements in the order of the layer's output. ``None`` if it is not known.
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
        """Whether all sources of a layer exist in both models, with the same shapes."""
        expert = self._alive(layer, ForwardId(batch, "expert"))
        merged = self._alive(layer, ForwardId(batch, "merged"))
        if expert is None or merged is None:
            return False
        same_shapes = all(theirs.shape == ours.shape for theirs, ours in zip(expert, merged))
        return same_shapes and len({source.numel() for source in expert}) == 1

    def _sources(self, layer: str, forward: ForwardId) -> list[Tensor] | None:
        """The sources of a layer in a forward, with dimensions in the order of its output. ``None``: one is gone."""
        tensors = self._alive(layer, forward)
        if tensors is None:
            return None
        return [t.transpose(0, 1) if s.swapped and t.dim() > 1 else t for s, t in zip(self.writers[layer], tensors)]

    def _alive(self, layer: str, forward: ForwardId) -> list[Tensor] | None:
        """The sources as they are. Nothing is computed with them, because they may have been paged out."""
        tensors = []
        for source in self.writers.get(layer, ()):
            reference, version = self._seen[source.role, source.layer].get(forward, (None, 0))
            tensor = reference() if reference is not None else None
            if tensor is None or private_torch.version(tensor) != version:
                return None
            tensors.append(tensor)
        return tensors


def _wide(tensor: Tensor, exact: bool = False) -> Tensor:
    return tensor.to(torch.float64 if exact else torch.promote_types(tensor.dtype, torch.float32))
