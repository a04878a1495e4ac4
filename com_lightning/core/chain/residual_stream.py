"""What the streams that layers write to lack in the merged model, for these layers to make up for."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from com_lightning.core.sweep.task import Stream
from com_lightning.core.tensors import private_torch

Where = tuple[int, int, Stream]
"""Task, batch and stream of a forward."""


@dataclass(frozen=True)
class Source:
    """A tensor that the output of a layer is added to: what a layer, that one perhaps, is given or gives.

    Attributes:
        role, layer: the input or the output of which layer.
        swapped: whether its first two dimensions are in the other order than those of the writer's output (in a module
            that has positions first, say).
    """

    role: Literal["input", "output"]
    layer: str
    swapped: bool = False

    def __str__(self) -> str:
        return f"{self.role} of {self.layer}"


class Corrections:
    """Follows, in the forwards of a merge, the tensors that outputs of layers are added to.

    None is kept alive, and one that has been written to since does not count.

    Args:
        writers: see :func:`~com_lightning.core.chain.find_residuals.find_writers`.
    """

    def __init__(self, writers: Mapping[str, Sequence[Source]]) -> None:
        self.writers = writers
        self._seen: dict[tuple[str, str], dict[Where, tuple[weakref.ref[Tensor], int]]] = {
            (source.role, source.layer): {} for sources in writers.values() for source in sources
        }
        self._ready: set[tuple[int, int]] = set()
        """Task and batch of each forward whose present layer is corrected."""

    def enter(self, layer: str, inputs: Mapping[Where, Any]) -> None:
        """All forwards that get to a layer are there, with these inputs."""
        for where, value in inputs.items():
            self._note("input", layer, where, value)
        self._ready = {where[:2] for where in inputs if layer in self.writers and self._is_known(layer, where[:2])}

    def leave(self, layer: str, where: Where, output: Any) -> Any:
        """A forward has left that layer. Returns the output, with what it is to be added to if that is corrected."""
        self._note("output", layer, where, output)
        sources = self._sources(layer, where) if where[:2] in self._ready else None
        if not sources or not isinstance(output, Tensor) or sources[0].numel() != output.numel():
            return output
        return sum((_wide(source).reshape(output.shape) for source in sources), output)

    def gap(self, layer: str, task: int, batch: int, exact: bool = False) -> Tensor | None:
        """What the stream lacks in the merged model: ``r - r̂``, with its elements in the order of the layer's output.

        ``None`` where it is not known. In float64 if it is to be exact, else in float32 or as it is.
        """
        expert, merged = (self._sources(layer, (task, batch, stream)) for stream in _STREAMS)
        if (task, batch) not in self._ready or not expert or not merged:
            return None
        first, *others = (_wide(one, exact) - _wide(other, exact) for one, other in zip(expert, merged))
        return sum((gap.reshape(first.shape) for gap in others), first)

    def _note(self, role: str, layer: str, where: Where, value: Any) -> None:
        seen = self._seen.get((role, layer))
        if seen is not None and isinstance(value, Tensor) and not value.is_inference():
            seen[where] = (weakref.ref(value), private_torch.version(value))

    def _is_known(self, layer: str, place: tuple[int, int]) -> bool:
        """Whether all sources of a writer are there, in both models, and alike."""
        expert, merged = (self._living(layer, (*place, stream)) for stream in _STREAMS)
        if expert is None or merged is None:
            return False
        alike = all(one.shape == other.shape for one, other in zip(expert, merged))
        return alike and len({source.numel() for source in expert}) == 1

    def _sources(self, layer: str, where: Where) -> list[Tensor] | None:
        """Those of a writer in a forward, as its output has its dimensions; ``None`` if one is gone."""
        living = self._living(layer, where)
        if living is None:
            return None
        return [t.transpose(0, 1) if s.swapped and t.dim() > 1 else t for s, t in zip(self.writers[layer], living)]

    def _living(self, layer: str, where: Where) -> list[Tensor] | None:
        """Those as they are. Nothing is computed with them, because they may have been paged out."""
        found = []
        for source in self.writers.get(layer, ()):
            reference, version = self._seen[source.role, source.layer].get(where, (None, 0))
            tensor = reference() if reference is not None else None
            if tensor is None or private_torch.version(tensor) != version:
                return None
            found.append(tensor)
        return found


_STREAMS: tuple[Stream, Stream] = ("expert", "merged")


def _wide(tensor: Tensor, exact: bool = False) -> Tensor:
    return tensor.to(torch.float64 if exact else torch.promote_types(tensor.dtype, torch.float32))
