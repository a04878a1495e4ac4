"""Train what is missing, merge by each method, test every task, and keep what came out."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer, seed_everything
from tqdm.auto import tqdm

from benchmarks.suites.methods import make_method
from benchmarks.suites.results import EXPERT, Entry, Results, versions
from benchmarks.suites.suite import Experts, Suite
from com_lightning import ChainOfMergesCallback, MergeDataModule
from com_lightning.evaluation import quiet_lightning
from com_lightning.merger import describe

CALIBRATION_BATCH = 32  # it decides how much is paused at a time, not the result


def run(
    suite: Suite,
    seeds: Sequence[int],
    methods: Sequence[str],
    samples: int,
    output: Path,
    source: Literal["val", "train"] = "val",
    split: Literal["val", "test"] = "test",
    again: bool = False,
) -> str:
    """Measure methods on a suite; what the output's JSON file holds already is not measured again.

    Args:
        suite: tasks, experts and data.
        seeds: of base, experts and calibration sample.
        methods: names, see :mod:`benchmarks.suites.methods`.
        samples: calibration samples per task.
        output: of JSON file, table and picture, without a suffix.
        source: the split that calibration samples are from.
        split: what is measured on: ``"test"``, or ``"val"`` to choose a setting (without the calibration samples).
        again: measure also what the file holds.

    Returns:
        The table.
    """
    made = {name: make_method(name) for name in methods}  # a wrong name is told before anything is trained
    results = Results(suite, output, split)
    for seed in seeds:
        loaded = None
        trained = suite.folder(seed).parent.name
        keys: list[tuple[str, int, str]] = [(EXPERT, 0, "")]
        keys += [(name, samples, source) if m.needs_data else (name, 0, "") for name, m in made.items()]
        for name, number, origin in keys:
            entry = Entry(name, seed, number, origin, trained, {})
            if results.find(entry.key) and (name == EXPERT or not again):
                continue
            loaded = loaded or suite.load(seed)
            data = suite.merge_data(samples, seed, source=source, batch_size=CALIBRATION_BATCH)
            entry.versions = versions()
            if name == EXPERT:
                modules: Mapping[str, LightningModule] = loaded.experts
            else:
                merger = merge(suite, loaded, data, name, seed)
                modules = merger.modules
                entry.seconds, entry.settings = round(merger.report.seconds, 2), describe(made[name])
            entry.values = evaluate(suite, modules, data, split, held_out=split == source and name != EXPERT)
            results.add(entry)
            _tell(results, entry)
    return results.show(suite.folder(0).parent.name)


class _Merger(ChainOfMergesCallback):
    """Merges, and leaves it to :func:`evaluate` to measure the result."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


def merge(suite: Suite, loaded: Experts, data: MergeDataModule, method: str, seed: int) -> ChainOfMergesCallback:
    """Merge the experts, in a validation that is as short as can be."""
    seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"private": list(suite.private), "baselines": False}
    if "base" in inspect.signature(ChainOfMergesCallback).parameters:  # for methods that need it
        options["base"] = loaded.base
    merger = _Merger({**loaded.experts}, make_method(method), **options)
    # The limit cuts calibration too: what is calibrated on has to fit in.
    limit = math.ceil(data.samples / CALIBRATION_BATCH)
    with quiet_lightning():
        trainer = _trainer(limit_val_batches=limit, callbacks=[merger], enable_progress_bar=True)
        trainer.validate(copy.deepcopy(loaded.experts[suite.tasks[0]]), datamodule=data, verbose=False)
    return merger


def evaluate(
    suite: Suite,
    modules: Mapping[str, LightningModule],
    data: MergeDataModule,
    split: Literal["val", "test"],
    held_out: bool = False,
) -> dict[str, float]:
    """Task -> metric of its module on a split, without the calibration samples if ``held_out``."""
    values = {}
    for task, module in tqdm(modules.items(), desc="testing", leave=False):
        own = data.tasks[task]
        own.setup("test" if split == "test" else "validate")
        loader = own.test_dataloader() if split == "test" else own.val_dataloader()
        if held_out:
            loader = (
                MergeDataModule(data.tasks, data.samples, "val", holdout=True, seed=data.seed)
                .task(task, prepared=True)
                .val_dataloader()
            )
        with quiet_lightning():
            trainer = _trainer()
            measure = trainer.test if split == "test" else trainer.validate
            logged = measure(module, dataloaders=loader, verbose=False)[0]
        values[task] = float(logged[f"{split}_{suite.metric}"])
    return values


def _tell(results: Results, entry: Entry) -> None:
    normalized = results.normalized(entry)
    mean = results.suite.mean(list(normalized.values())) if normalized else math.nan
    told = " ".join(f"{task} {value:.4f}" for task, value in entry.values.items())
    line = f"{results.suite.name}, seed {entry.seed}, {entry.method}: mean normalised {100 * mean:.1f} %"
    print(f"{line}, {entry.seconds:.1f} s; {told}", file=sys.stderr, flush=True)


def _trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    # Tensors made in inference mode could never be merged.
    return Trainer(accelerator="auto", devices=1, logger=False, inference_mode=False, **{**quiet, **options})
