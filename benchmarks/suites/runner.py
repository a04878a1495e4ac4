"""Train missing experts, merge by each method, test every task, and store the results."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from benchmarks.suites.oracle import JOINT, train_jointly
from benchmarks.suites.results import EXPERT, Entry, Results, versions
from benchmarks.suites.rules import Setting
from benchmarks.suites.suite import Experts, Suite
from benchmarks.suites.tables import VAL_SAMPLES, show
from com_lightning import ChainOfMergesCallback, MergeDataModule, MergingMethod
from com_lightning.analysis.compare import reseeded
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.tensors.modules import matches_any, named_tensors
from com_lightning.results.report import MergeReport
from com_lightning.validation import quiet_lightning

Batches = dict[tuple[str, str], list[Any]]  # (split, task) -> batches to measure on
CALIBRATION_BATCH = 32  # decides how much memory paused forwards need; AdaMerging takes one step per batch


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
    """Measure methods on a suite. Results that the output's JSON file has already are not measured again.

    The settings of a grid are one row: for each seed and each number of calibration samples, all of them are measured
    on val, and only the best one on test.

    Args:
        suite: tasks, experts and data.
        seeds: seeds of base, experts, calibration sample, and of rules that draw random numbers.
        settings: the methods, see :func:`~benchmarks.suites.rules.settings_for`.
        samples: numbers of calibration samples per task.
        output: path of JSON file, table and pictures, without a suffix.
        choices: path of the JSON file with the results of grids on val, without a suffix.
        source: the split that calibration samples come from.
        split: the split to measure on: ``"test"``, or ``"val"`` to see every setting of a grid. On val, these are the
            first :data:`~benchmarks.suites.tables.VAL_SAMPLES` samples of each task without those used for calibration.
        again: whether to measure results again that the files have already.
        oracle: whether to train one model on all tasks at once too, see :mod:`~benchmarks.suites.oracle`.

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
    """The experts of one seed, with the measurements of them and of their merges.

    Rows and experts are compared by the digest of the experts' weights, so experts are loaded even if nothing is
    missing.

    Attributes:
        choices: the results of all settings of grids on val.
    """

    suite: Suite
    seed: int
    source: Literal["val", "train"]
    choices: Results
    again: bool

    @cached_property
    def loaded(self) -> Experts:
        """The experts, loaded or trained when they are first needed."""
        return self.suite.load(self.seed)

    @cached_property
    def _task_data(self) -> dict[str, LightningDataModule]:
        return {task: self.suite.data(task) for task in self.suite.tasks}

    @cached_property
    def _batches(self) -> Batches:
        return {}

    def measure_experts(self, results: Results) -> None:
        """Measure the experts, with which all merges are compared."""
        entry = self._entry(EXPERT)
        if earlier := results.find(entry.key):
            newest = results.newest(entry.trained).get(self.seed)
            if newest is not None and newest.experts != entry.experts:  # as after the cache was put back
                results.add(earlier)
            return
        entry.values = evaluate(self.suite, self.loaded.experts, self._data(1), results.split, self._batches)
        self._keep(results, entry)

    def measure_oracle(self, results: Results) -> None:
        """Measure joint training, which no merge can be expected to beat."""
        entry = self._entry(JOINT)
        if not results.find(entry.key) or self.again:
            modules = train_jointly(self.suite, self.seed, self.loaded)
            entry.values = evaluate(self.suite, modules, self._data(1), results.split, self._batches)
            self._keep(results, entry)

    def measured(self, results: Results, name: str, settings: Sequence[Setting], samples: int) -> Entry:
        """The entry of a method; if it has several settings, of the one that is best on val."""
        reads = any("data" in setting.method.needs for setting in settings)
        entry = self._entry(name, samples, self.source) if reads else self._entry(name)
        earlier = results.find(entry.key)
        if earlier and not self.again and _is_of(earlier, settings, self.seed):
            return earlier
        best = settings[0]
        if len(settings) > 1:
            self.measure_experts(self.choices)
            for setting in settings:
                tried = self.measured(self.choices, setting.label, [setting], samples)
                entry.tried[setting.label] = self.choices.score(tried)
            # A setting whose result is NaN is never chosen.
            best = max(settings, key=lambda setting: _or_worst(entry.tried[setting.label]))
            entry.chosen = best.label
        method = reseeded(best.method, self.seed)
        # Fisher squares the gradients of single samples.
        data = self._data(samples, 1 if "loss" in method.needs else CALIBRATION_BATCH)
        merger = merge(self.suite, self.loaded, data, method, self.seed)
        entry.seconds, entry.settings = round(merger.report.seconds, 2), method.describe()
        entry.size = sizes(self.suite, merger.report, self.loaded.experts)
        held_out = results.split == entry.source == "val"
        batches = {} if held_out else self._batches
        entry.values = evaluate(self.suite, merger.modules, data, results.split, batches, held_out)
        self._keep(results, entry)
        return entry

    def _entry(self, name: str, samples: int = 0, source: str = "") -> Entry:
        trained, digest = self.suite.folder(self.seed).parent.name, self.loaded.digest
        return Entry(name, self.seed, samples, source, trained, {}, digest, versions=versions())

    def _data(self, samples: int, batch_size: int = CALIBRATION_BATCH) -> MergeDataModule:
        data = MergeDataModule(
            self._task_data, samples, self.source, holdout=False, batch_size=batch_size, seed=self.seed
        )
        data.setup("validate")
        for task, task_data in data.tasks.items():
            if (there := len(getattr(task_data, f"{self.source}_dataloader")().dataset)) < samples:
                message = f"{self.suite.name}: {samples} samples of {task} are asked for, and {self.source} has {there}"
                raise ValueError(f"{message}; give fewer --samples, or another --source")
        return data

    def _keep(self, results: Results, entry: Entry) -> None:
        results.add(entry)
        message = " ".join(f"{task} {value:.4f}" for task, value in entry.values.items())
        what = f"{entry.method}{f' = {entry.chosen}' if entry.chosen else ''} on {results.split}"
        what += f" with {entry.samples} samples" if entry.samples else ""
        line = f"{self.suite.name}, seed {self.seed}, {what}: mean normalised {100 * results.score(entry):.1f} %"
        print(f"{line}, {entry.seconds:.1f} s; {message}", file=sys.stderr, flush=True)


