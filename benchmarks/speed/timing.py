"""Things timed in turn, so that a machine that slows down slows down all of them; ratios, and how cost grows."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

Timed = Callable[[], float]
"""Does something and returns the seconds that count."""


def in_turn(things: Mapping[str, Timed], repeats: int, what: str) -> dict[str, list[float]]:
    """Seconds of each thing in each repeat; every other time in the opposite order. Ctrl-C ends it after those repeats
    that are complete, if there are any.

    Args:
        things: name -> what to time.
        repeats: how often.
        what: how progress calls it.
    """
    found: dict[str, list[float]] = {name: [] for name in things}
    for repeat in range(repeats):
        try:
            for name in things if repeat % 2 == 0 else reversed(list(things)):
                found[name].append(things[name]())
        except KeyboardInterrupt:
            if not repeat:
                raise
            return {name: values[:repeat] for name, values in found.items()}
        told = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in found.items())
        print(f"{what}, {repeat + 1} of {repeats}: {told}", file=sys.stderr, flush=True)
    return found


def in_a_process(module: str, *arguments: object) -> dict[str, float]:
    """What a module of the benchmark prints, as JSON in its last line, when it is run by itself."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments[0]} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of what was timed in the same repeat."""
    return [a / b for a, b in zip(above, below)]


def spread(values: Sequence[float]) -> str:
    """Median, and from where to where.

    Example::

        >>> spread([3.0, 1.0, 2.0])
        '2.00 (1.00 to 3.00)'
    """
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of the size that cost grows with: the slope of a straight line through the logarithms.

    Example::

        >>> exponent([1, 2, 4], [3, 12, 48])
        2.0
    """
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope
