"""A trainer that can merge, and validate what was merged: what the command line runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning_utilities.core.rank_zero import rank_zero_warn

from com_lightning.analysis.compare import Compare, SeveralRules, checked, compared
from com_lightning.analysis.comparison import Comparison
from com_lightning.callback import ChainOfMergesCallback
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.tensors.modules import renewed
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError
from com_lightning.memory_estimate import needed
from com_lightning.methods import MergingMethod
from com_lightning.results.folder import load_results, output_problems
from com_lightning.results.report import MergeReport
from com_lightning.strategies import (
    early_peers,
    end_with_parent,
    known_as_parent,
    require_mergeable,
    returns_nothing,
    together,
)
from com_lightning.validation import single_device_trainer, validate_tasks


class MergeTrainer(Trainer):
    """A ``Trainer`` with :meth:`merge`, for the command line. In Python the callback is all that is needed."""

    def merge(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        experts: dict[str, str] | None = None,
        method: MergingMethod | None = None,
        private: list[str] | None = None,
        metric: str | None = None,
        baselines: bool = True,
        output_dir: str = "outputs/merge",
        overwrite: bool = False,
        dry_run: bool = False,
        files: dict[str, str] | None = None,
        grow_vocabulary: bool = False,
        no_resume: bool = False,
        experts_device: Literal["cpu"] | None = None,
        on_bad_batch: Literal["raise", "skip"] = "raise",
        base: str | None = None,
        memory_budget: float | None = None,
    ) -> MergeReport:
        """Merge experts into one model, save it, and validate every task.

        Args:
            model: a module of the experts' class; it is not changed.
            datamodule: a MergeDataModule, the data of all tasks. Without it, nothing is validated, and the method must
                be one that needs no data.
            experts: task -> its expert: a Lightning checkpoint, a state dict or a safetensors file, or a folder that
                transformers' or PEFT's save_pretrained has written, or the name of such a model on the Hugging Face
                Hub (hf://owner/name). Relative paths are relative to the working directory.
            method: the merging rule; ChainOfMerges by default.
            private: patterns of parameters that stay with their task ("head", "*.classifier.*"), all others being
                shared. By default those are private that differ in name or shape.
            metric: the logged metric that tables show; by default the first one that is not a loss.
            baselines: also validate the experts and their plain average, to compare with.
            output_dir: folder for the merged weights, one Lightning checkpoint per task, and the report.
            overwrite: replace an existing output_dir.
            dry_run: only check everything and print what would be merged, and what memory that takes, which one
                calibration batch of each task is run for.
            files: further files for the folder, name -> text.
            grow_vocabulary: if embedding tables differ in length, give all of them the rows of the longest: rows that
                all have are merged, the others kept. Otherwise such tables are an error.
            no_resume: keep no record of merged layers beside output_dir, from which a merge that was killed goes on
                when it is started again.
            experts_device: "cpu": experts stay in memory or their files, and each weight is brought to the device when
                the expert's forward uses it, and no sooner.
            on_bad_batch: what NaN or infinity in a calibration batch does: "raise" an error that names task, batch and
                layer, or "skip" the batch from that layer on, and go on.
            base: the model that the experts were fine-tuned from, for methods that need it (task arithmetic and its
                relatives); a file or folder as for experts. By default the model, with its weights as they are.
            memory_budget: GiB that paused calibration forwards may hold between them; what is more is paged out, from
                an accelerator to host memory, from the CPU to temporary files. By default there is no limit.

        Returns:
            The report, which is also printed.

        Raises:
            MergeError: with all problems at once, before any calibration batch is read.
        """
        require_mergeable(self, output_dir)
        data = _tasks(datamodule) if datamodule is not None else None
        sources: dict[str, Any] = dict(experts or {})
        merger = ChainOfMergesCallback(sources, method, private, metric, baselines, output_dir, overwrite)
        merger.files, merger.grow_vocabulary, merger.base = files or {}, grow_vocabulary, base
        merger.on_bad_batch, merger.no_resume, merger.experts_device = on_bad_batch, no_resume, experts_device
        merger.memory_budget = memory_budget
        end_with_parent()
        peers = Peers() if dry_run else early_peers(self)
        with together(peers):
            if data is not None and (peers.size == 1 or self.local_rank == 0):
                data.trainer = self
                data.prepare_data()
        with together(peers):
            if data is not None:
                data.trainer = self
                data.setup("validate")
            blank = copy.deepcopy(model) if grow_vocabulary else model
            plan = merger.plan(blank, data, becomes_first=False, writes=self.is_global_zero)
        if dry_run:
            if data is not None:
                plan.need = needed(plan, self, data, memory_budget)
            if self.is_global_zero:
                print(plan)
            return merger.report
        if data is None:
            if self.is_global_zero:  # the others would do the same
                merger.merge(model, self)
                print(f"\n{merger.report}\n\nWritten to {output_dir}.")
            return merger.report
        self.callbacks.append(merger)  # type: ignore[attr-defined]
        merger._lent = True
        first = renewed(next(iter(plan.experts.values())))
        assert isinstance(first, LightningModule)
        try:
            with known_as_parent():
                self.validate(first, datamodule=data, verbose=False)
        finally:
            self.callbacks.remove(merger)  # type: ignore[attr-defined]
        if merger.merged and self.is_global_zero:
            print(f"\n{merger.report}\n\nWritten to {output_dir}.")
        elif returns_nothing(self):
            print(f"\n{(Path(output_dir) / 'report.md').read_text(encoding='utf-8')}\n\nWritten to {output_dir}.")
        elif not merger.merged:
            rank_zero_warn("nothing was merged: limit_val_batches leaves nothing to validate")
        return merger.report

    def compare(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        experts: dict[str, str] | None = None,
        methods: str | list[Any] = "regmean,chain",
        seeds: list[int] | None = None,
        method: MergingMethod | None = None,
        private: list[str] | None = None,
        metric: str | None = None,
        output_dir: str = "outputs/comparison",
        overwrite: bool = False,
        dry_run: bool = False,
        files: dict[str, str] | None = None,
        grow_vocabulary: bool = False,
        no_resume: bool = False,
        experts_device: Literal["cpu"] | None = None,
        on_bad_batch: Literal["raise", "skip"] = "raise",
        base: str | None = None,
        memory_budget: float | None = None,
    ) -> Comparison:
        """Merge the same experts by several rules, and write tables and pictures of what each is worth.

        What is calibrated on is held out of what is reported. Where a rule has several settings, the best one on a half
        of the other samples is reported on the other half. No weights are written: merge by the rule of your choice.

        Args:
            model: a module of the experts' class; it is not changed.
            datamodule: a MergeDataModule, the data of all tasks.
            experts: as for merge.
            methods: rules by name, with their settings: "task_arithmetic(scale=[0.2,0.3]),regmean,chain". A list of
                values where a rule takes one is a grid. Or a list of such texts, and of class_path with init_args. The
                plain average is always compared with.
            seeds: of the calibration samples; rules that need data merge once for each. By default that of the
                datamodule.
            method: one more rule, as for merge, so that the configuration of a merge will do.
            private: as for merge.
            metric: the logged metric that tables show, and that settings are chosen by; by default the first one that
                is not a loss.
            output_dir: folder for the tables and pictures.
            overwrite: replace an existing output_dir.
            dry_run: only check everything, and print what would be merged and what data are for what.
            files: further files for the folder, name -> text.
            grow_vocabulary: as for merge.
            no_resume: drop what a comparison that was interrupted has found already; it goes on from there otherwise.
            experts_device: as for merge.
            on_bad_batch: as for merge.
            base: as for merge.
            memory_budget: as for merge.

        Returns:
            What was found, which is also printed.

        Raises:
            MergeError: with all problems at once, before any calibration batch is read.
        """
        require_mergeable(self, output_dir)
        data = _tasks(datamodule)
        settings = compared(methods, method)
        sources: dict[str, Any] = dict(experts or {})
        merger = ChainOfMergesCallback(sources, SeveralRules(settings), private, metric)
        merger.files, merger.grow_vocabulary, merger.base = files or {}, grow_vocabulary, base
        merger.on_bad_batch, merger.experts_device, merger.memory_budget = on_bad_batch, experts_device, memory_budget
        end_with_parent()
        peers = Peers() if dry_run else early_peers(self)
        data.trainer = self
        with together(peers):
            if peers.size == 1 or self.local_rank == 0:
                data.prepare_data()
        with together(peers):
            data.setup("validate")
            blank = copy.deepcopy(model) if grow_vocabulary else model
            problems = output_problems(Path(output_dir), overwrite) if self.is_global_zero else []
            plan, splits = checked(merger, blank, data, settings, seeds, problems)
        if dry_run:
            if self.is_global_zero:
                rules = "".join(f"\n- {setting.label}" for setting in settings)
                print(f"{plan}\n\n{splits}\n\nTo be compared:{rules}")
            return Comparison(list(plan.experts))
        for warning in plan.parameters.warnings:
            rank_zero_warn(warning)
        budget = None if memory_budget is None else int(memory_budget * 2**30)
        compare = Compare(plan, settings, splits, output_dir, overwrite, metric, merger.files, no_resume)
        compare.experts_stay, compare.on_bad_batch = experts_device == "cpu", on_bad_batch
        compare.memory_budget = budget
        self.callbacks.append(compare)  # type: ignore[attr-defined]
        try:
            with known_as_parent():
                first = copy.deepcopy(next(iter(plan.experts.values())))
                super().validate(first, datamodule=splits.part("report"), verbose=False)
        finally:
            self.callbacks.remove(compare)  # type: ignore[attr-defined]
        if compare.comparison is not None and self.is_global_zero:
            print(f"\n{compare.comparison}\n\nWritten to {output_dir}.")
        elif returns_nothing(self):
            print(f"\n{(Path(output_dir) / 'report.md').read_text(encoding='utf-8')}\n\nWritten to {output_dir}.")
        elif compare.comparison is None:
            rank_zero_warn("nothing was merged: limit_val_batches leaves nothing to validate")
        return compare.comparison or Comparison(list(plan.experts))

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
            merges = any(isinstance(callback, ChainOfMergesCallback) for callback in self.callbacks)  # type: ignore[attr-defined]
            if isinstance(datamodule, MergeDataModule) and not merges:
                rank_zero_warn("only the first task is validated; to validate a merge on every task, give `merged`")
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

    def _evaluate_merged(
        self, model: Any, datamodule: Any, folder: str, verbose: bool, stage: str
    ) -> list[dict[str, float]]:
        data = _tasks(datamodule)
        modules = load_results(Path(folder), model, list(data.tasks))
        report = MergeReport(tasks=list(modules))
        quiet = self.progress_bar_callback is None
        report.metrics["merged"] = validate_tasks(single_device_trainer(self), modules, data, "merged", quiet, stage)
        report.choose_metric()
        if verbose:
            print(f"\n{report.metric}\n\n{report.task_table()}")
        return list(report.metrics["merged"].values())


def _tasks(datamodule: Any) -> MergeDataModule:
    if not isinstance(datamodule, MergeDataModule):
        kind = type(datamodule).__name__
        raise MergeError([f"data: must be a com_lightning.MergeDataModule, which holds every task's data; got {kind}"])
    return datamodule
