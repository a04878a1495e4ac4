"""Where the time of a merge goes: seconds of each part. The time of a part within another one is not counted twice.

The model is the vision tower of CLIP ViT-B/32, as in the comparison with FusionBench. Forwards are those of the merged
model and, if the rule is two-sided, of the experts. Each merge runs in its own process.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch

from benchmarks.speed.contenders import CONTENDERS, RULES
from benchmarks.speed.timing import in_a_process, in_turn
from benchmarks.speed.tower import Tower
from com_lightning.core.chain import chain
from com_lightning.core.chain import gather as gathering
from com_lightning.core.chain.output_error import OutputError
from com_lightning.core.chain.residual_stream import ResidualStreams
from com_lightning.core.solve import statistics as gathered
from com_lightning.core.sweep import lockstep

PARTS: dict[str, list[tuple[Any, str]]] = {
    "forwards": [(lockstep._Coroutine, "advance")],
    "Gram matrices and drifts": [(gathered, "add_product")],
    "drifts multiplied by weights": [(gathered, "outputs")],
    "rows scaled and compared": [(gathered.InputSums, "update")],
    "drift of residual streams": [(ResidualStreams, "drift"), (ResidualStreams, "leave")],
    "outputs compared": [(OutputError, "add")],
    "solving": [(chain.LayerSolver, "_solve")],
    "sums checked": [(gathering, "is_sound")],
}
"""Part -> its functions, each as the place where callers look it up, and its name there."""
REST = "all else"
Measured = dict[str, dict[str, list[float]]]
"""Rule -> part -> seconds in each repeat."""


class Timers:
    """Seconds of parts, where the time of an inner part does not count for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its time counts for a part."""

        @functools.wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return wrapped

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Time all functions of :data:`PARTS` while the context is open."""
        with ExitStack() as stack:
            for part, functions in PARTS.items():
                for holder, name in functions:
                    stack.enter_context(mock.patch.object(holder, name, self.timed(part, getattr(holder, name))))
            yield


def merge(name: str, tower: Tower) -> dict[str, float]:
    """Merge in this process. Returns the seconds of each part, and of all parts together."""
    timers, measured = Timers(), dict[str, float]()
    with timers.watching():
        CONTENDERS[name](tower, measured)
    rest = measured["seconds"] - sum(timers.seconds.values())
    return {
        **{part: timers.seconds[part] for part in PARTS if part in timers.seconds},
        REST: rest,
        "all": measured["seconds"],
    }


def run(tower: Tower, repeats: int, threads: int) -> Measured:
    """Time both rules in turn."""
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in RULES}

    def timed(name: str) -> Callable[[], float]:
        def seconds() -> float:
            sizes = [part for key, value in asdict(tower).items() for part in (f"--{key}", value)]
            parts[name].append(in_a_process("benchmarks.speed.breakdown", name, *sizes, "--threads", threads))
            return parts[name][-1]["all"]

        return seconds

    whole = min(map(len, in_turn({name: timed(name) for name in RULES}, repeats, "breakdown").values()))
    return {name: {part: [one[part] for one in values[:whole]] for part in values[0]} for name, values in parts.items()}


def rows(measured: Measured) -> list[list[str]]:
    """The rows of a table: medians, and their share of the whole."""
    lines = [["part", *(f"{name}, {unit}" for name in measured for unit in ("s", "%"))]]
    for part in [*PARTS, REST, "all"]:
        line = [part]
        for values in measured.values():
            seconds = statistics.median(values[part]) if part in values else None
            whole = statistics.median(values["all"])
            line += ["", ""] if seconds is None else [f"{seconds:.1f}", f"{100 * seconds / whole:.0f}"]
        lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", choices=RULES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for field, value in asdict(Tower()).items():
        parser.add_argument(f"--{field}", type=int, default=value)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    print(json.dumps(merge(options.pop("name"), Tower(**options))))


if __name__ == "__main__":
    main()