class _Merger(ChainOfMergesCallback):
    """A callback that only merges; :func:`evaluate` measures the result."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pass


def merge(
    suite: Suite, loaded: Experts, data: MergeDataModule, method: MergingMethod, seed: int
) -> ChainOfMergesCallback:
    """Merge the experts, during the shortest possible validation."""
    seed_everything(seed, verbose=False)
    merger = _Merger({**loaded.experts}, method, private=list(suite.private), baselines=False, base=loaded.base)
    # The limit applies to calibration too, so that it must leave room for all calibration batches.
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
    batches: Batches,
    held_out: bool = False,
) -> dict[str, float]:
    """Measure each task's module on a split; on val, on the first :data:`VAL_SAMPLES` samples.

    Args:
        suite: the suite with the metric.
        modules: task -> module.
        data: the data of all tasks.
        split: ``"test"`` or ``"val"``.
        batches: the batches of earlier calls, which are kept there.
        held_out: whether to leave out samples of val that were used for calibration.

    Returns:
        Task -> metric.
    """
    values = {}
    for task, module in tqdm(modules.items(), desc="testing", leave=False):
        if (split, task) not in batches:
            batches[split, task] = _read_batches(data, task, split, held_out)
        with quiet_lightning():
            trainer = _trainer()
            measure = trainer.test if split == "test" else trainer.validate
            dataset: Any = batches[split, task]  # a loader accepts a list
            loader = DataLoader[Any](dataset, batch_size=None)
            logged = measure(module, dataloaders=loader, verbose=False)[0]
        values[task] = float(logged[f"{split}_{suite.metric}"])
    return values


def _read_batches(data: MergeDataModule, task: str, split: str, held_out: bool) -> list[Any]:
    task_data = data.tasks[task]
    task_data.setup("test" if split == "test" else "validate")
    if split == "test":
        return list(task_data.test_dataloader())
    loader = task_data.val_dataloader()
    if held_out:
        others = MergeDataModule(data.tasks, data.num_samples, "val", holdout=True, seed=data.seed)
        loader = others.task(task, prepared=True).val_dataloader()
    return list(islice(loader, max(VAL_SAMPLES // loader.batch_size, 1)))


def sizes(suite: Suite, report: MergeReport, experts: Mapping[str, LightningModule]) -> dict[str, int]:
    """How many values a merge consists of, see :class:`~benchmarks.suites.results.Entry`."""
    counts = dict(report.sizes)
    private, corrections = counts.pop("private", 0), counts.pop("correction", 0)
    heads = sum(
        tensor.numel()
        for expert in experts.values()
        for name, tensor, _ in named_tensors(expert)
        if matches_any(name, suite.private)
    )
    shared, per_task = sum(counts.values()), (private - heads) // len(experts)
    model = shared + per_task + heads // len(experts)
    return {"model": model, "shared": shared, "per_task": per_task + corrections // len(experts)}


def _is_of(entry: Entry, settings: Sequence[Setting], seed: int) -> bool:
    """Whether an entry was measured with these settings. The name is not enough, because defaults may have changed."""
    labels = [setting.label for setting in settings]
    if list(entry.tried) != (labels if len(labels) > 1 else []):
        return False
    method = settings[labels.index(entry.chosen) if entry.chosen else 0].method
    now: dict[str, object] = json.loads(json.dumps(reseeded(method, seed).describe(), default=str))
    # Options that are newer than the entry are off by default.
    off = {field.name: field.default for field in fields(ChainOptions)}
    return entry.settings == {
        name: value for name, value in now.items() if name in entry.settings or value != off.get(name, ...)
    }


def _or_worst(score: float) -> float:
    return -math.inf if math.isnan(score) else score


def _trainer(**options: Any) -> Trainer:
    quiet: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
    # Tensors that are created in inference mode cannot be merged.
    return Trainer(accelerator="auto", devices=1, logger=False, inference_mode=False, **{**quiet, **options})
