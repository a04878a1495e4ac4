"""A trainer that can merge, and validate what was merged: what the command line runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn

from com_lightning.analysis.compare import Compare, SeveralRules, plan_comparison, rules_to_compare
from com_lightning.analysis.comparison import Comparison
from com_lightning.callback import ChainOfMergesCallback
from com_lightning.core.sweep.context import own_modes
from com_lightning.core.tensors.modules import copy_with_tensors
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError, reason, some
from com_lightning.merging import as_tasks, run, set_up
from com_lightning.methods import MergingMethod
from com_lightning.progress import drawn
from com_lightning.results.folder import has_calibrated, load_results, output_problems
from com_lightning.results.report import MergeReport
from com_lightning.strategies import known_as_parent, returns_nothing
from com_lightning.validation import borrowed, single_device_trainer, validate_tasks


class MergeTrainer(Trainer):
    """A ``Trainer`` with :meth:`merge`, for the command line. In Python call :func:`com_lightning.merge`."""

    def merge(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        experts: dict[str, str] | None = None,
        method: MergingMethod | str | None = None,
        base: str | None = None,
        output_dir: str = "outputs/merge",
        dry_run: bool = False,
        **options: Any,
    ) -> MergeReport:
        """Merge experts into one model, save it, and validate every task.

        Args:
            model: a module of the experts' class; it is not changed.
            datamodule: a MergeDataModule, the data of all tasks. Without it nothing is validated, and the method must
                be one that needs no data.
            experts: task -> its expert: a Lightning checkpoint, a state dict or a safetensors file, a folder written by
                save_pretrained of transformers or PEFT, or the name of such a model on the Hugging Face Hub
                (hf://owner/name). Relative paths start at the working directory.
            method: the merging rule, such as TIES or "TIES(density=0.1)"; by default ChainOfMerges.
            base: the model that the experts were fine-tuned from, in any form that an expert may have. Some methods
                need it (task arithmetic and its relatives). By default it is the model with its current weights.
            output_dir: folder for the merged weights, one Lightning checkpoint for each task, and the report.
            dry_run: only check everything, and print what would be merged and how much memory it takes. This runs one
                calibration batch of each task.
            options: see MergeOptions.

        Returns:
            The report, which is also printed.

        Raises:
            MergeError: with all problems at once, before any calibration batch is read.
        """
        sources: dict[str, Any] = dict(experts or {})
        merger = ChainOfMergesCallback(sources, method, verbose=False, base=base, output_dir=output_dir, **options)
        plan = run(merger, model, datamodule, self, dry_run)
        if dry_run:
            self._print(plan)
        else:
            self._print(merger.report if merger.merged else None, output_dir)
        return merger.report

    def compare(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        experts: dict[str, str] | None = None,
        methods: list[MergingMethod | str] | None = None,
        seeds: list[int] | None = None,
        method: MergingMethod | str | None = None,
        base: str | None = None,
        output_dir: str = "outputs/comparison",
        dry_run: bool = False,
        **options: Any,
    ) -> Comparison:
        """Merge the same experts by several rules, and write tables and pictures of what each is worth.

        The samples that are calibrated on are held out of those that are reported. Where a rule is listed with
        several settings, they are a grid: the best one on a half of the other samples is reported on the other half. No
        weights are written: merge by the rule of your choice.

        Args:
            model: a module of the experts' class; it is not changed.
            datamodule: a MergeDataModule, the data of all tasks.
            experts: as for merge.
            methods: the rules, such as [TIES, "TIES(density=0.1)", RegMean]; by default RegMean and ChainOfMerges. The
                same class with different settings is one grid, of which the best setting is reported. The plain average
                is always among the rules.
            seeds: seeds of the calibration samples; rules that need data merge once for each. By default that of the
                datamodule.
            method: one more rule, as for merge, so that the configuration of a merge can be used.
            base: as for merge.
            output_dir: folder for the tables and pictures.
            dry_run: only check everything, and print what would be merged and which data are used for what.
            options: see MergeOptions.

        Returns:
            What was found, which is also printed.

        Raises:
            MergeError: with all problems at once, before any calibration batch is read.
        """
        data = as_tasks(datamodule)
        rules = rules_to_compare(methods, method)
        sources: dict[str, Any] = dict(experts or {})
        joint = SeveralRules(rules)
        merger = ChainOfMergesCallback(sources, joint, verbose=False, baselines=False, base=base, **options)
        overwrite = merger.options.overwrite
        with own_modes(), borrowed(self):
            with set_up(self, data, output_dir, dry_run):
                problems = output_problems(Path(output_dir), overwrite) if self.is_global_zero else []
                plan, splits = plan_comparison(merger, model, data, rules, seeds, problems)
            if dry_run:
                labels = "".join(f"\n- {rule}" for rule in rules)
                self._print(f"{plan}\n\n{splits}\n\nTo be compared:{labels}")
                return Comparison(list(plan.experts))
            for warning in plan.parameters.warnings:
                rank_zero_warn(warning)
            compare = Compare(plan, rules, splits, output_dir, merger.options)
            self.callbacks.append(compare)  # type: ignore[attr-defined]
            with known_as_parent():
                first = copy_with_tensors(next(iter(plan.experts.values())))
                super().validate(first, datamodule=splits.part("report"), verbose=False)
        self._print(compare.comparison, output_dir)
        if compare.comparison is None and not returns_nothing(self):
            rank_zero_warn("nothing was merged: limit_val_batches leaves nothing to validate")
        return compare.comparison or Comparison(list(plan.experts))

    def _print(self, result: Any, folder: str | None = None) -> None:
        """Print a result, or, if it was made in other processes, what they have written."""
        if result is None and folder and returns_nothing(self):
            result = (Path(folder) / "report.md").read_text(encoding="utf-8")
        if result is not None and self.is_global_zero:
            print(f"\n{result}\n\nWritten to {folder}." if folder else result)

    def validate(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        merged: str | None = None,
    ) -> Any:
        """Validate a model, or with ``merged`` the result of a merge on every task.

        Args:
            model: the model; with ``merged``, any module of the class that was merged.
            dataloaders: as for ``Trainer.validate``.
            ckpt_path: as for ``Trainer.validate``.
            verbose: print the result.
            datamodule: the data; with ``merged``, a MergeDataModule.
            weights_only: as for ``Trainer.validate``.
            merged: folder that a merge has written (its output_dir).

        Returns:
            As ``Trainer.validate``; with ``merged`` one dictionary of metrics per task.
        """
        if merged is None:
            options: dict[str, Any] = {} if weights_only is None else {"weights_only": weights_only}  # Lightning 2.6
            return super().validate(model, dataloaders, ckpt_path, verbose, datamodule, **options)
        return self._evaluate_merged(model, datamodule, merged, verbose, "validate")

    def test(
        self,
        model: LightningModule | None = None,
        dataloaders: Any = None,
        ckpt_path: str | Path | None = None,
        verbose: bool = True,
        datamodule: LightningDataModule | None = None,
        weights_only: bool | None = None,
        merged: str | None = None,
    ) -> Any:
        """Test a model, or with ``merged`` the result of a merge on every task.

        Args:
            model: the model; with ``merged``, any module of the class that was merged.
            dataloaders: as for ``Trainer.test``.
            ckpt_path: as for ``Trainer.test``.
            verbose: print the result.
            datamodule: the data; with ``merged``, a MergeDataModule.
            weights_only: as for ``Trainer.test``.
            merged: folder that a merge has written (its output_dir).

        Returns:
            As ``Trainer.test``; with ``merged`` one dictionary of metrics per task.
        """
        if merged is None:
            options: dict[str, Any] = {} if weights_only is None else {"weights_only": weights_only}  # Lightning 2.6
            return super().test(model, dataloaders, ckpt_path, verbose, datamodule, **options)
        return self._evaluate_merged(model, datamodule, merged, verbose, "test")

    @own_modes()
    def _evaluate_merged(
        self, model: Any, datamodule: Any, folder: str, verbose: bool, stage: str
    ) -> list[dict[str, float]]:
        data = as_tasks(datamodule)
        data.trainer = self
        data.prepare_data()
        data.setup(stage)
        if problems := _evaluation_problems(model, data, stage):
            raise MergeError(problems)
        data.calibrates = has_calibrated(Path(folder))
        modules = load_results(Path(folder), model, list(data.tasks), data.set_up_module)
        report = MergeReport(tasks=list(modules))
        with drawn(self) as progress:
            report.metrics["merged"] = validate_tasks(
                single_device_trainer(self), modules, data, "merged", progress, stage
            )
        report.choose_monitor()
        if verbose:
            held = [name for name in data.tasks if stage == "validate" and data.holds_out(name)]
            note = f"\n\nThe calibration samples of {some(held)} were left out." if held else ""
            print(f"\n{report.monitor_label}\n\n{report.task_table()}{note}")
        return list(report.metrics["merged"].values())


def _evaluation_problems(model: LightningModule, data: MergeDataModule, stage: str) -> list[str]:
    """Find out why tasks cannot be validated or tested: Lightning would tell of the first one only."""
    step, split = ("validation_step", "val") if stage == "validate" else ("test_step", "test")
    problems = []
    if not is_overridden(step, model):
        problems.append(f"model: {type(model).__name__} has no {step}, which `{stage}` runs; add one")
    for name in data.tasks:
        try:
            given = bool(data.loaders(name, split))
        except Exception as error:
            problems.append(f"task '{name}': its datamodule gives no {split} loader ({reason(error)})")
            continue
        if not given:
            problems.append(f"task '{name}': its datamodule gives no {split} loader; `{stage}` needs one")
    return problems
