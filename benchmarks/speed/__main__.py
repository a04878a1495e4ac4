"""How fast a merge is: ``python -m benchmarks.speed [--parts merges breakdown files] [--repeats 5]``.

All contenders of a part are timed in turn within one run, and compared with what was timed beside them. Ctrl-C ends a
part and keeps its complete repeats. The results are written to ``benchmarks/results/speed.{json,md,png}``; parts that
are not run keep their earlier results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.lockstep import environment
from benchmarks.speed import breakdown, candidates, files, large, merges, scaling
from benchmarks.speed.tower import Tower
from com_lightning.results.tables import table

TINY = Tower(tasks=2, samples=4, batch_size=2, blocks=1, width=64, image=32, patch=16)
TITLES = {
    "merges": "Against the floor, and against FusionBench",
    "breakdown": "Where the time goes",
    "candidates": "What might be faster",
    "scaling": "Against size",
    "files": "Against mergekit, without data",
    "large": "Eight experts of 1B parameters",
}
ABOUT = {
    "merges": merges.__doc__,
    "breakdown": breakdown.__doc__,
    "candidates": candidates.__doc__,
    "scaling": scaling.__doc__,
    "files": files.__doc__,
    "large": large.__doc__,
}


def run_merges(tower: Tower, options: argparse.Namespace) -> dict[str, Any]:
    """See :mod:`benchmarks.speed.merges`."""
    measured = merges.run(tower, options.repeats, options.threads)
    repeats = len(measured["forwards"]["seconds"])
    return {"setting": {**asdict(tower), "repeats": repeats}, "found": measured, "rows": merges.rows(measured)}


def run_breakdown(tower: Tower, options: argparse.Namespace) -> dict[str, Any]:
    """See :mod:`benchmarks.speed.breakdown`."""
    measured = breakdown.run(tower, options.repeats, options.threads)
    repeats = len(next(iter(measured.values()))["all"])
    return {"setting": {**asdict(tower), "repeats": repeats}, "found": measured, "rows": breakdown.rows(measured)}


def run_candidates(tower: Tower, options: argparse.Namespace) -> dict[str, Any]:
    """See :mod:`benchmarks.speed.candidates`."""
    measured = candidates.run(tower, options.repeats)
    repeats = len(next(iter(measured.values()))["other"])
    return {"setting": {**asdict(tower), "repeats": repeats}, "found": measured, "rows": candidates.rows(measured)}


def run_scaling(tower: Tower, options: argparse.Namespace) -> dict[str, Any]:
    """See :mod:`benchmarks.speed.scaling`."""
    batch_size = 2 if options.tiny else 32
    measured = scaling.run(options.repeats, options.width, batch_size, scaling.TINY if options.tiny else scaling.SIZES)
    scaling.picture(measured, options.output.with_suffix(".png"))
    repeats = len(next(iter(measured["tasks"].values())))
    setting = {"width": options.width, "batch_size": batch_size, **scaling.FIXED, "repeats": repeats}
    return {"setting": setting, "found": measured, "rows": scaling.rows(measured)}


def run_files(tower: Tower, options: argparse.Namespace) -> dict[str, Any]:
    """See :mod:`benchmarks.speed.files`."""
    models = files.Models(2, 64, 1, 100) if options.tiny else files.Models(options.experts)
    measured = files.run(models, options.repeats, options.threads)
    if isinstance(measured, str):
        print(measured, file=sys.stderr)
        return {}
    repeats = len(measured["average"]["mergekit"]["seconds"])
    return {"setting": {**asdict(models), "repeats": repeats}, "found": measured, "rows": files.rows(measured)}


def run_large(tower: Tower, options: argparse.Namespace) -> dict[str, Any]:
    """See :mod:`benchmarks.speed.large`."""
    models = large.TINY if options.tiny else large.SIZES
    measured = large.run(models, options.threads)
    return {"setting": asdict(models), "found": measured, "rows": large.rows(measured)}


PARTS: dict[str, Callable[[Tower, argparse.Namespace], dict[str, Any]]] = {
    "merges": run_merges,
    "breakdown": run_breakdown,
    "candidates": run_candidates,
    "scaling": run_scaling,
    "files": run_files,
    "large": run_large,
}


def markdown(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """All results as Markdown."""
    sections = [
        "# How fast a merge is",
        "Each figure is a median, with the smallest and the largest in brackets. Contenders were timed in turn.",
    ]
    for name, part in parts.items():
        about = " ".join(str(ABOUT[name]).split()).replace(":mod:", "")
        machine = part["environment"]
        where = (
            f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} in use, load {machine['load']} at the "
            f"start; Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}"
        )
        setting = ", ".join(f"{key} {value}" for key, value in part["setting"].items())
        sections += [f"## {TITLES[name]}", about, table(part["rows"])]
        sections += ["![seconds against size](speed.png)"] if name == "scaling" else []
        sections += [f"`{part['command']}`: {setting}. {where}."]
    return "\n\n".join(sections) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run the requested parts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=str(__doc__).partition("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="use fewer if other programs run at the same time"
    )
    for field, value in asdict(Tower()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=value, help="of the part merges")
    parser.add_argument("--experts", type=int, default=3, help="of the part files")
    parser.add_argument("--scaling-width", dest="scaling_width", type=int, default=96)
    parser.add_argument("--tiny", action="store_true", help="small sizes, only to check that everything runs")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed"), help="path without a suffix")
    options = parser.parse_args(arguments)
    tower = TINY if options.tiny else Tower(**{field: getattr(options, field) for field in asdict(Tower())})
    options.width = 64 if options.tiny else options.scaling_width
    torch.set_num_threads(options.threads)
    path = options.output.with_suffix(".json")
    stored: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    command = shlex.join(["python", "-m", "benchmarks.speed", *(sys.argv[1:] if arguments is None else arguments)])
    for name in options.parts:
        about = environment()
        if measured := PARTS[name](tower, options):
            stored[name] = {**measured, "environment": about, "command": command}
            ordered = {part: stored[part] for part in PARTS if part in stored}
            path.write_text(json.dumps(ordered, indent=1) + "\n")
            options.output.with_suffix(".md").write_text(markdown(ordered))
    print(markdown({part: stored[part] for part in PARTS if part in stored}))


if __name__ == "__main__":
    main()
