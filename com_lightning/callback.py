"""The merge as a Lightning callback."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import List, Optional

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from lightning.pytorch.trainer.states import TrainerFn
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from com_lightning.core.peers import Peers
from com_lightning.core.rule import LayerRecord
from com_lightning.core.run import Run
from com_lightning.core.sharing import named_tensors
from com_lightning.datamodule import MergeDataModule
from com_lightning.evaluation import quiet_lightning, single_device_trainer, validate_tasks
from com_lightning.experts import ExpertSource, MergeError
from com_lightning.merger import MergePlan, average_shared, execute, load_into, make_plan, with_shared
from com_lightning.methods import ChainOfMerges, MergingMethod
from com_lightning.processes import peers_of, require_mergeable, together
from com_lightning.report import MergeReport
from com_lightning.results import output_problems, save_results


class ChainOfMergesCallback(Callback):
    """Merges experts at the start of ``trainer.validate``, then validates every task with its merged module.

    Works with any ``Trainer`` and any LightningModule that can be validated: the calibration forward is the module's
    own ``calibration_step(batch)`` if it has one, else its ``validation_step``, with ``log`` muted, run on copies whose
    metrics nobody sees. Padding is left out by the batch's ``attention_mask``, or by ``calibration_mask(batch)`` of the
    module: a boolean mask over positions.

    Parameters with one name and shape in the model and all experts are *shared* and merged, the others (a head with its
    own number of classes) are *private* and stay with their task. The module given to ``trainer.validate`` becomes the
    merged model of the first task, and Lightning's own validation pass is that of the first task.

    Args:
        experts: task -> its expert: a Lightning checkpoint (rebuilt by the model's class from its hyperparameters); a
            state dict or safetensors file; a folder that transformers' or PEFT's ``save_pretrained`` has written; or a
            module or state dict in memory, of the whole model or of a part of it. Relative paths are relative to the
            working directory. Nothing in a file is executed.
        method: the merging rule; :class:`~com_lightning.ChainOfMerges` by default.
        private: patterns of parameters that stay with their task (``"head"``, ``"*.classifier.*"``), all others being
            shared. By default those are private that differ in name or shape.
        metric: the logged metric that tables show; by default the first one that is not a loss. What is logged is
            known after validation only: a name that is not is told in the report, and another is shown.
        baselines: also validate the experts and their plain average, to compare with.
        output_dir: folder for the result (see :func:`~com_lightning.results.save_results`); ``None``: see :meth:`save`.
        overwrite: replace an existing ``output_dir``.
        verbose: print the report at the end, for where there is no line of code to print it.
        grow_vocabulary: if embedding tables differ in length, give all of them the rows of the longest: rows that all
            have are merged, the others kept. Otherwise such tables are an error.
        memory_budget: GiB that paused calibration forwards may hold between them; what is more is paged out, from an
            accelerator to host memory, from the CPU to temporary files. ``None``: no limit.

    Attributes:
        report: the :class:`~com_lightning.MergeReport`, once merged.
        modules: task -> its merged module, once merged. Their shared parameters are the same tensors.

    Raises:
        MergeError: before any calibration batch is read, with all problems at once.

    Example::

        tasks = MergeDataModule({"mnist": MNISTData(), "digits": DigitsData()})
        merger = ChainOfMergesCallback(experts={"mnist": "mnist.ckpt", "digits": "digits.ckpt"})
        L.Trainer(callbacks=[merger]).validate(model, datamodule=tasks)
        print(merger.report)
    """

    def __init__(
        self,
        experts: Mapping[str, ExpertSource],
        method: Optional[MergingMethod] = None,
        private: Optional[List[str]] = None,
        metric: Optional[str] = None,
        baselines: bool = True,
        output_dir: Optional[str] = None,
        overwrite: bool = False,
        verbose: bool = False,
        grow_vocabulary: bool = False,
        memory_budget: Optional[float] = None,
    ) -> None:
        if not isinstance(experts, Mapping):
            raise TypeError(f"experts: must be a mapping, task -> expert; got a {type(experts).__name__}")
        private = [private] if isinstance(private, str) else private
        self.experts, self.method, self.private, self.metric = experts, method or ChainOfMerges(), private, metric
        self.grow_vocabulary, self.memory_budget = grow_vocabulary, memory_budget
        self.baselines, self.output_dir, self.overwrite, self.verbose = baselines, output_dir, overwrite, verbose
        self.report = MergeReport()
        self.modules: dict[str, LightningModule] = {}
        self.files: dict[str, str] = {}
        """Further files for the result folder, name -> text."""
        self._plan: MergePlan | None = None
        self._peers = Peers()
        self._shared: list[str] = []

    @property
    def merged(self) -> bool:
        """Whether the merge has been done."""
        return bool(self.modules)

    def plan(self, model: LightningModule, data: MergeDataModule, becomes_first: bool = True) -> MergePlan:
        """Load the experts and check everything, before any data is read. ``data`` must be set up.

        Args:
            model: a module of the experts' class.
            data: the tasks' data.
            becomes_first: whether ``model`` is to become the merged model of the first task, and must be built like it.
        """
        problems = output_problems(Path(self.output_dir), self.overwrite) if self.output_dir else []
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            problems.append(f"memory_budget: must be a number of GiB above 0, got {self.memory_budget}")
        self._plan = make_plan(
            model, self.experts, data, self.method, self.private, problems, becomes_first, self.grow_vocabulary
        )
        return self._plan

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the result to a folder, see :func:`~com_lightning.results.save_results`."""
        if not self.merged:
            raise RuntimeError("nothing has been merged yet: run trainer.validate(model, datamodule=tasks) first")
        save_results(Path(folder), self.modules, self._shared, self.report, overwrite, self.files)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            rank_zero_warn("ChainOfMergesCallback merges in trainer.validate; in trainer.fit it does nothing")
        if stage != "validate" or self.merged:
            return
        require_mergeable(trainer, self.output_dir)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MergeDataModule):
            raise MergeError(
                ["the tasks' data are missing: use trainer.validate(model, datamodule=MergeDataModule(...))"]
            )
        self._peers = peers_of(trainer)
        with together(self._peers):
            plan = self._plan or self.plan(pl_module, data)
        for warning in plan.parameters.warnings:
            rank_zero_warn(warning)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merged or self._plan is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.VALIDATING:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        with (
            torch.inference_mode(False),
            together(self._peers),
            tqdm(total=len(self._plan.layers), desc="merging", disable=_quiet(trainer), leave=False) as bar,
        ):
            step = 0

            def on_layer(record: LayerRecord) -> None:
                nonlocal step
                bar.set_postfix_str(record.name)
                bar.update()
                _log_layer(loggers, record, step)
                step += 1

            loggers, trainer.loggers = trainer.loggers, [DummyLogger()]  # calibration forwards log nowhere
            budget = None if self.memory_budget is None else int(self.memory_budget * 2**30)
            run = Run(on_layer, self._peers, memory_budget=budget)
            try:
                self.modules, self.report = execute(self._plan, trainer, data, run)
            except BaseException:
                self._plan = None  # its experts have been moved and converted already
                raise
            finally:
                trainer.loggers = loggers
            load_into(pl_module, next(iter(self.modules.values())))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.merged or self._plan is None or self.report.metrics:
            return
        with torch.inference_mode(False), together(self._peers):
            self._validate(trainer, self._plan, trainer.datamodule)  # type: ignore[attr-defined]
            self._finish(self._plan)
        if self.verbose and trainer.is_global_zero:
            print(f"\n{self.report}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.merged and self._plan is not None:  # whatever a validation raised, the merge is not lost
            with torch.inference_mode(False):
                self._finish(self._plan)

    def _finish(self, plan: MergePlan) -> None:
        """Leave modules as ``load_from_checkpoint`` gives them, let go of the experts, and write the result."""
        shared = set(plan.parameters.shared)
        for module in self.modules.values():
            module.train()
            for name, tensor, is_parameter in named_tensors(module):
                if name not in shared or not tensor.is_floating_point():  # maybe a page of the expert's file
                    tensor.data = tensor.data.clone()
                tensor.requires_grad_(is_parameter and tensor.is_floating_point() and name not in plan.frozen)
        self._shared, self._plan = plan.parameters.shared, None
        if self.report.metrics and self.report.metric is None:
            self.report.choose_metric(self.metric)
        if self.output_dir and self._peers.rank == 0:
            self.save(self.output_dir, self.overwrite)
            rank_zero_info(f"The merged model is in {self.output_dir}.")

    def _validate(self, trainer: Trainer, plan: MergePlan, data: MergeDataModule) -> None:
        with quiet_lightning():
            evaluator = single_device_trainer(trainer)
        sets = {"merged": self.modules}
        if self.baselines:
            mean = average_shared(plan)
            average = {task: with_shared(expert, mean) for task, expert in plan.experts.items()}
            sets = {"expert": plan.experts, "average": average, **sets}
        for kind, modules in sets.items():
            description, quiet = f"validating {kind}", _quiet(trainer)
            mine = {task: modules[task] for task in list(modules)[self._peers.rank :: self._peers.size]}
            found: dict[str, dict[str, float]] = {}
            for part in self._peers.exchange(validate_tasks(evaluator, mine, data, description, quiet, prepared=True)):
                found.update(part)
            self.report.metrics[kind] = {task: found[task] for task in modules}
        self.report.choose_metric(self.metric)
        self.report.compare_with_average()
        _log_tasks(trainer, self.report)


def _quiet(trainer: Trainer) -> bool:
    return trainer.progress_bar_callback is None or not trainer.is_global_zero


def _log_layer(loggers: Sequence[Logger], record: LayerRecord, step: int) -> None:
    values = {"residual": record.residual, "condition": record.condition, "seconds": record.seconds}
    values.update({f"shift/{task}": value for task, value in record.distance.items()})
    values.update({f"cosine/{task}": value for task, value in record.cosine.items()})
    known = {f"merge/{name}": value for name, value in values.items() if value is not None}
    for logger in loggers:
        logger.log_metrics(known, step=step)


def _log_tasks(trainer: Trainer, report: MergeReport) -> None:
    values = report.metrics["merged"]
    named = {f"{task}/{metric}": value for task, metrics in values.items() for metric, value in metrics.items()}
    for task in values:
        if (ratio := report.normalized("merged", task)) is not None:
            named[f"{task}/normalized_{report.metric}"] = ratio
    for logger in trainer.loggers:
        logger.log_metrics(named, step=trainer.global_step)
        logger.save()
