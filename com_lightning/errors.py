"""Errors and warnings of a merge, and how errors of other libraries are put into words."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class MergeError(ValueError):
    """Everything that prevents a merge, in one error."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count}:\n" + "\n".join(f"  {n}. {p}" for n, p in enumerate(problems, 1)))


class MergeWarning(UserWarning):
    """Something is odd about an expert, but does not prevent a merge."""


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the texts of each :class:`MergeWarning` instead of showing them. Other warnings are shown as always."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MergeWarning)
        yield texts
    for warning in caught:
        if isinstance(warning.message, MergeWarning):
            texts.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def some(keys: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first few of many names as text, and how many more there are."""
    return separator.join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def reason(error: Exception) -> str:
    """Return an error in one line. If torch lists keys, the first ones are named, and the others are counted.

    Example::

        >>> from torch import nn
        >>> try:
        ...     nn.Linear(2, 3).load_state_dict(nn.Linear(2, 4).state_dict())
        ... except RuntimeError as error:
        ...     reason(error)
        'RuntimeError: weight is (4, 2), in the model (3, 2) and 1 more'
    """
    text = " ".join(str(error).split())
    shape = r"torch\.Size\(\[([\d, ]*)\]\)"
    sizes = re.findall(rf"size mismatch for (\S+): copying a param with shape {shape}.*?model is {shape}", text)
    if sizes:
        name, theirs, ours = sizes[0]
        text = f"{name} is ({theirs}), in the model ({ours})" + (f" and {len(sizes) - 1} more" if sizes[1:] else "")
    else:
        text = re.sub(
            r'("[^"\s]+", "[^"\s]+")((?:, "[^"\s]+")+)', lambda m: f"{m[1]} and {m[2].count(', ')} more", text
        )
    return f"{type(error).__name__}: {text}"
