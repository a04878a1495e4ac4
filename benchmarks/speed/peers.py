"""A merge against RegMean++ of FusionBench (git head), on the vision tower of CLIP ViT-B/32: time and memory.

FusionBench merges the linear layers of the blocks; ours merge the patch embedding and the normalisations too. Each
merge runs in a process of its own, see :mod:`benchmarks.speed.contenders`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.speed.contenders import Tower
from benchmarks.speed.timing import Timed, in_a_process, in_turn, ratios, spread

OURS = ("one-sided", "two-sided", "default")
THEIRS = "FusionBench RegMean++"
Found = dict[str, dict[str, list[float]]]


def run(tower: Tower, repeats: int, threads: int) -> Found | str:
    """Name -> seconds and bytes in each repeat; or why nothing was measured."""
    if importlib.util.find_spec("fusion_bench") is None:
        return "FusionBench is not installed: pip install a clone of its repository, and run this part again"
    peaks: dict[str, list[float]] = {name: [] for name in (*OURS, THEIRS)}

    def timed(name: str) -> Timed:
        def seconds() -> float:
            sizes = [part for key, value in asdict(tower).items() for part in (f"--{key}", value)]
            found = in_a_process("benchmarks.speed.contenders", name, *sizes, "--threads", threads)
            peaks[name].append(found["peak"])
            return found["seconds"]

        return seconds

    seconds = in_turn({name: timed(name) for name in peaks}, repeats, "peers")
    return {name: {"seconds": seconds[name], "peak": peaks[name]} for name in peaks}


def rows(found: Found) -> list[list[str]]:
    """Of a table."""
    theirs = found[THEIRS]

    def row(name: str, seconds: Sequence[float], peak: Sequence[float]) -> list[str]:
        times = [spread(ratios(theirs["seconds"], seconds)), spread(ratios(peak, theirs["peak"]))]
        return [name, spread(seconds), spread([bytes_ / 2**30 for bytes_ in peak]), *times]

    head = ["merge", "seconds", "peak memory, GiB", "times as fast as FusionBench", "times its memory"]
    return [head, *(row(name, own["seconds"], own["peak"]) for name, own in found.items())]
