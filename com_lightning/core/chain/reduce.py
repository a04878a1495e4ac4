"""Adds up the statistics of all processes at the process that solves the layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from com_lightning.core.chain.inputs import LayerInputs
from com_lightning.core.solve.statistics import DriftNorms, InputSums, Moments
from com_lightning.core.sweep.distributed import Peers

_MATRICES = ("gram", "drift", "unit_gram", "unit_rows")
"""The matrices of :class:`~com_lightning.core.solve.statistics.InputSums`."""


def reduce_sums(inputs: LayerInputs | None, peers: Peers, owner: int, device: torch.device) -> None:
    """Add up the statistics of all processes, in place at the owner.

    Args:
        inputs: statistics of this process; ``None`` if none of its forwards has reached the layer.
        peers: the processes. All of them must call this function.
        owner: the process that solves the layer.
        device: device of the matrices, for a process that has none.
    """
    if peers.size == 1:
        return
    summaries = [s for s in peers.exchange(None if inputs is None else _Summary.of(inputs)) if s is not None]
    all_sums: Sequence[InputSums | None] = [None] * len(summaries[0].matrices) if inputs is None else inputs.sums
    for number, sums in enumerate(all_sums):
        for name in _MATRICES:
            formats = [summary.matrices[number][name] for summary in summaries if name in summary.matrices[number]]
            if formats:
                # Statistics are in float64 in a process that had to gather them batch by batch.
                dtype = reduce(torch.promote_types, [dtype for _, dtype in formats])
                matrix: Tensor | None = getattr(sums, name, None)
                matrix = torch.zeros(formats[0][0], dtype=dtype, device=device) if matrix is None else matrix
                matrix = matrix.to(dtype).contiguous()
                peers.add(matrix, owner)
                if sums is not None:
                    setattr(sums, name, matrix)
    if inputs is not None and peers.rank == owner:
        inputs.unpaired = sum(summary.unpaired for summary in summaries)
        inputs.permuted = sum(summary.permuted for summary in summaries)
        inputs.uncorrected = sum(summary.uncorrected for summary in summaries)
        inputs.masked = {name for summary in summaries for name in summary.masked}
        inputs.doubtful = {name for summary in summaries for name in summary.doubtful}
        for number, sums in enumerate(inputs.sums):
            sums.rows = sum(summary.tasks[number].rows for summary in summaries)
            sums.drift_norms, sums.moments, sums.expert_moments = DriftNorms(), Moments(), Moments()
            for task in (summary.tasks[number] for summary in summaries):
                sums.drift_norms.add(task.drift_norms)
                sums.moments.add(task.moments.to(device))
                sums.expert_moments.add(task.expert_moments.to(device))


@dataclass
class _TaskSummary:
    """The statistics of a task without its matrices, on the CPU."""

    rows: int
    drift_norms: DriftNorms
    moments: Moments
    expert_moments: Moments


@dataclass
class _Summary:
    """The statistics of a process without the matrices, small enough to send to all other processes.

    Attributes:
        unpaired, permuted, uncorrected, masked, doubtful: as in :class:`~com_lightning.core.chain.inputs.LayerInputs`.
        matrices: for each task, name of each matrix -> its shape and precision.
        tasks: all other statistics of each task.
    """

    unpaired: int
    permuted: int
    uncorrected: int
    masked: set[str]
    doubtful: set[str]
    matrices: list[dict[str, tuple[torch.Size, torch.dtype]]]
    tasks: list[_TaskSummary]

    @staticmethod
    def of(inputs: LayerInputs) -> _Summary:
        matrices: list[dict[str, Tensor | None]] = [{n: getattr(sums, n) for n in _MATRICES} for sums in inputs.sums]
        formats = [{name: (m.shape, m.dtype) for name, m in entry.items() if m is not None} for entry in matrices]
        tasks = [
            _TaskSummary(sums.rows, sums.drift_norms.cpu(), sums.moments.to("cpu"), sums.expert_moments.to("cpu"))
            for sums in inputs.sums
        ]
        counts = (inputs.unpaired, inputs.permuted, inputs.uncorrected)
        return _Summary(*counts, inputs.masked, inputs.doubtful, formats, tasks)
