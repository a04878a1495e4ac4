"""Train what is missing, merge by each method, test every task, and keep what came out."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer, seed_everything
from tqdm.auto import tqdm

from benchmarks.suites.oracle import JOINT, train_jointly
from benchmarks.suites.results import EXPERT, Entry, Results, versions
from benchmarks.suites.suite import Experts, Suite
from benchmarks.suites.tables import VAL_SAMPLES, show
from com_lightning import ChainOfMergesCallback, MergeDataModule, MergingMethod
from com_lightning.analysis.compare import reseeded
from com_lightning.core.chain.options import ChainOptions
from com_lightning.methods.registry import Setting
from com_lightning.validation import quiet_lightning

CALIBRATION_BATCH = 32  # it decides how much is paused at a time; to AdaMerging it is the batch of a step


def run(
    suite: Suite,
    seeds: Sequence[int],
    settings: Sequence[Setting],
    samples: Sequence[int],
    output: Path,
    choices: Path,
    source: Literal["val", "train"] = "val",
    split: Literal["val", "test"] = "test",
    again: bool = False,
    oracle: bool = False,
) -> str:
    """Measure methods on a suite; what the output's JSON file holds already is not measured again.

    The settings of a grid are one row: for each seed, and each number of calibration samples, all of them are measured
    on val, and the best of them, and no other, on test.

    Args:
        suite: tasks, experts and data.
        seeds: of base, experts, calibration sample, and whatever a rule draws at random.
        settings: of the methods, see :func:`~benchmarks.suites.rules.settings_for`.
        samples: numbers of calibration samples per task.
        output: of JSON file, table and pictures, without a suffix.
        choices: the same for the JSON file of what grids gave on val.
        source: the split that calibration samples are from.
        split: what is measured on: ``"test"``, or ``"val"`` to look at every setting of a grid. Of val it is the first
            :data:`~benchmarks.suites.tables.VAL_SAMPLES` samples of each task, without those that were calibrated on.
        again: measure also what the files hold.
        oracle: measure also what is trained on all tasks at once, see :mod:`~benchmarks.suites.oracle`.

    Returns:
        The table.

    Raises:
        ValueError: if a task has fewer samples to calibrate on.
    """
    results = Results(suite, output, split)
    rows: dict[str, list[Setting]] = {}
    for setting in settings:
        rows.setdefault(setting.name if split == "test" else setting.label, []).append(setting)
    for seed in seeds:
        bench = _Bench(suite, seed, source, Results(suite, choices, "val"), again)
        bench.measure_experts(results)
        if oracle:
            bench.measure_oracle(results)
        for number in samples:
            for name, some in rows.items():
                if number == samples[0] or any("data" in setting.method.needs for setting in some):
                    bench.measured(results, name, some, number)
    return show(results, suite.folder(0).parent.name)


@dataclass
class _Bench:
    """The experts of one seed, and what is measured of them and of their merges.

    Attributes:
        choices: where the settings of grids are kept with what they gave on val.
    """

    suite: Suite
    seed: int
    source: Literal["val", "train"]
    choices: Results
    again: bool

    @cached_property
    def loaded(self) -> Experts:
        """Loaded, or trained, when something is to be measured."""
        return self.suite.load(self.seed)

    def measure_experts(self, results: Results) -> None:
        """What all merges are compared with."""
        entry = self._entry(EXPERT)
        if not results.find(entry.key):
            entry.values = evaluate(self.suite, self.loaded.experts, self._data(1), results.split)
            self._keep(results, entry)

    def measure_oracle(self, results: Results) -> None:
        """What no merge can be expected to beat."""
        entry = self._entry(JOINT)
        if not results.find(entry.key) or self.again:
            entry.values = evaluate(self.suite, train_jointly(self.suite, self.seed), self._data(1), results.split)
            self._keep(results, entry)

    def measured(self, results: Results, name: str, settings: Sequence[Setting], samples: int) -> Entry:
        """The entry of a method, or of the setting that is best on val, if there are several."""
        reads = any("data" in setting.method.needs for setting in settings)
        entry = self._entry(name, samples, self.source) if reads else self._entry(name)
        known = results.find(entry.key)
        if known and not self.again and _is_of(known, settings, self.seed):
            return known
        best = settings[0]
        if len(settings) > 1:
            self.measure_experts(self.choices)
            for setting in settings:
                tried = self.measured(self.choices, setting.label, [setting], samples)
                entry.tried[setting.label] = self.choices.score(tried)
            # What came out as NaN is no choice.
            best = max(settings, key=lambda setting: _or_worst(entry.tried[setting.label]))
            entry.chosen = best.label
        method = reseeded(best.method, self.seed)
        # Fisher squares the gradients of single samples.
        data = self._data(samples, 1 if "loss" in method.needs else CALIBRATION_BATCH)
        merger = merge(self.suite, self.loaded, data, method, self.seed)
        entry.seconds, entry.settings = round(merger.report.seconds, 2), method.describe()
        held_out = results.split == entry.source == "val"
        entry.values = evaluate(self.suite, merger.modules, data, results.split, held_out)
        self._keep(results, entry)
        return entry

    def _entry(self, name: str, samples: int = 0, source: str = "") -> Entry:
        return Entry(
            name, self.seed, samples, source, self.suite.folder(self.seed).parent.name, {}, versions=versions()
        )

    def _data(self, samples: int, batch_size: int = CALIBRATION_BATCH) -> MergeDataModule:
        data = self.suite.merge_data(samples, self.seed, split=self.source, batch_size=batch_size)
        data.setup("validate")
        for task, own in data.tasks.items():
            if (there := len(getattr(own, f"{self.source}_dataloader")().dataset)) < samples:
                told = f"{self.suite.name}: {samples} samples of {task} are asked for, and {self.source} has {there}"
                raise ValueError(f"{told}; give fewer --samples, or another --source")
        return data

    def _keep(self, results: Results, entry: Entry) -> None:
        results.add(entry)
        told = " ".join(f"{task} {value:.4f}" for task, value in entry.values.items())
        what = f"{entry.method}{f' = {entry.chosen}' if entry.chosen else ''} on {results.split}"
        what += f" with {entry.samples} samples" if entry.samples else ""
        line = f"{self.suite.name}, seed {self.seed}, {what}: mean normalised {100 * results.score(entry):.1f} %"
        print(f"{line}, {entry.seconds:.1f} s; {told}", file=sys.stderr, flush=True)


class _Merger(ChainOfMergesCallback):
    """Merges, and leaves it to :func:`evaluate` to measure the result."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


