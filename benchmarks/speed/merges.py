"""Merges of the vision tower of CLIP ViT-B/32, against their floor and against FusionBench's RegMean++ (git head).

The floor is the forwards, twice where the rule is two-sided, one product for the Gram matrix of each distinct input,
and one Cholesky factorisation for each, with what is divided by it; each alone, as plainly as PyTorch does it, by the
library that it takes. FusionBench merges the linear layers of the blocks; ours merge the patch embedding and the
normalisations too. All in turn, each in a process of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import asdict

from benchmarks.speed import floor
from benchmarks.speed.contenders import OURS, RULES, THEIRS
from benchmarks.speed.timing import Timed, in_a_process, in_turn, ratios, spread
from benchmarks.speed.tower import Tower

Found = dict[str, dict[str, list[float]]]
"""Name -> ``seconds``, and of merges ``peak`` in bytes, in each repeat."""


def run(tower: Tower, repeats: int, threads: int) -> Found:
    """Time all in turn; FusionBench only where it is installed."""
    names = [*floor.PARTS, *OURS, THEIRS]
    if importlib.util.find_spec("fusion_bench") is None:
        told = "FusionBench is not installed, and left out: pip install a clone of its repository to have it, too"
        print(told, file=sys.stderr)
        names.remove(THEIRS)
    peaks: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str) -> Timed:
        def seconds() -> float:
            sizes = [part for key, value in asdict(tower).items() for part in (f"--{key}", value)]
            found = in_a_process("benchmarks.speed.contenders", name, *sizes, "--threads", threads)
            peaks[name].append(found.get("peak", 0.0))
            return found["seconds"]

        return seconds

    seconds = in_turn({name: timed(name) for name in names}, repeats, "merges")
    whole = len(next(iter(seconds.values())))
    return {
        name: {"seconds": own, **({} if name in floor.PARTS else {"peak": peaks[name][:whole]})}
        for name, own in seconds.items()
    }


def floors(found: Found) -> dict[str, list[float]]:
    """Rule -> seconds of its floor in each repeat."""
    parts = [found[name]["seconds"] for name in floor.PARTS]
    streams = {name: len(rule.streams) for name, rule in RULES.items()}
    return {
        name: [streams[name] * forwards + products + solves for forwards, products, solves in zip(*parts)]
        for name in RULES
    }


def rows(found: Found) -> list[list[str]]:
    """Of a table."""
    bounds, theirs = floors(found), found.get(THEIRS)
    lines = [["", "seconds", "/ its floor", "times as fast as FusionBench", "peak memory, GiB", "times FusionBench's"]]
    for name, own in found.items():
        line = [name, spread(own["seconds"])]
        line.append(spread(ratios(own["seconds"], bounds[name])) if name in bounds else "")
        line.append(spread(ratios(theirs["seconds"], own["seconds"])) if theirs and name in OURS else "")
        line.append(spread([size / 2**30 for size in own["peak"]]) if "peak" in own else "")
        line.append(spread(ratios(own["peak"], theirs["peak"])) if theirs and name in OURS else "")
        lines.append(line)
    return [*lines, *([f"floor, {name}", spread(values), "", "", "", ""] for name, values in bounds.items())]
