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

    def add(self, place: tuple[int, int], output: Any, keep: Tensor | None, from_expert: bool) -> None:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        other = self.waiting.pop(place, None)
        if other is None:
            self.waiting[place] = output.clone()  # an activation may change it in place
            return
        expert, merged = (output, other) if from_expert else (other, output)
        if expert.shape != merged.shape:
            return
        index = kept(keep, expert.shape[:-1])
        if index is not None:
            expert, merged = expert.flatten(0, -2)[index], merged.flatten(0, -2)[index]
        expert, merged = expert.float(), merged.float()
        error, energy = (torch.linalg.vector_norm(values).square() for values in (merged - expert, expert))
        if not bool((error + energy).isfinite()):  # scores that a mask has ruled out, or squares that overflow
            counted = merged.isfinite() & expert.isfinite()
            expert, merged = expert[counted].double(), merged[counted].double()
            error, energy = (merged - expert).square().sum(), expert.square().sum()
        self.error = error if self.error is None else self.error + error
        self.energy = energy if self.energy is None else self.energy + energy

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
