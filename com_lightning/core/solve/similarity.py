"""How similar the inputs of a layer are to each other, and the importance of tasks that follows from it.

Let ``C`` be the Gram matrix of a task's rows, ``(n, n)``, with each row ``x̂`` scaled to length one: its entries are the
cosines between rows. The similarity of the task at the layer is the root mean square of the off-diagonal,

    S_i² = sum_{j≠k} C_jk² / (n (n - 1))  =  (‖X̂ᵀX̂‖_F² - n) / (n (n - 1))

so it lies between 0 (all rows are orthogonal) and 1 (all lie on one line), and needs no matrix of rows by rows.
Importance by similarity is ``a_i' = a_i S_i / sum_j a_j S_j``: the more similar its rows, the more a task counts.

That importance follows from the off-diagonal of a normalised Gram matrix on the merged model's activations is what
public reviews say of Chain of Merges (arXiv 2508.21421). The formulas are our reading of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def similarity(unit_gram: Tensor, unit_rows: Tensor) -> float | None:
    """Return the root mean square of the cosines between different rows.

    Args:
        unit_gram: ``X̂ᵀX̂`` of rows of length one, for each group of the layer, ``(g, f, f)``.
        unit_rows: number of these rows in each group, ``(g,)``.

    Returns:
        The mean is over all pairs of rows of one group, in all groups. ``None``: no group has two rows.

    Example: of two equal rows and one that is orthogonal to them, one pair of three has a cosine of one.

        >>> import torch
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> round(similarity((rows.T @ rows)[None], torch.tensor([3.0])) ** 2, 3)
        0.333
    """
    rows = unit_rows.double()
    pairs = float((rows * (rows - 1)).sum())
    if pairs <= 0:
        return None
    squares = float(unit_gram.double().square().sum() - rows.sum())
    return math.sqrt(min(max(squares / pairs, 0.0), 1.0))  # rounding can lead out of this range


def by_similarity(importance: Sequence[float], similarities: Sequence[float | None]) -> list[float]:
    """Return the importance of tasks in proportion to their similarity, with a sum of one.

    Args:
        importance: of each task, with a sum of one.
        similarities: of each task. One that is not known counts as the mean of the others. If none is known, or all are
            zero, the importance stays as it is.

    Returns:
        The importance of each task.

    Example::

        >>> by_similarity([0.5, 0.5], [0.75, 0.25])
        [0.75, 0.25]
    """
    known = [value for value in similarities if value is not None]
    mean = sum(known) / len(known) if known else 0.0
    shares = [share * (mean if value is None else value) for share, value in zip(importance, similarities)]
    total = sum(shares)
    return [share / total for share in shares] if total > 0 else list(importance)
