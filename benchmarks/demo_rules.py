"""Any rules on the demo's experts, which `make demo` trains.

    python -m benchmarks.demo_rules "chain(importance=similarity)" "chain(anchor=tsvm,ridge=[0.01,0.1])" --seeds 0 1

Rules are written as for benchmarks.suites. It prints the mean of the accuracy divided by the expert's, and its standard
deviation between calibration samples, on images that were not calibrated on. All settings of a grid are shown.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence

import com_lightning
from benchmarks.adapters import FOLDER, TASKS, data_of, load, normalized
from benchmarks.suites.rules import read_settings
from com_lightning.results.tables import table
from examples.digits.model import ViTClassifier


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    settings = [setting for listed in options.methods for setting in read_settings(listed)]
    experts = {task: load(task) for task in TASKS}
    rows = [["rule", "mean of merged / expert, %"]]
    for setting in settings:
        base = str(FOLDER / "base.ckpt") if "base" in setting.method.needs else None
        values = []
        for seed in options.seeds:
            merged = com_lightning.merge(
                ViTClassifier(), experts, data_of(seed), setting.method, private=["head"], baselines=False, base=base
            )
            values.append(normalized(merged.modules, experts, seed))
        rows.append([setting.label, f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"])
    print(table(rows))


if __name__ == "__main__":
    main()
