"""The demo's tasks merged by every rule, over several seeds of base, experts and calibration sample.

    python -m benchmarks.digits

It trains with the demo's configurations (about two minutes per seed on two cores; trained checkpoints are reused),
merges by each method, validates on images that no merge was calibrated on, and writes a table, JSON and a picture.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import seed_everything

from com_lightning import Average, ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergingMethod, RegMean
from com_lightning.cli import main as com_lightning
from com_lightning.results.report import MergeReport
from com_lightning.results.tables import table
from com_lightning.trainer import MergeTrainer
from examples.digits.data import DigitsData
from examples.digits.model import ViTClassifier

METHODS: dict[str, MergingMethod] = {
    "average": Average(),
    "RegMean (each layer on its own)": RegMean(),
    "RegMean, rows normalized": RegMean(normalize=True),
    "chain, one-sided": ChainOfMerges(target="merged", refit_heads=False),
    "chain, two-sided": ChainOfMerges(residual=False, refit_heads=False),
    "residual streams repaired": ChainOfMerges(refit_heads=False),
    "the same, rows normalized": ChainOfMerges(normalize=True, refit_heads=False),
    "heads refitted (the default)": ChainOfMerges(),
    "the default, rows normalized": ChainOfMerges(normalize=True),
    "accurate.yaml": ChainOfMerges(sensitivity="probabilities", balance=True),
    "the default, private biases and norms": ChainOfMerges(private_biases=True),
    "adapters.yaml": ChainOfMerges(task_rank=4),
}
CONFIGS = Path("configs/digits")


def train(folder: Path, tasks: list[str], seed: int) -> None:
    """Train a base and an expert for each task, as the demo does."""
    common = [f"--seed_everything={seed}", f"{CALLBACK}.dirpath={folder}"]
    if not (folder / "base.ckpt").exists():
        com_lightning(["fit", f"--config={CONFIGS / 'base.yaml'}", *common])
    for task in tasks:
        if not (folder / f"{task}.ckpt").exists():
            which = [f"--data.task={task}", f"--model.base={folder / 'base.ckpt'}", f"{CALLBACK}.filename={task}"]
            com_lightning(["fit", f"--config={CONFIGS / 'expert.yaml'}", *which, *common])


CALLBACK = "--trainer.callbacks.init_args"  # of the last callback, the ModelCheckpoint


def merge(folder: Path, tasks: list[str], seed: int, samples: int, method: MergingMethod) -> MergeReport:
    """Merge once, and validate on held-out images."""
    seed_everything(seed, verbose=False)
    data = MergeDataModule({task: DigitsData(task) for task in tasks}, num_samples=samples, holdout=True, seed=seed)
    experts: dict[str, Any] = {task: str(folder / f"{task}.ckpt") for task in tasks}
    merger = ChainOfMergesCallback(experts, method, private=["head"])
    trainer = MergeTrainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[merger]
    )
    model = ViTClassifier.load_from_checkpoint(experts[tasks[0]], weights_only=True)
    trainer.validate(model, datamodule=data, verbose=False)
    return merger.report


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=256, help="calibration samples per task")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-digits"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/digits"), help="path without a suffix")
    options = parser.parse_args()
    tasks = list(yaml.safe_load((CONFIGS / "merge.yaml").read_text())["experts"])
    results: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    experts: list[dict[str, float]] = []
    for seed in options.seeds:
        folder = options.work / f"seed{seed}"
        train(folder, tasks, seed)
        for name, method in METHODS.items():
            report = merge(folder, tasks, seed, options.samples, method)
            results[name].append({task: report.normalized("merged", task) or 0.0 for task in tasks})
            print(f"seed {seed}, {name}: {100 * statistics.mean(results[name][-1].values()):.1f} %", flush=True)
        experts.append({task: report.metrics["expert"][task]["val_acc"] for task in tasks})
    write(options, tasks, results, experts)


def write(
    options: argparse.Namespace,
    tasks: list[str],
    results: dict[str, list[dict[str, float]]],
    experts: list[dict[str, float]],
) -> None:
    """Write table, JSON and picture."""
    rows = [["method", *tasks, "mean", "standard deviation"]]
    means = {name: [100 * statistics.mean(run.values()) for run in runs] for name, runs in results.items()}
    for name, runs in results.items():
        per_task = [f"{100 * statistics.mean(run[task] for run in runs):.1f}" for task in tasks]
        spread = statistics.stdev(means[name]) if len(runs) > 1 else 0.0
        rows.append([name, *per_task, f"{statistics.mean(means[name]):.1f}", f"{spread:.1f}"])
    rows.append(["experts' accuracy", *[f"{100 * statistics.mean(e[t] for e in experts):.1f}" for t in tasks]])
    rows[-1] += [f"{100 * statistics.mean(statistics.mean(e.values()) for e in experts):.1f}", ""]
    command = shlex.join(["python", "-m", "benchmarks.digits", *sys.argv[1:]])
    versions = f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    text = (
        f"Normalised accuracy (merged / expert, %) of the demo's tasks, {options.samples} calibration images a task, "
        f"none of them validated; mean over seeds {', '.join(map(str, options.seeds))}, standard deviation of the mean "
        f"over tasks between seeds.\n\n{table(rows)}\n\n`{command}`; {versions}.\n"
    )
    print(f"\n{text}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text)
    content = {"command": command, "versions": versions, "seeds": options.seeds, "normalized": results}
    options.output.with_suffix(".json").write_text(json.dumps({**content, "experts": experts}, indent=2) + "\n")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(results)[::-1]
    spreads = [statistics.stdev(means[n]) if len(means[n]) > 1 else 0.0 for n in names]
    axes.barh(names, [statistics.mean(means[n]) for n in names], xerr=spreads, color="#2a6f97", capsize=3)
    axes.set_xlabel(f"normalised accuracy (%), mean of {len(tasks)} tasks and {len(options.seeds)} seeds")
    axes.set_xlim(0, 100)
    figure.savefig(options.output.with_suffix(".png"), dpi=130)


if __name__ == "__main__":
    main()