def merge(
    suite: Suite, loaded: Experts, data: MergeDataModule, method: MergingMethod, seed: int
) -> ChainOfMergesCallback:
    """Merge the experts, in a validation that is as short as can be."""
    seed_everything(seed, verbose=False)
    merger = _Merger({**loaded.experts}, method, list(suite.private), baselines=False, base=loaded.base)
    # The limit cuts calibration too: what is calibrated on has to fit in.
    limit = math.ceil(data.num_samples / (data.batch_size or 1)) if "data" in method.needs else 1
    with quiet_lightning():
        trainer = _trainer(limit_val_batches=limit, callbacks=[merger], enable_progress_bar=True)
        trainer.validate(copy.deepcopy(loaded.experts[suite.tasks[0]]), datamodule=data, verbose=False)
    return merger


def evaluate(
    suite: Suite,
    modules: Mapping[str, LightningModule],
    data: MergeDataModule,
    split: str,
    held_out: bool = False,
) -> dict[str, float]:
    """Task -> metric of its module on a split; of val, on the first :data:`VAL_SAMPLES` samples.

    Args:
        suite: whose metric it is.
        modules: task -> module.
        data: of all tasks.
        split: ``"test"`` or ``"val"``.
        held_out: leave out of val what was calibrated on.
    """
    values = {}
    for task, module in tqdm(modules.items(), desc="testing", leave=False):
        own = data.tasks[task]
        own.setup("test" if split == "test" else "validate")
        loader = own.test_dataloader() if split == "test" else own.val_dataloader()
        if held_out:
            loader = (
                MergeDataModule(data.tasks, data.num_samples, "val", holdout=True, seed=data.seed)
                .task(task, prepared=True)
                .val_dataloader()
            )
        with quiet_lightning():
            trainer = _trainer(limit_val_batches=max(VAL_SAMPLES // loader.batch_size, 1))
            measure = trainer.test if split == "test" else trainer.validate
            logged = measure(module, dataloaders=loader, verbose=False)[0]
        values[task] = float(logged[f"{split}_{suite.metric}"])
    return values


def _is_of(entry: Entry, settings: Sequence[Setting], seed: int) -> bool:
    """Whether an entry is what these settings give: a name alone stands for other defaults in another version."""
    labels = [setting.label for setting in settings]
    if list(entry.tried) != (labels if len(labels) > 1 else []):
        return False
    method = settings[labels.index(entry.chosen) if entry.chosen else 0].method
    now: dict[str, object] = json.loads(json.dumps(reseeded(method, seed).describe(), default=str))
    # What a rule has learnt since is off by default.
    off = {field.name: field.default for field in fields(ChainOptions)}
    return entry.settings == {
        name: value for name, value in now.items() if name in entry.settings or value != off.get(name, ...)
    }


def _or_worst(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    # Tensors made in inference mode could never be merged.
    return Trainer(accelerator="auto", devices=1, logger=False, inference_mode=False, **{**quiet, **options})
