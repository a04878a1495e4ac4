"""Methods side by side on a suite: ``python -m benchmarks.suites images8 --seeds 0 1 2 --samples 256``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.suites import SUITES, make_suite
from benchmarks.suites.packages import CACHE_VARIABLE, cache_folder
from benchmarks.suites.results import Results
from benchmarks.suites.rules import settings_for
from benchmarks.suites.runner import run
from benchmarks.suites.tables import show
from com_lightning import MergeError


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
        help="names, with settings in brackets; from a list of values, one is chosen on val: 'ties(density=[0.1,0.2])' "
        "(default: all rules, see benchmarks/suites/rules.py)",
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
        settings = settings_for(suite, options.methods)  # report mistakes before anything is trained
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
