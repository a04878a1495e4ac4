"""Several merging rules on the same experts and data, side by side."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from com_lightning.analysis.comparison import Comparison, Drift, Outcome, TaskMetrics
from com_lightning.analysis.comparison_html import comparison_html
from com_lightning.analysis.comparison_plots import save_pictures
from com_lightning.analysis.splits import Splits, split
from com_lightning.callback import ChainOfMergesCallback
from com_lightning.core.chain.drift import measure_drift
from com_lightning.core.sweep.context import Context, Progress, about, each
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.digest import digest
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.environment import package_versions
from com_lightning.errors import MergeError, some
from com_lightning.execution import calibration_tasks, execute
from com_lightning.methods import Average, ChainOfMerges, MergeJob, MergingMethod, RegMean
from com_lightning.methods.base import Need
from com_lightning.methods.naming import Rule, as_rule
from com_lightning.options import MergeOptions
from com_lightning.plan import MergePlan
from com_lightning.progress import drawn
from com_lightning.results.atomic import Workplace
from com_lightning.results.fingerprint import (
    combined,
    fingerprint_of_base,
    fingerprint_of_data,
    fingerprint_of_experts,
    readable,
)
from com_lightning.results.folder import output_problems
from com_lightning.results.importance_plot import importance_of
from com_lightning.results.journal import ResultStore
from com_lightning.results.report import MergeReport
from com_lightning.shared_weights import average_shared
from com_lightning.strategies import peers_of, together
from com_lightning.validation import borrowed, single_device_trainer, validate_tasks


class SeveralRules(MergingMethod):
    """What several rules need, so that one plan serves all of them.

    Args:
        rules: the rules.
    """

    def __init__(self, rules: Sequence[MergingMethod]) -> None:
        super().__init__()
        self.rules = rules
        self.needs = frozenset[Need]().union(*(rule.needs for rule in rules))
        self.options = next((rule.options for rule in rules if rule.options), None)

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        raise NotImplementedError

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return [f"{rule}: {problem}" for rule in self.rules for problem in rule.problems(tasks)]


def rules_to_compare(methods: Sequence[Rule] | None = None, method: Rule | None = None) -> list[MergingMethod]:
    """All rules of a comparison: the listed ones, one more, and the plain average if no average is listed.

    Args:
        methods: the listed rules. ``None``: RegMean and ChainOfMerges.
        method: one more rule, unless it is listed.

    Returns:
        The rules; those that were not listed come first.

    Raises:
        MergeError: if something else than rules is listed, or a rule is listed twice.
    """
    if methods is not None and (not methods or isinstance(methods, str)):
        raise MergeError([f"methods: must be a list of rules, such as [TIES(), RegMean()], got {methods!r}"])
    rules = [as_rule(rule) for rule in methods or (RegMean(), ChainOfMerges())]
    labels = [str(rule) for rule in rules]
    if twice := dict.fromkeys(label for label in labels if labels.count(label) > 1):
        raise MergeError([f"methods: {label} is listed twice" for label in twice])
    more = [] if method is None or str(as_rule(method)) in labels else [as_rule(method)]
    return [Average()] * all(type(rule) is not Average for rule in more + rules) + more + rules


def reseeded(method: MergingMethod, seed: int) -> MergingMethod:
    """A copy of a rule with ``seed`` added to its own seed, if it has one, and to those of the rules within it.

    Args:
        method: the rule.
        seed: the seed of a run.

    Returns:
        The copy.

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


def rule_and_size(method: MergingMethod) -> tuple[str, dict[str, Any]]:
    """The class of a rule with those of the rules within it, and what is set of what changes the size of the result.

    Returns:
        Both.

    Example::

        >>> from com_lightning import ChainOfMerges, Refitted
        >>> rule_and_size(Refitted(ChainOfMerges(task_rank=2)))
        ('Refitted(ChainOfMerges)', {'task_rank': 2})
    """
    inner = [rule_and_size(value) for value in vars(method).values() if isinstance(value, MergingMethod)]
    described = method.describe()
    settings = {name: value for _, more in inner for name, value in more.items()}
    settings.update({name: described[name] for name in method.size_settings if described.get(name)})
    classes = f"({', '.join(rule for rule, _ in inner)})" if inner else ""
    return f"{type(method).__name__}{classes}", settings


def grid(method: MergingMethod) -> str:
    """What rules have in common of which the best is reported: the classes, and the size of the result.

    A larger result is not chosen because it is more accurate: what it costs is reported beside.

    Returns:
        A text that all of them share.

    Example::

        >>> from com_lightning import ChainOfMerges
        >>> grid(ChainOfMerges(ridge=0.1, task_rank=2))
        'ChainOfMerges, task_rank=2'
    """
    rule, settings = rule_and_size(method)
    return ", ".join([rule, *(f"{name}={value}" for name, value in settings.items())])


