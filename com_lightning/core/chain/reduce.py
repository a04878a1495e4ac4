"""The statistics of all processes, added up at the one that solves the layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from com_lightning.core.chain.gather import Inputs
from com_lightning.core.solve.statistics import Moments, Shift
from com_lightning.core.sweep.distributed import Peers


def add_up(inputs: Inputs | None, peers: Peers, owner: int, device: torch.device) -> None:
    """Add up the statistics of all processes at one of them. Those that have none pass ``None``."""
    if peers.size == 1:
        return
    met = peers.exchange(None if inputs is None else _Small.of(inputs))
    entries = [] if inputs is None else inputs.statistics
    for number in range(next(len(small.sums) for small in met if small)):
        entry = entries[number] if entries else None
        for which in ("gram", "drift"):
            known = [small.matrices[number][which] for small in met if small and which in small.matrices[number]]
            if known:
                tensor: Tensor | None = getattr(entry, which, None)
                shape = known[0][0]
                dtype = reduce(torch.promote_types, [dtype for _, dtype in known])  # what was gathered anew is float64
                tensor = torch.zeros(shape, dtype=dtype, device=device) if tensor is None else tensor
                tensor = tensor.to(dtype).contiguous()
                peers.add(tensor, owner)
                if entry is not None:
                    setattr(entry, which, tensor)
    if inputs is not None and peers.rank == owner:
        inputs.unpaired = sum(small.unpaired for small in met if small)
        inputs.uncorrected = sum(small.uncorrected for small in met if small)
        inputs.masked = {name for small in met if small for name in small.masked}
        for number, entry in enumerate(entries):
            parts = [small.sums[number] for small in met if small]
            entry.rows = sum(rows for rows, *_ in parts)
            entry.shift, entry.moments, entry.expert_moments = Shift(), Moments(), Moments()
            for _, shift, moments, expert_moments in parts:
                entry.shift.add(shift)
                entry.moments.add(moments.to(device))
                entry.expert_moments.add(expert_moments.to(device))


@dataclass
class _Small:
    """What processes tell each other of their statistics: all but the large matrices.

    Attributes:
        matrices: per task, name of each matrix -> its shape and precision.
        sums: per task, rows, shift and moments.
    """

    unpaired: int
    uncorrected: int
    masked: set[str]
    matrices: list[dict[str, tuple[torch.Size, torch.dtype]]]
    sums: list[tuple[int, Shift, Moments, Moments]]

    @staticmethod
    def of(inputs: Inputs) -> _Small:
        entries = inputs.statistics
        matrices = [{"gram": entry.gram, "drift": entry.drift} for entry in entries]
        return _Small(
            inputs.unpaired,
            inputs.uncorrected,
            inputs.masked,
            [{name: (m.shape, m.dtype) for name, m in own.items() if m is not None} for own in matrices],
            [(e.rows, e.shift.cpu(), e.moments.to("cpu"), e.expert_moments.to("cpu")) for e in entries],
        )
