"""Accuracy against size on the demo's tasks: the chain with a correction of low rank per task, and base + SVD.

    make demo                       # trains the base and the experts
    python -m benchmarks.adapters   # some minutes

Prints a table: mean and standard deviation over calibration samples of the accuracy divided by the expert's.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule

import com_lightning
from com_lightning import ChainOfMerges, MergeDataModule
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


@torch.no_grad()
def compressed(base: ViTClassifier, expert: ViTClassifier, rank: int) -> ViTClassifier:
    """The base, with the SVD of a rank of each difference to it, and the expert's own biases, norms and head."""
    result, weights = copy.deepcopy(expert), dict(base.named_parameters())
    for name, parameter in result.backbone.named_parameters():
        if parameter.dim() > 1 and name.endswith("weight"):
            start = weights[f"backbone.{name}"]
            left, values, right = torch.linalg.svd((parameter - start).flatten(1), full_matrices=False)
            difference = (left[:, :rank] * values[:rank]) @ right[:rank]
            parameter.copy_(start + difference.view(parameter.shape))
    return result


def normalized(modules: Mapping[str, LightningModule], experts: Mapping[str, LightningModule], seed: int) -> float:
    """Mean over tasks of the accuracy divided by the expert's, in per cent."""
    data, trainer = data_of(seed), default_trainer("cpu")
    data.setup("validate")
    ours, theirs = (validate_tasks(trainer, each, data, "", quiet=True) for each in (modules, experts))
    return statistics.mean(100 * ours[task]["val_acc"] / theirs[task]["val_acc"] for task in TASKS)


def row(label: str, values: Sequence[float], per_task: float | None = None) -> list[str]:
    share = "" if per_task is None else f"{per_task:,.0f}"
    return [label, share, f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    experts = {task: load(task) for task in TASKS}
    base = load("base")
    rows = [["", "values per task", "mean of merged / expert, %"]]

    def merged(label: str, **settings: object) -> list[str]:
        results = [
            com_lightning.merge(
                ViTClassifier(),
                experts,
                data_of(seed),
                ChainOfMerges(refit_heads=True, normalize=False, **settings),  # type: ignore[arg-type]
                private=["head"],
                baselines=False,
            )
            for seed in options.seeds
        ]
        values = [normalized(result.modules, experts, seed) for result, seed in zip(results, options.seeds)]
        return row(label, values, results[0].report.sizes.get("correction", 0) / len(TASKS))

    rows.append(merged("chain, biases and norms per task", private_biases=True))
    for rank in options.ranks:
        rows.append(merged(f"chain, task_rank={rank}", task_rank=rank))
        rows.append(merged(f"with sensitivity, task_rank={rank}", task_rank=rank, sensitivity="probabilities"))
        modules = {task: compressed(base, expert, rank) for task, expert in experts.items()}
        rows.append(row(f"base + SVD, rank {rank}", [normalized(modules, experts, seed) for seed in options.seeds]))
    print(table(rows))


if __name__ == "__main__":
    main()
