"""Timing in turn, so that a machine that slows down affects all contenders alike; ratios, and growth of cost."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence

Timed = Callable[[], float]
"""A function that returns the seconds that its work took."""


def in_turn(things: Mapping[str, Timed], repeats: int, what: str) -> dict[str, list[float]]:
    """Time several things in turn, in the opposite order every other time. Ctrl-C ends it and keeps complete repeats.

    Args:
        things: name -> what to time.
        repeats: how often.
        what: name of the measurement, for progress messages.

    Returns:
        Name -> seconds of each repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in things}
    for repeat in range(repeats):
        try:
            for name in things if repeat % 2 == 0 else reversed(list(things)):
                seconds[name].append(things[name]())
        except KeyboardInterrupt:
            if not repeat:
                raise
            return {name: values[:repeat] for name, values in seconds.items()}
        latest = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in seconds.items())
        print(f"{what}, {repeat + 1} of {repeats}: {latest}", file=sys.stderr, flush=True)
    return seconds


def in_a_process(module: str, *arguments: object) -> dict[str, float]:
    """Run a module of the benchmark in its own process, and read the JSON in the last line that it prints."""
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments[0]} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios of values from the same repeat."""
    return [a / b for a, b in zip(above, below)]


def spread(values: Sequence[float]) -> str:
    """Median, with the smallest and the largest value.

    Example::

        >>> spread([3.0, 1.0, 2.0])
        '2.00 (1.00 to 3.00)'
    """
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The power of the size with which cost grows: the slope of a straight line through the logarithms.

    Example::

        >>> exponent([1, 2, 4], [3, 12, 48])
        2.0
    """
    x, y = ([math.log(value) for value in values] for values in (sizes, seconds))
    return statistics.linear_regression(x, y).slope
