"""How far a layer's output is from what it was solved for, once it is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.layers import kept


@dataclass
class OutputError:
    """Squared distance between the outputs of merged model and expert at one layer, summed as they come in.

    Where a layer also makes up for what the stream lacks that its output is added to, it is that between the sums,
    which is what was solved for; the energy is the output's alone.
    """

    waiting: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    error: Tensor | None = None
    energy: Tensor | None = None

    def add(
        self,
        place: tuple[int, int],
        output: Any,
        keep: Tensor | None,
        from_expert: bool,
        stream: Tensor | None = None,
    ) -> None:
        """Add an output of one of the models; ``stream``: what it is to be added to, where that counts."""
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        total = output if stream is None else output + stream
        other = self.waiting.pop(place, None)
        if other is None:  # an activation may change it in place
            own = output.clone()
            self.waiting[place] = (own, own if stream is None else total)
            return
        (own, expert), merged = ((output, total), other[1]) if from_expert else (other, total)
        if expert.shape != merged.shape:
            return
        index = kept(keep, expert.shape[:-1])
        if index is not None:
            own, expert, merged = (tensor.flatten(0, -2)[index] for tensor in (own, expert, merged))
        own, expert, merged = own.float(), expert.float(), merged.float()
        error, energy = (merged - expert).square().sum(), own.square().sum()
        if not bool((error + energy).isfinite()):  # scores that a mask has ruled out, or squares that overflow
            counted = merged.isfinite() & expert.isfinite() & own.isfinite()
            own, expert, merged = (tensor[counted].double() for tensor in (own, expert, merged))
            error, energy = (merged - expert).square().sum(), own.square().sum()
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
