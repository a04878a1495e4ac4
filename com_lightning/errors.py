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


@contextmanager
def paths_told(label: str) -> Iterator[None]:
    """Turn what the system or Python says of a path that cannot be used into a MergeError.

    Its name may be too long or hold a zero byte, it may be a circle of links, or reading it may not be permitted.

    Args:
        label: names the path in the message.

    Raises:
        MergeError: naming the path and the reason.
        ValueError: any other than that of a zero byte, as it is.

    Example::

        >>> from pathlib import Path
        >>> with paths_told("base"):
        ...     (Path("x" * 5000) / "config.json").is_file()
        Traceback (most recent call last):
        ...
        com_lightning.errors.MergeError: one problem:
          1. base: File name too long
    """
    try:
        yield
    except OSError as error:
        raise MergeError([f"{label}: {error.strerror or error}"]) from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise MergeError([f"{label}: the name holds a zero byte"]) from error


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
