"""Several merging rules on the same experts and data, side by side."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from tqdm.auto import tqdm

from com_lightning.analysis.comparison import Comparison, Outcome, TaskMetrics
from com_lightning.analysis.comparison_plots import save_pictures
from com_lightning.analysis.splits import Splits, split
from com_lightning.callback import ChainOfMergesCallback
from com_lightning.core.chain.drift import measure_drift
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError
from com_lightning.execution import _versions, average_shared, calibration_tasks, execute
from com_lightning.methods import Average, ChainOfMerges, MergeJob, MergingMethod
from com_lightning.methods.base import Need
from com_lightning.methods.registry import Setting, read_methods
from com_lightning.options import MergeOptions
from com_lightning.plan import MergePlan
from com_lightning.results.atomic import Workplace
from com_lightning.results.fingerprint import combined, digest, fingerprint_of_data, fingerprint_of_experts, readable
from com_lightning.results.folder import output_problems
from com_lightning.results.journal import ResultStore
from com_lightning.results.report import MergeReport
from com_lightning.strategies import peers_of, together
from com_lightning.validation import borrowed, single_device_trainer, validate_tasks


class SeveralRules(MergingMethod):
    """What several rules need, so that one plan serves them all."""

    def __init__(self, settings: Sequence[Setting]) -> None:
        super().__init__()
        self.settings = settings
        self.needs = frozenset[Need]().union(*(setting.method.needs for setting in settings))
        self.options = next((setting.method.options for setting in settings if setting.method.options), None)

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        raise NotImplementedError

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return [f"{setting.label}: {told}" for setting in self.settings for told in setting.method.problems(tasks)]


def compared(methods: str | Sequence[Any], method: MergingMethod | None = None) -> list[Setting]:
    """The rules of a list, one more, and the plain average, which is always there to compare with.

    Raises:
        MergeError: with all that is wrong with the list.
    """
    settings = read_methods(methods)
    known = [setting.method.describe() for setting in settings]
    for extra in [Average()] if method is None else [Average(), method]:
        if extra.describe() not in known:
            settings[:0] = read_methods([extra])
            known.append(extra.describe())
    return settings


def reseeded(method: MergingMethod, seed: int) -> MergingMethod:
    """A copy of a method that draws at random by its own seed and that of a run, and so do the rules that it takes.

    Example::

        >>> from com_lightning import DARE
        >>> reseeded(DARE(seed=10), 2).seed
        12
    """
    copied = copy.copy(method)
    for name, value in vars(method).items():
        if isinstance(value, MergingMethod):
            setattr(copied, name, reseeded(value, seed))
        elif name == "seed":
            setattr(copied, name, value + seed)
    return copied


def _differs(method: MergingMethod) -> bool:
    """Whether runs with different seeds may give different merges."""
    return "data" in method.needs or reseeded(method, 1).describe() != method.describe()


def checked(
    merger: ChainOfMergesCallback,
    model: LightningModule,
    data: MergeDataModule,
    settings: Sequence[Setting],
    seeds: Sequence[int] | None,
    problems: Sequence[str] = (),
) -> tuple[MergePlan, Splits]:
    """One plan for all rules, and the parts of the data.

    Raises:
        MergeError: with all problems at once, those that are given among them.
    """
    found, plan, splits = list(problems), None, None
    seeds = [data.seed] if seeds is None else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        found.append(f"seeds: must be one or more, each of them once, got {seeds}")
    try:
        plan = merger.plan(model, data, becomes_first=False, writes=False)
    except MergeError as error:
        found += error.problems
    if not data.problems() and seeds:
        choice = len({setting.name for setting in settings}) < len(settings)
        try:
            splits = split(data, seeds, any("data" in setting.method.needs for setting in settings), choice)
        except MergeError as error:
            found += error.problems
    if found or plan is None or splits is None:
        raise MergeError(found)
    return plan, splits


@dataclass(eq=False)
class Compare(Callback):
    """Merges by every rule at the start of ``trainer.validate``, on the device and with the processes of that trainer.

    Each merge is validated and written down as it is done; experts are loaded once, and a merge leaves them as they
    are.

    Args:
        plan: experts and what is shared.
        settings: the rules.
        splits: of the data.
        output_dir: folder for the result.
        options: as for a merge.
    """

    plan: MergePlan
    settings: Sequence[Setting]
    splits: Splits
    output_dir: str
    options: MergeOptions
    comparison: Comparison | None = None
    _peers: Peers = field(default_factory=Peers)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.comparison is not None or trainer.sanity_checking:
            return
        peers = self._peers = peers_of(trainer)
        workplace: Workplace | None = None
        try:
            # Calibration forwards log nowhere.
            with torch.inference_mode(False), together(peers), borrowed(trainer, loggers=[DummyLogger()]):
                if peers.rank == 0:
                    workplace = Workplace(Path(self.output_dir), afresh=not self.options.resume)
                self.comparison = self._compare(trainer, peers, workplace)
                if workplace:
                    self._write(workplace, self.comparison)
        finally:
            if workplace:
                workplace.close(keep=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._peers.explain(exception)

    def _compare(self, trainer: Trainer, peers: Peers, workplace: Workplace | None) -> Comparison:
        plan, quiet = self.plan, trainer.progress_bar_callback is None or not trainer.is_global_zero
        evaluator = single_device_trainer(trainer)
        names = ["report"] + ["selection"] * (self.splits.selection is not None)
        folder, context = (workplace.journal, self._fingerprint(trainer)) if workplace else (Path(), {})
        known = ResultStore(folder, peers, context)
        result = Comparison(list(plan.experts), splits=str(self.splits), counts=self.splits.counts)
        result.warnings = list(plan.parameters.warnings)

        def validated(modules: Mapping[str, LightningModule], part: str, label: str) -> TaskMetrics:
            return validate_tasks(evaluator, modules, self.splits.part(part), label, quiet, prepared=True, peers=peers)

        key: dict[str, Any]
        for name in names:
            key = {"experts": name, "of": self._samples(name)}
            result.experts[name] = known.get(key) or known.add(key, validated(plan.experts, name, "experts"))
        report = MergeReport(metrics={"expert": result.experts["report"]})
        report.choose_monitor(self.options.monitor, self.options.mode)
        result.metric, result.warnings = report.monitor, result.warnings + report.warnings
        merges = [
            (setting, seed)
            for setting in self.settings
            for seed in (self.splits.seeds if _differs(setting.method) else [None])
        ]
        with tqdm(merges, desc="comparing", disable=quiet) as bar:
            for setting, seed in bar:
                bar.set_postfix_str(setting.label if seed is None else f"{setting.label}, seed {seed}")
                # What is validated depends on all seeds, and on whether settings are chosen.
                parts = [part for part in names if part == "report" or self._has_choice(setting)]
                own = replace(setting, method=reseeded(setting.method, seed or 0))
                key = {"method": own.method.describe(), "seed": seed, "of": [self._samples(p) for p in parts]}
                if (found := known.get(key)) is None:
                    outcome, modules = self._merge(trainer, peers, own, seed, quiet)
                    outcome.metrics = {part: validated(modules, part, setting.label) for part in parts}
                    del modules
                    found = known.add(key, asdict(outcome))
                result.outcomes.append(Outcome(**{**found, "name": setting.name, "label": setting.label}))
        chains = [outcome for outcome in result.outcomes if outcome.shift]
        if chains:
            key = {"shift of": "average", "seed": chains[0].seed}
            result.average_shift = known.get(key) or known.add(key, self._average_shift(trainer, peers, chains[0].seed))
        result.memory_is_of_each = _forget_peak(trainer.strategy.root_device)
        return result

    def _has_choice(self, setting: Setting) -> bool:
        return sum(other.name == setting.name for other in self.settings) > 1

    def _samples(self, part: str) -> str:
        kept = self.splits.part(part).kept
        return digest({task: [None if p is None else sorted(p) for p in parts] for task, parts in kept.items()})

    def _run(self, peers: Peers, on_layer: Any = None) -> Run:
        run = Run(peers=peers, memory_budget=self.options.budget, on_bad_batch=self.options.on_bad_batch)
        run.on_layer = on_layer or run.on_layer
        return run

    def _merge(
        self, trainer: Trainer, peers: Peers, setting: Setting, seed: int | None, quiet: bool
    ) -> tuple[Outcome, dict[str, LightningModule]]:
        method = setting.method
        plan = replace(
            self.plan,
            method=method,
            layers=self.plan.layers if method.options else {},
            base=self.plan.base if "base" in method.needs else None,
        )
        _forget_peak(trainer.strategy.root_device)
        with tqdm(total=len(plan.layers) or None, desc="merging", disable=quiet, leave=False) as bar:
            try:
                run = self._run(peers, lambda record: bar.update())
                modules, report = execute(
                    plan, trainer, self.splits.part("report", seed), run, self.options.offload_experts
                )
            except Exception as error:
                error.add_note(f"This was {setting.label}; what had been merged before is kept.")
                raise
        own = [warning for warning in report.warnings if warning not in self.plan.parameters.warnings]
        own += [f"skipped: {batch}" for batch in report.skipped]
        shift = _shift(report.layers)
        outcome = Outcome(setting.name, setting.label, report.method, seed, {}, report.seconds, report.peak_memory)
        outcome.shift, outcome.warnings = shift, own
        return outcome, modules

    def _average_shift(self, trainer: Trainer, peers: Peers, seed: int | None) -> list[tuple[str, dict[str, float]]]:
        plan = replace(self.plan, method=ChainOfMerges())
        data = self.splits.part("report", seed)
        tasks, _ = calibration_tasks(plan, trainer, data, peers.rank, peers.size, self.options.offload_experts)
        merged = average_shared(plan, device=trainer.strategy.root_device)
        with torch.compiler.set_stance("force_eager"):  # as in a merge
            return _shift(measure_drift(tasks, merged, self._run(peers)))

    def _fingerprint(self, trainer: Trainer) -> dict[str, str]:
        """What every merge depends on, beside its rule and seed."""
        data = copy.copy(self.splits.data)
        limit = trainer.limit_val_batches if data.split == "val" else trainer.limit_train_batches
        if "data" not in self.plan.method.needs:  # a few samples tell whether it is the same data
            data.split, data.num_samples = "val", 8
        tasks = []
        for name, expert in self.plan.experts.items():
            read = "data" in self.plan.method.needs or self.splits.counts[name]["report"] is not None
            batches = data.calibration(name, limit).batches if read else []
            tasks.append(Task(name, expert, [batch for batch, _ in batches]))
        data = self.splits.data
        told = {
            "shared parameters": self.plan.parameters.shared,
            "samples": [data.num_samples, data.split, data.batch_size, data.augmented_copies],
            "limits": [trainer.limit_val_batches, trainer.limit_train_batches],
            "on_bad_batch": self.options.on_bad_batch,
            "precision": trainer.precision,
            "device": trainer.strategy.root_device.type,
            "processes": trainer.world_size,
            "base": digest(dict(self.plan.base or {})),
            "versions": _versions(),
        }
        return {**fingerprint_of_experts(tasks), **combined(tasks, [fingerprint_of_data(tasks)]), **readable(told)}

    def _write(self, workplace: Workplace, comparison: Comparison) -> None:
        if problems := output_problems(Path(self.output_dir), self.options.overwrite):
            raise MergeError(problems)
        texts = {"report.json": comparison.to_json(), "report.md": comparison.to_markdown(), **self.options.files}

        def write(made: Path) -> None:
            for name, text in texts.items():
                (made / name).write_text(text, encoding="utf-8")
            save_pictures(comparison, made)

        try:
            workplace.publish(write)
        except OSError as error:
            raise MergeError([f"output_dir: {self.output_dir} could not be written ({error})"]) from error
        shutil.rmtree(workplace.journal, ignore_errors=True)


def _shift(records: Sequence[LayerRecord]) -> list[tuple[str, dict[str, float]]]:
    return [(record.name, dict(record.distance)) for record in records if record.distance and record.task is None]


def _forget_peak(device: torch.device) -> bool:
    """Let the most memory that was ever held count from now on. Returns whether that can be done (not on macOS)."""
    if device.type == "cuda":  # a merge does so itself
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
