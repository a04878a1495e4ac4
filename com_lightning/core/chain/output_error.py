"""The error of a merged layer's output, or of the sum that the output is added to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.layers import RowMask, rows_with_data
from com_lightning.core.sweep.task import BatchId, ForwardId


@dataclass
class OutputError:
    """Squared distance between the outputs of merged model and expert at one layer, summed over batches.

    Attributes:
        waiting: outputs whose counterpart in the other model is not known yet.
        error: sum of the squared distances.
        energy: sum of the squares of the expert's outputs.
    """

    waiting: dict[BatchId, Tensor] = field(default_factory=dict)
    error: Tensor | None = None
    energy: Tensor | None = None
    _spare: Tensor | None = None
    """Memory of an old copy, for reuse: to allocate memory for each batch takes longer than to fill it."""

    def add(self, forward: ForwardId, output: Any, mask: RowMask | None) -> None:
        """Add an output. The second output of a batch is compared with the first, from the other model.

        Args:
            forward: the forward that computed the output.
            output: the layer's output. Anything but a tensor of floating-point numbers is ignored.
            mask: tells which rows of the output are data.
        """
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return
        output = output.detach()  # a module may differentiate in its forward
        other = self.waiting.pop(forward.batch, None)
        if other is None:
            self.waiting[forward.batch] = self._copy(output)
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
        difference = other.sub_(output)  # in place, because `other` is a copy
        error = torch.linalg.vector_norm(difference).square()
        if not bool((error + energy).isfinite()):  # masked attention scores, or squares that overflow
            is_finite = difference.isfinite() & output.isfinite()
            difference, output = difference[is_finite].double(), output[is_finite].double()
            error, energy = difference.square().sum(), (output if from_expert else output + difference).square().sum()
        self.error = error if self.error is None else self.error + error
        self.energy = energy if self.energy is None else self.energy + energy

    def sums(self) -> tuple[float, float] | None:
        """Return error and energy so far; ``None`` if no outputs were compared."""
        return None if self.error is None or self.energy is None else (float(self.error), float(self.energy))

    def _copy(self, output: Tensor) -> Tensor:
        """Copy an output, because an activation may change it in place."""
        spare, self._spare = self._spare, None
        if spare is None or (spare.shape, spare.dtype, spare.device) != (output.shape, output.dtype, output.device):
            return output.clone()
        return spare.copy_(output)


def relative_error(sums: Sequence[tuple[float, float] | None]) -> float | None:
    """Return error over energy from the :meth:`OutputError.sums` of all processes; ``None`` if all of them are."""
    pairs = [pair for pair in sums if pair is not None]
    if not pairs:
        return None
    error, energy = (sum(pair[number] for pair in pairs) for number in range(2))
    return error / max(energy, 1e-30)