def plan_comparison(
    merger: ChainOfMergesCallback,
    model: LightningModule,
    data: MergeDataModule,
    rules: Sequence[MergingMethod],
    seeds: Sequence[int] | None,
    problems: list[str],
) -> tuple[MergePlan, Splits]:
    """Check everything, and split the data.

    Args:
        merger: experts and options, with :class:`SeveralRules` for its method.
        model: a module of the experts' class.
        data: the tasks' data, set up.
        rules: the rules.
        seeds: of the calibration samples. ``None``: that of ``data``.
        problems: found elsewhere, to be reported with the others.

    Returns:
        One plan for all rules, and the splits.

    Raises:
        MergeError: with all problems at once.
    """
    problems, plan, splits = [*problems], None, None
    seeds = [data.seed] if seeds is None else list(seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        problems.append(f"seeds: must be one or more, each of them once, got {seeds}")
    try:
        plan = merger.plan(model, data, becomes_first=False, writes=False)
    except MergeError as error:
        problems += error.problems
    if not data.problems() and seeds:
        has_grid = len({grid(rule) for rule in rules}) < len(rules)
        try:
            splits = split(data, seeds, any("data" in rule.needs for rule in rules), has_grid)
        except MergeError as error:
            problems += error.problems
    if problems or plan is None or splits is None:
        raise MergeError(problems)
    return plan, splits


@dataclass(eq=False)
class Compare(Callback):
    """Merges by every rule at the start of ``trainer.validate``, on the device and with the processes of that trainer.

    Each merge is validated and written down as it is done. Experts are loaded once, and no merge changes them.

    Args:
        plan: the experts, and what they share.
        rules: the rules. Those of one :func:`grid` are settings of one rule: the best of them on the selection split
            is reported.
        splits: the data.
        output_dir: folder for the result.
        options: as for a merge.
    """

    merges_tasks: ClassVar[bool] = True
    plan: MergePlan
    rules: Sequence[MergingMethod]
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
            with torch.inference_mode(False), together(peers), borrowed(trainer), drawn(trainer) as progress:
                if peers.rank == 0:
                    workplace = Workplace(Path(self.output_dir), discard_journal=not self.options.resume)
                self.comparison = self._compare(trainer, peers, workplace, progress)
                if workplace:
                    self._write(workplace, self.comparison)
        finally:
            if workplace:
                workplace.close(keep=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._peers.explain(exception)

    def _compare(self, trainer: Trainer, peers: Peers, workplace: Workplace | None, progress: Progress) -> Comparison:
        plan, evaluator = self.plan, single_device_trainer(trainer)
        names = ["report"] + ["selection"] * (self.splits.selection is not None)
        folder, context = (workplace.journal, self._fingerprint(trainer)) if workplace else (Path(), {})
        store = ResultStore(folder, peers, context)
        result = Comparison(list(plan.experts), splits=str(self.splits), counts=self.splits.counts)

        def validated(modules: Mapping[str, LightningModule], part: str, label: object) -> TaskMetrics:
            data = self.splits.part(part)
            return validate_tasks(evaluator, modules, data, str(label), progress, prepared=True, peers=peers)

        key: dict[str, Any]
        for name in names:
            key = {"experts": name, "of": self._samples(name)}
            result.experts[name] = store.get(key) or store.add(key, validated(plan.experts, name, "experts"))
        report = MergeReport(metrics={"expert": result.experts["report"]})
        report.choose_monitor(self.options.monitor, self.options.mode)
        result.monitor, result.mode = report.monitor, report.mode
        result.warnings = plan.parameters.warnings + report.warnings + self._unlike()
        merges = [(rule, seed) for rule in self.rules for seed in (self.splits.seeds if _varies(rule) else [None])]
        for rule, seed in each(merges, progress, "comparing rules"):
            # What is validated depends on all seeds, and on whether the rule is one of a grid.
            parts = names if [grid(other) for other in self.rules].count(grid(rule)) > 1 else ["report"]
            method = reseeded(rule, seed or 0)
            key = {"method": method.describe(), "seed": seed, "of": [self._samples(part) for part in parts]}
            if (outcome := store.get(key)) is None:
                label = str(rule) if seed is None else f"{rule}, seed {seed}"
                merged, modules = self._merge(trainer, method, str(rule), seed, about(progress, f"by {label}"))
                merged.metrics = {part: validated(modules, part, rule) for part in parts}
                del modules
                outcome = store.add(key, asdict(merged))
            result.outcomes.append(Outcome(**{**outcome, "label": str(rule), "name": grid(rule)}))
        if chains := [outcome for outcome in result.outcomes if outcome.drift]:
            seed = chains[0].seed
            key = {"drift of": "average", "seed": seed}
            result.average_drift = store.get(key) or store.add(key, self._average_drift(trainer, seed, progress))
        result.memory_is_of_each = _forget_peak(trainer.strategy.root_device)
        return result

    def _unlike(self) -> list[str]:
        """What is to be said if some rules solve private layers and others do not: then more differs than the rule."""
        # The plain average is in every comparison, as what all rules are to be better than.
        solving = [str(rule) for rule in self.rules if rule.refits_heads]
        others = [str(rule) for rule in self.rules if not rule.refits_heads and not isinstance(rule, Average)]
        if not (solving and others and any(self.plan.parameters.private.values())):
            return []
        return [
            f"some rules solve private layers, such as heads, for the merged model ({some(solving)}), and others leave "
            f"them as they are in the experts ({some(others)}); to compare like with like, put Refitted(method=...) "
            "around the latter, or give the former refit_heads=False"
        ]

    def _samples(self, part: str) -> str:
        kept = self.splits.part(part).kept
        return digest({task: [None if p is None else sorted(p) for p in parts] for task, parts in kept.items()})

    def _run(self, progress: Progress) -> Context:
        options = self.options
        return Context(
            peers=self._peers, memory_budget=options.budget, on_bad_batch=options.on_bad_batch, progress=progress
        )

    def _merge(
        self, trainer: Trainer, method: MergingMethod, label: str, seed: int | None, progress: Progress
    ) -> tuple[Outcome, dict[str, LightningModule]]:
        plan = replace(
            self.plan,
            method=method,
            layers=self.plan.layers if method.options else {},
            base=self.plan.base if "base" in method.needs else None,
        )
        _forget_peak(trainer.strategy.root_device)
        try:
            data = self.splits.part("report", seed)
            modules, report = execute(plan, trainer, data, self._run(progress), self.options)
        except Exception as error:
            error.add_note(f"This was {label}; what had been merged before is kept.")
            raise
        warnings = [warning for warning in report.warnings if warning not in self.plan.parameters.warnings]
        warnings += [f"skipped: {batch}" for batch in report.skipped]
        outcome = Outcome(grid(method), label, report.method, seed, {}, report.seconds, report.peak_memory)
        outcome.drift, outcome.warnings = _drift(report.layers), warnings
        outcome.rule, outcome.size_settings = rule_and_size(method)
        outcome.size = report.size.merged.bytes, report.size.experts.bytes
        outcome.importance = importance_of(report.layers)
        return outcome, modules

    def _average_drift(self, trainer: Trainer, seed: int | None, progress: Progress) -> Drift:
        plan = replace(self.plan, method=ChainOfMerges())
        data, peers = self.splits.part("report", seed), self._peers
        tasks, _ = calibration_tasks(plan, trainer, data, peers, self.options.offload)
        merged = average_shared(plan, device=trainer.strategy.root_device)
        with torch.compiler.set_stance("force_eager"):  # as in a merge
            return _drift(measure_drift(tasks, merged, self._run(about(progress, "of the average"))))

    def _fingerprint(self, trainer: Trainer) -> dict[str, str]:
        """What every merge depends on, beside its rule and seed."""
        data = copy.copy(self.splits.data)
        limit = trainer.limit_val_batches if data.split == "val" else trainer.limit_train_batches
        reads_data = "data" in self.plan.method.needs
        if not reads_data:  # a few samples show whether it is the same data
            data.split, data.num_samples = "val", 8
        tasks = []
        for name, expert in self.plan.experts.items():
            sized = self.splits.counts[name]["report"] is not None
            batches = data.calibration(name, limit).batches if reads_data or sized else []
            tasks.append(Task(name, expert, [batch for batch, _ in batches]))
        data = self.splits.data
        settings = {
            "shared parameters": self.plan.parameters.shared,
            "samples": [data.num_samples, data.split, data.batch_size, data.augmented_copies],
            "limits": [trainer.limit_val_batches, trainer.limit_train_batches],
            "on_bad_batch": self.options.on_bad_batch,
            "precision": trainer.precision,
            "device": trainer.strategy.root_device.type,
            "processes": trainer.world_size,
            "versions": package_versions(),
        }
        given, exact = self.plan.files, self.options.resume == "exact"
        known = {**fingerprint_of_experts(tasks, given, exact), **fingerprint_of_base(self.plan.base, given, exact)}
        return {**known, **combined(tasks, [fingerprint_of_data(tasks)]), **readable(settings)}

    def _write(self, workplace: Workplace, comparison: Comparison) -> None:
        if problems := output_problems(Path(self.output_dir), self.options.overwrite):
            raise MergeError(problems)
        texts = {"report.json": comparison.to_json(), "report.md": comparison.to_markdown(), **self.options.files}

        def write(made: Path) -> None:
            for name, text in texts.items():
                (made / name).write_text(text, encoding="utf-8")
            save_pictures(comparison, made)
            (made / "report.html").write_text(comparison_html(comparison, made), encoding="utf-8")

        try:
            workplace.publish(write)
        except OSError as error:
            raise MergeError([f"output_dir: {self.output_dir} could not be written ({error})"]) from error
        shutil.rmtree(workplace.journal, ignore_errors=True)


def _varies(method: MergingMethod) -> bool:
    """Whether runs with different seeds may give different merges."""
    return "data" in method.needs or reseeded(method, 1).describe() != method.describe()


def _drift(records: Sequence[LayerRecord]) -> Drift:
    return [(record.name, dict(record.distance)) for record in records if record.distance and record.task is None]


def _forget_peak(device: torch.device) -> bool:
    """Start the measurement of peak memory anew, and return whether this system can do that (macOS cannot)."""
    if device.type == "cuda":  # a merge does so itself
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
