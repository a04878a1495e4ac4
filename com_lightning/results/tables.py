"""Text tables in Markdown and formats of numbers, for all reports of the package."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

_ERROR_WORDS = ("loss", "perplexity", "error")
_ERROR_ABBREVIATIONS = {"bpb", "bpc", "cer", "err", "mae", "mape", "mse", "nll", "ppl", "rmse", "wer"}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table. The first row is the head; columns of numbers are aligned to the right.

    Args:
        rows: Cells of each row; all rows have the same length.

    Returns:
        The table as Markdown, without a newline at its end.

    Example::

        >>> print(table([["task", "value"], ["a", "0.5"], ["b", "-"]]))
        | task | value |
        | :--- | ----: |
        | a    |   0.5 |
        | b    |     - |
    """
    head, *body = rows
    widths = [max(map(len, column)) for column in zip(*rows)]
    is_text = [not any(row[c][:1] in {*"0123456789-."} for row in body if row[c]) for c in range(len(head))]
    rule = [f":{'-' * (w - 1)}" if text else f"{'-' * (w - 1)}:" for w, text in zip(widths, is_text)]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(row, widths, is_text)]
        return f"| {' | '.join(cells)} |"

    return "\n".join(map(line, [head, rule, *body]))


def number(value: float | None) -> str:
    """Four decimals, or an exponent for very small and very large values; ``-`` for ``None``."""
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) >= 1e4 or 0 < abs(value) < 1e-3 else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A ratio in percent, with one decimal; ``-`` for ``None``."""
    return "-" if value is None else f"{100 * value:.1f} %"


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of all values that are not ``None``; ``None`` if there are none."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if numbers else None


def lower_is_better(metric: str) -> bool:
    """Guess from the name of a metric whether lower values are better.

    Returns:
        The guess.

    Example::

        >>> lower_is_better("val_loss"), lower_is_better("test/wer"), lower_is_better("val_acc")
        (True, True, False)
    """
    name = metric.lower()
    return any(word in name for word in _ERROR_WORDS) or not _ERROR_ABBREVIATIONS.isdisjoint(re.split("[^a-z]+", name))


def labelled(metric: str | None, lower: bool) -> str:
    """Name a metric, and say so if lower values are better.

    Args:
        metric: Its name.
        lower: Whether lower values are better.

    Returns:
        The words.

    Example::

        >>> labelled("val_ppl", lower=True), labelled("val_acc", lower=False)
        ('val_ppl, lower is better', 'val_acc')
    """
    return f"{metric}, lower is better" if lower else str(metric)


def share_of_expert(value: float | None, expert: float | None, lower: bool) -> float | None:
    """How much of its expert a model keeps: 1 is as good as the expert, less is worse, for every metric.

    Args:
        value: The model's metric.
        expert: That of the expert.
        lower: Whether lower values are better. Then the share is ``expert / value``, else ``value / expert``.

    Returns:
        The share; ``None`` if a value is missing, or not above 0 where that makes a ratio meaningless.

    Example::

        >>> share_of_expert(0.4, 0.8, lower=False), share_of_expert(12.5, 10.0, lower=True)
        (0.5, 0.8)
    """
    if value is None or expert is None or expert <= 0 or (lower and value <= 0):
        return None
    return expert / value if lower else value / expert


def share_column(model: str, lower: bool) -> str:
    """How :func:`share_of_expert` is computed, in words.

    Returns:
        The head of its column.

    Example::

        >>> share_column("merged", lower=False), share_column("merged", lower=True)
        ('merged / expert', 'expert / merged')
    """
    return f"expert / {model}" if lower else f"{model} / expert"


def finite(value: Any) -> Any:
    """Replace NaN and infinity by ``None`` in nested dicts and lists, because JSON has no word for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value
