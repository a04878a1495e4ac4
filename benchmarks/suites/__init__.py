"""Suites of real tasks to compare merging methods on, from data and models that registry packages ship.

    python -m benchmarks.suites images8 --seeds 0 1 2
    python -m benchmarks.suites images8 --samples 16 64 256 1024 --methods average 'ties(scale=[1,2])' chain
    python -m benchmarks.suites images8 --methods ablation adapters --oracle
    python -m benchmarks.suites images8 --tables    # write tables and pictures again, measure nothing
    python -m benchmarks.suites.ablation            # what each option brings, on all suites
    python -m benchmarks.suites.overview            # the main figures of all suites

A run fetches missing packages, trains missing checkpoints, merges by each method (by default all rules, see
``rules.py``) and tests every task. Training takes longest for images8, about 40 minutes per seed on one busy core. The
results are written to ``benchmarks/results/SUITE.{json,md,png}``, for several numbers of calibration samples also to
``SUITE-samples.png``, and for rules that give each task adapters also to ``SUITE-size.png``. Packages and checkpoints
are stored in ``$COM_LIGHTNING_CACHE`` (``~/.cache/com_lightning``), and results in the JSON file, so that an
interrupted run can go on. The packages need ``npm`` and ``apt-get``.

| suite | tasks | test, val, train samples a task |
| :--- | :--- | :--- |
| images8, images8-resnet | MNIST, Fashion-MNIST as is, rotated, inverted, rolled | 10,000, 5,000, 55,000 images |
| texts6, lora6 | BBC topics, spam, three sentiments, quotations by topic | 500, 400, 1,200 to 9,200 texts |
| lm4 | speeches, quotations, mails, Python source | 512, 1,024, 15,000 or 20,000 sequences of 128 bytes |

Splits do not depend on the seed. No sample is in two of them, and duplicates are removed. Test images are those of the
official test sets. Calibration samples come from val, or with ``--source train`` from train. Test data serve figures
only. A list of values makes a grid, which is one row: for each seed and each number of calibration samples, its
settings are measured on val, on the first 1,000 samples of each task without those used for calibration. The setting
with the best mean normalised metric is measured on test. ``--split val`` shows all settings.

A row belongs to the experts that it was measured with, which are known by a digest of their weights. If they are
trained again, on another machine or with another PyTorch, they are others. Rows are then measured anew, and rows of the
earlier experts stand in a table of their own until they are.

``--oracle`` adds one model that is trained on the data of all tasks at once, see ``oracle.py``: a bound for one model.

Several processes may measure one suite at the same time, on different seeds. Seconds then are those of a busy machine.
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

COLUMNS = {
    "images8": "images, ViT",
    "images8-resnet": "images, ResNet",
    "texts6": "text, MiniLM",
    "lm4": "language model",
    "lora6": "text, LoRA",
}
"""Name of each suite -> what it is called where there is little space."""


def make_suite(name: str) -> Suite:
    """The suite of a name."""
    module, _, cls = SUITES[name].rpartition(".")
    suite: Suite = getattr(import_module(module), cls)()
    return suite
