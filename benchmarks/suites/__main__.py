"""Methods side by side on a suite: ``python -m benchmarks.suites images8 --seeds 0 1 2 --samples 256``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suites import SUITES, make_suite
from benchmarks.suites.ablation import ROWS
from benchmarks.suites.oracle import JOINT
from benchmarks.suites.packages import CACHE_VARIABLE, cache_folder
from benchmarks.suites.results import Results
from benchmarks.suites.rules import settings_for
from benchmarks.suites.runner import run
from benchmarks.suites.suite import Suite
from benchmarks.suites.tables import show
from com_lightning import MergeError

ADAPTERS = (
    *(f"chain(task_rank={rank})" for rank in (2, 4, 1, 8, 16)),
    *(f"task_adapters(method=task_arithmetic(scale=0), data=False, rank={rank})" for rank in (2, 4, 1, 8, 16)),
    *(f"chain(sensitivity=probabilities, task_rank={rank})" for rank in (2, 4, 1, 8)),
    *(f"task_adapters(method=task_arithmetic(scale=0), rank={rank})" for rank in (2, 4, 1, 8, 16)),
)
"""Accuracy against size: the chain's adapters, and each expert alone, as the base and a correction from SVD or data."""
SETS: Mapping[str, Sequence[str]] = {
    "ablation": [method for method in ROWS.values() if method != JOINT],
    "adapters": ADAPTERS,
}
"""Name -> methods that it stands for, the most important ones first."""


def expanded(suite: Suite, methods: Sequence[str] | None) -> list[str] | None:
    """Methods with those of sets that are named; without those of sets that change nothing where nothing is private."""
    if methods is None:
        return None
    found = []
    for listed in methods:
        some = SETS.get(listed, [listed])
        found += [each for each in some if suite.private or listed not in SETS or "refit" not in each]
    return list(dict.fromkeys(found))


def main(arguments: list[str] | None = None) -> None:
    """Run a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites", description=__doc__)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of base, experts and calibration sample"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        help="names, with settings in brackets; from a list of values, one is chosen on val: 'ties(scale=[0.5,1])'; "
        "'ablation' and 'adapters' stand for many (default: all rules, see benchmarks/suites/rules.py)",
    )
    parser.add_argument("--samples", type=int, nargs="+", default=[256], help="calibration samples per task")
    parser.add_argument("--source", choices=["val", "train"], default="val", help="split of the calibration samples")
    parser.add_argument(
        "--split", choices=["test", "val"], default="test", help="split to measure on; val shows all settings of grids"
    )
    parser.add_argument(
        "--oracle", action="store_true", help="also train one model on the data of all tasks at once, as an upper bound"
    )
    parser.add_argument("--again", action="store_true", help="measure again what has been measured before")
    parser.add_argument("--tables", action="store_true", help="only write tables and pictures of what is measured")
    parser.add_argument("--train-only", action="store_true", help="only train missing checkpoints")
    parser.add_argument(
        "--cache",
        type=Path,
        help=f"folder of packages and checkpoints (default: ${CACHE_VARIABLE} or {cache_folder()})",
    )
    parser.add_argument("--output", type=Path, help="path without a suffix (default: benchmarks/results/SUITE)")
    options = parser.parse_args(arguments)
    if options.cache:
        os.environ[CACHE_VARIABLE] = str(options.cache)
    suite = make_suite(options.suite)
    try:
        settings = settings_for(suite, expanded(suite, options.methods))  # report mistakes before anything is trained
    except MergeError as error:
        parser.error(str(error))
    if options.train_only:
        for seed in options.seeds:
            suite.load(seed)
        return
    # Measurements for choosing a setting are not results.
    choices = Path("outputs/suites-val") / suite.name
    output = choices if options.split == "val" else Path("benchmarks/results") / suite.name
    if options.output:
        output, choices = options.output, options.output.with_name(f"{options.output.name}-val")
    if options.tables:
        print(show(Results(suite, output, options.split), suite.folder(0).parent.name))
        return
    print(
        run(
            suite,
            options.seeds,
            settings,
            options.samples,
            output,
            choices,
            options.source,
            options.split,
            options.again,
            options.oracle,
        )
    )


if __name__ == "__main__":
    main()
