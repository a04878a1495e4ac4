"""How far a layer's output, or the sum that it goes into, is from the experts' once the layer is merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.layers import rows_with_data
from com_lightning.core.sweep.task import BatchId, ForwardId


@dataclass
class OutputError:
    """Squared distance between the outputs of merged model and expert at one layer, summed as they come in."""

    waiting: dict[BatchId, Tensor] = field(default_factory=dict)
    error: Tensor | None = None
    energy: Tensor | None = None
    _spare: Tensor | None = None
    """Memory of a copy that is no longer needed: to allocate anew for each batch takes longer than to fill it."""

    def add(self, forward: ForwardId, output: Any, mask: Tensor | None) -> None:
        """Take an output, and compare it with that of the other model on the same batch, if that was there first.

        Args:
            forward: whose output it is.
            output: of the layer. Anything but a tensor of floating-point numbers is passed over.
            mask: over positions, ``True`` where data are.
        """
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        output = output.detach()  # a module may differentiate in its forward
        other = self.waiting.pop(forward.batch, None)
        if other is None:
            self.waiting[forward.batch] = self._copied(output)
            return
        self._spare = other
        if other.shape != output.shape:
            return
        index = rows_with_data(mask, output.shape[:-1])
        if index is not None:
            output, other = output.flatten(0, -2)[index], other.flatten(0, -2)[index]
        output, other = output.float(), other.float()
        from_expert = forward.stream == "expert"
        energy = torch.linalg.vector_norm(output if from_expert else other).square()
        difference = other.sub_(output)  # in place: it is a copy that nobody else needs
        error = torch.linalg.vector_norm(difference).square()
        if not bool((error + energy).isfinite()):  # scores that a mask has ruled out, or squares that overflow
            counted = difference.isfinite() & output.isfinite()
            difference, output = difference[counted].double(), output[counted].double()
            error, energy = difference.square().sum(), (output if from_expert else output + difference).square().sum()
        self.error = error if self.error is None else self.error + error
        self.energy = energy if self.energy is None else self.energy + energy

    def sums(self) -> tuple[float, float] | None:
        """Error and energy so far, if there were any outputs."""
        return None if self.error is None or self.energy is None else (float(self.error), float(self.energy))

    def _copied(self, output: Tensor) -> Tensor:
        """A copy, because an activation may change the output in place."""
        spare, self._spare = self._spare, None
        if spare is None or (spare.shape, spare.dtype, spare.device) != (output.shape, output.dtype, output.device):
            return output.clone()
        return spare.copy_(output)


def relative_error(sums: Sequence[tuple[float, float] | None]) -> float | None:
    """Error over energy, from the :meth:`OutputError.sums` of several processes. ``None``: there were no outputs."""
    known = [pair for pair in sums if pair is not None]
    if not known:
        return None
    error, energy = (sum(pair[number] for pair in known) for number in range(2))
    return error / max(energy, 1e-30)
