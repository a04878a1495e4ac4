"""Accuracy against size on the demo's tasks: the chain with corrections of low rank, and others on top of the base.

    make demo                       # trains the base and the experts
    python -m benchmarks.adapters   # some minutes

Prints a table: mean and standard deviation over calibration samples of the accuracy divided by the expert's.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

import com_lightning
from com_lightning import ChainOfMerges, MergeDataModule, MergingMethod, Refitted, TaskAdapters, TaskArithmetic
from com_lightning.results.tables import table
from com_lightning.validation import default_trainer, validate_tasks
from examples.digits.data import DigitsData
from examples.digits.model import ViTClassifier

TASKS = ("mnist", "mnist-rotated", "mnist-rolled", "digits", "digits-rotated")
RANKS = (1, 2, 4, 8, 16)
FOLDER = Path("outputs/digits")


def data_of(seed: int) -> MergeDataModule:
    return MergeDataModule({task: DigitsData(task) for task in TASKS}, num_samples=256, holdout=True, seed=seed)


def load(name: str) -> ViTClassifier:
    return ViTClassifier.load_from_checkpoint(FOLDER / f"{name}.ckpt", weights_only=True).eval()


def normalized(modules: Mapping[str, LightningModule], experts: Mapping[str, LightningModule], seed: int) -> float:
    """Mean over tasks of the accuracy divided by the expert's, in per cent."""
    data, trainer = data_of(seed), default_trainer("cpu")
    data.setup("validate")
    ours, theirs = (validate_tasks(trainer, each, data, "") for each in (modules, experts))
    return statistics.mean(100 * ours[task]["val_acc"] / theirs[task]["val_acc"] for task in TASKS)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    experts = {task: load(task) for task in TASKS}
    base = load("base")
    rows = [["", "values per task", "mean of merged / expert, %"]]

    def add(label: str, method: MergingMethod) -> int:
        """Add the row of a rule, and return how many values each task has for itself beside its head."""
        settings: dict[str, Any] = {"private": ["head"], "baselines": False, "base": base}
        seeds = options.seeds
        results = [com_lightning.merge(ViTClassifier(), experts, data_of(seed), method, **settings) for seed in seeds]
        values = [normalized(result.modules, experts, seed) for result, seed in zip(results, seeds)]
        own = sum(sum(layer.of_tasks.values()) for layer in results[0].report.layers)
        rows.append([label, f"{own:,}", f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"])
        return own

    def chain(**settings: Any) -> MergingMethod:
        return ChainOfMerges(refit_heads=True, normalize=False, **settings)

    shared = sum(parameter.numel() for parameter in base.backbone.parameters())
    add("chain, biases and norms per task", chain(private_biases=True))
    for rank in options.ranks:
        add(f"chain, task_rank={rank}", chain(task_rank=rank))
        own = add(f"with sensitivity, task_rank={rank}", chain(task_rank=rank, sensitivity="probabilities"))
        add("the same size by task_share", chain(task_share=own / shared, sensitivity="probabilities"))
        add(f"base + SVD, rank {rank}", TaskAdapters(TaskArithmetic(scale=0), rank, data=False))
        corrections = TaskAdapters(TaskArithmetic(scale=0), rank, sensitivity="probabilities")
        add(f"base + corrections from data, rank {rank}", Refitted(corrections))
    print(table(rows))


if __name__ == "__main__":
    main()
