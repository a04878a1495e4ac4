"""Methods side by side on a suite: ``python -m benchmarks.suites images8 --seeds 0 1 2 --samples 256``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.suites import SUITES, make_suite
from benchmarks.suites.methods import METHODS
from benchmarks.suites.packages import CACHE_VARIABLE, cache_folder
from benchmarks.suites.runner import run


def main(arguments: list[str] | None = None) -> None:
    """Run a suite."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites", description=__doc__)
    parser.add_argument("suite", choices=list(SUITES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of base, experts and sample")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        help="names (by default all of %(default)s), or calls such as 'ChainOfMerges(ridge=0.1)'",
    )
    parser.add_argument("--samples", type=int, default=256, help="calibration samples per task")
    parser.add_argument("--source", choices=["val", "train"], default="val", help="where they are from")
    parser.add_argument(
        "--split", choices=["test", "val"], default="test", help="what is measured on; val to choose a setting"
    )
    parser.add_argument("--again", action="store_true", help="measure also what has been measured before")
    parser.add_argument("--train-only", action="store_true", help="train what is missing, and merge nothing")
    parser.add_argument(
        "--cache", type=Path, help=f"of packages and checkpoints; by default ${CACHE_VARIABLE} or {cache_folder()}"
    )
    parser.add_argument("--output", type=Path, help="without a suffix; by default benchmarks/results/SUITE")
    options = parser.parse_args(arguments)
    if options.cache:
        os.environ[CACHE_VARIABLE] = str(options.cache)
    suite = make_suite(options.suite)
    if options.train_only:
        for seed in options.seeds:
            suite.load(seed)
        return
    # What was measured to choose a setting is no result.
    folder = Path("benchmarks/results") if options.split == "test" else Path("outputs/suites-val")
    output = options.output or folder / options.suite
    print(
        run(
            suite,
            options.seeds,
            options.methods,
            options.samples,
            output,
            options.source,
            options.split,
            options.again,
        )
    )


if __name__ == "__main__":
    main()
