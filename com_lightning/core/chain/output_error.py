"""How far a layer's output, or the sum that it goes into, is from that of the experts once it is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.layers import kept


@dataclass
class OutputError:
    """Squared distance between the outputs of merged model and expert at one layer, summed as they come in."""

    waiting: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    error: Tensor | None = None
    energy: Tensor | None = None
    _spare: Tensor | None = None
    """Memory of a copy that has been compared: to get new one for each batch takes longer than to fill it."""

    def add(self, place: tuple[int, int], output: Any, keep: Tensor | None, from_expert: bool) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        output = output.detach()  # a module may differentiate in its forward
        other = self.waiting.pop(place, None)
        if other is None:
            self.waiting[place] = self._copied(output)
            return
        self._spare = other
        if other.shape != output.shape:
            return
        index = kept(keep, output.shape[:-1])
        if index is not None:
            output, other = output.flatten(0, -2)[index], other.flatten(0, -2)[index]
        output, other = output.float(), other.float()
        energy = torch.linalg.vector_norm(output if from_expert else other).square()
        gap = other.sub_(output)  # a copy, of which nothing else is needed
        error = torch.linalg.vector_norm(gap).square()
        if not bool((error + energy).isfinite()):  # scores that a mask has ruled out, or squares that overflow
            counted = gap.isfinite() & output.isfinite()
            gap, output = gap[counted].double(), output[counted].double()
            error, energy = gap.square().sum(), (output if from_expert else output + gap).square().sum()
        self.error = error if self.error is None else self.error + error
        self.energy = energy if self.energy is None else self.energy + energy

    def _copied(self, output: Tensor) -> Tensor:
        """A copy: an activation may change the output in place."""
        spare, self._spare = self._spare, None
        if spare is None or (spare.shape, spare.dtype, spare.device) != (output.shape, output.dtype, output.device):
            return output.clone()
        return spare.copy_(output)

    def sums(self) -> tuple[float, float] | None:
        """Error and energy so far, if there were any outputs."""
        return None if self.error is None or self.energy is None else (float(self.error), float(self.energy))

    @classmethod
    def total(cls, sums: Sequence[tuple[float, float] | None]) -> OutputError:
        """Of several processes."""
        known = [part for part in sums if part is not None]
        error, energy = (torch.tensor(sum(part[i] for part in known), dtype=torch.float64) for i in range(2))
        return cls({}, error, energy) if known else cls()

    def relative(self) -> float:
        return 0.0 if self.error is None else float(self.error) / max(float(self.energy or 0.0), 1e-30)
