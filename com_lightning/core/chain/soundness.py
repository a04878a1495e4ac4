"""Checks that statistics and solutions are finite, and describes those that are not."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from com_lightning.core.solve.statistics import InputSums
from com_lightning.core.sweep.bad_batches import BadBatch
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.task import BatchId, NonFiniteError
from com_lightning.core.tensors.modules import all_finite


def is_sound(sums: InputSums, smallest: float = 0.0) -> bool:
    """Whether all sums are finite, and the sum of squares is zero or at least ``smallest``: below, it is inexact."""
    if sums.gram is None:
        return True
    trace = sums.gram.diagonal(dim1=-2, dim2=-1).sum(dtype=torch.float64)
    norms = sums.drift_norms
    values: list[Tensor | float] = [trace, norms.distance, norms.energy, norms.cosine]
    if sums.drift is not None:
        values.append(sums.drift.sum(dtype=torch.float64))
    for moments in (sums.moments, sums.expert_moments):
        values += [torch.as_tensor(moments.square).sum()]
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=trace.device) for value in values])
    total, squares = torch.stack([stacked.sum(), trace]).tolist()  # together, to wait for the device only once
    return math.isfinite(total) and not 0.0 < squares < smallest


def describe_bad_inputs(
    batch: BatchId, pair: tuple[PausedCall, PausedCall | None], stream_drift: Tensor | None
) -> BadBatch:
    """Find out why the sums of a batch are not finite, and in which model.

    Args:
        batch: the batch.
        pair: the merged model's forward, and the expert's if it is used.
        stream_drift: drift of the residual stream that the layer repairs, if it repairs one.

    Returns:
        The batch, with the model and the reason.
    """
    tensors = {call.forward.label: _floating(call) for call in pair if call is not None}
    broken = [label for label, values in tensors.items() if not all(bool(t.isfinite().all()) for t in values)]
    if broken:
        return BadBatch(batch, broken[0], "hold NaN or infinity")
    label = pair[0].forward.label
    if stream_drift is not None and not bool(stream_drift.isfinite().all()):
        return BadBatch(batch, label, "are finite, but the residual stream that its output is added to is not")
    largest = max((float(t.abs().amax()) for values in tensors.values() for t in values if t.numel()), default=0.0)
    return BadBatch(batch, label, f"are finite (at most {largest:.3g}), but the statistics computed from them are not")


def check_solution(layer: Layer, values: Mapping[str, Tensor], merged: Mapping[str, Tensor]) -> None:
    """Check that a solution is finite in the precision that it is stored in.

    Args:
        layer: the layer that was solved.
        values: name of each of its parameters and buffers -> solution.
        merged: full name -> tensor that the solution is written to.

    Raises:
        NonFiniteError: if it is not. The message names the layer, and says what to do.
    """
    for name, value in values.items():
        dtype = merged[layer.parts[name].name].dtype
        if not all_finite(value.to(dtype)):
            largest = float(value.nan_to_num(0.0).abs().amax())
            raise NonFiniteError(
                f"the solution of layer '{layer.name}' holds NaN or infinity: {name}, with values up to {largest:.3g}, "
                f"is stored in {dtype}. Merge in a wider precision (the trainer's), or raise the ridge"
            )


def _floating(call: PausedCall) -> list[Tensor]:
    values = (*call.args, *call.kwargs.values())
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
