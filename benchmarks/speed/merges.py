"""Merges of the vision tower of CLIP ViT-B/32, against their floor and against FusionBench's RegMean++ (git head).

The floor consists of the forwards (twice if the rule is two-sided), of one matrix product for the Gram matrix of each
distinct input, and of one Cholesky factorisation and its solves for each. Each of these is timed alone, in plain
PyTorch. FusionBench merges the linear layers of the blocks; this library also merges the patch embedding and the
normalisations. All are timed in turn, each in its own process.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict

from benchmarks.speed import floor
from benchmarks.speed.contenders import OURS, RULES, THEIRS
from benchmarks.speed.timing import Timed, in_a_process, in_turn, ratios, spread
from benchmarks.speed.tower import Tower

Measured = dict[str, dict[str, list[float]]]
"""Name -> ``seconds`` of each repeat and, for merges, ``peak`` memory in bytes."""


def run(tower: Tower, repeats: int, threads: int) -> Measured:
    """Time all in turn; FusionBench only if it is installed."""
    names = [*floor.PARTS, *OURS, THEIRS]
    if importlib.util.find_spec("fusion_bench") is None:
        message = "FusionBench is not installed and is left out; pip install a clone of its repository to include it"
        print(message, file=sys.stderr)
        names.remove(THEIRS)
    peaks: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str) -> Timed:
        def seconds() -> float:
            sizes = [part for key, value in asdict(tower).items() for part in (f"--{key}", value)]
            measured = in_a_process("benchmarks.speed.contenders", name, *sizes, "--threads", threads)
            peaks[name].append(measured.get("peak", 0.0))
            return measured["seconds"]

        return seconds

    seconds = in_turn({name: timed(name) for name in names}, repeats, "merges")
    whole = len(next(iter(seconds.values())))
    return {
        name: {"seconds": values, **({} if name in floor.PARTS else {"peak": peaks[name][:whole]})}
        for name, values in seconds.items()
    }


def floors(measured: Measured) -> dict[str, list[float]]:
    """Rule -> seconds of its floor in each repeat."""
    parts = [measured[name]["seconds"] for name in floor.PARTS]
    streams = {name: len(rule.streams) for name, rule in RULES.items()}
    return {
        name: [streams[name] * forwards + products + solves for forwards, products, solves in zip(*parts)]
        for name in RULES
    }


def rows(measured: Measured) -> list[list[str]]:
    """The rows of a table."""
    bounds, theirs = floors(measured), measured.get(THEIRS)
    lines = [["", "seconds", "/ its floor", "times as fast as FusionBench", "peak memory, GiB", "times FusionBench's"]]
    for name, values in measured.items():
        line = [name, spread(values["seconds"])]
        line.append(spread(ratios(values["seconds"], bounds[name])) if name in bounds else "")
        line.append(spread(ratios(theirs["seconds"], values["seconds"])) if theirs and name in OURS else "")
        line.append(spread([size / 2**30 for size in values["peak"]]) if "peak" in values else "")
        line.append(spread(ratios(values["peak"], theirs["peak"])) if theirs and name in OURS else "")
        lines.append(line)
    return [*lines, *([f"floor, {name}", spread(values), "", "", "", ""] for name, values in bounds.items())]
