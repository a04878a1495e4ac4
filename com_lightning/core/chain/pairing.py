"""Finds out whether the rows of two inputs belong together, or come in another order.

In a detector, the rows of the box head are proposals, sorted by score. The merged model sorts them otherwise than the
expert, so row k of one is another box than row k of the other. A layer that is fitted on such pairs learns nonsense.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

SAMPLE = 32
"""Number of rows that are looked for."""
WINDOW = 1024
"""Number of rows among which they are looked for. Rows that change places are near each other: in one image."""
NEAR = 0.98
"""Rows with at least this cosine are the same row in two models."""
GAP = 0.1
"""A row is in another place if its cosine with the row there is greater than with its own counterpart by this."""
MOVED = 0.1
"""Rows are permuted if at least this share of them is in another place..."""
FOUND = 0.4
"""... and at least this share is found at all. If not, the models have drifted apart, and rows are alike by chance."""
DIRECTIONS = 8.0
"""A row counts if it has so many numbers that differ from zero: rows of few numbers are alike by chance."""


def are_permuted(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether many rows of the merged model's input stand at another place in the expert's.

    Args:
        ours: the rows of the merged model, ``(n, f)``.
        theirs: the rows of the expert, ``(n, f)``.

    Example::

        >>> rows = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
        >>> are_permuted(rows, rows), are_permuted(rows, rows.flip(0)), are_permuted(rows, -rows)
        (False, True, False)
    """
    count = min(len(ours), WINDOW)
    places = torch.arange(0, count, max(count // SAMPLE, 1), device=ours.device)[:SAMPLE]
    sample, paired = ours[places].float(), theirs[places].float()
    squares = sample.square()
    # (Σ x²)² / Σ x⁴: the number of entries, if all of those that are not zero have one size
    counts = squares.sum(1).square() / squares.square().sum(1).clamp_min(1e-30) >= DIRECTIONS
    sample, paired = normalize(sample[counts], dim=1), normalize(paired[counts], dim=1)
    own, least = (sample * paired).sum(1), max(MOVED * len(places), 2)
    if int((own < 1 - GAP).sum()) < least:  # nearly always
        return False
    best, where = (sample @ normalize(theirs[:count].float(), dim=1).T).max(1)
    if int((best >= NEAR).sum()) < FOUND * len(sample):
        return False
    moved = (best >= NEAR) & (best - own >= GAP)
    # Different rows stand at different places. If they are all like one and the same row, they have lost their content.
    return len(set(where[moved].tolist())) >= least
