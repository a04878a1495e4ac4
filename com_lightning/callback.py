"""The merge as a Lightning callback."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn

from com_lightning.compat import of_other_package
from com_lightning.core.sweep.context import Context, Progress, own_modes
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import copy_with_tensors
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.environment import command_line
from com_lightning.errors import MergeError, reason
from com_lightning.execution import MergeResult, execute
from com_lightning.experts.load import ExpertSource
from com_lightning.experts.state_dicts import some
from com_lightning.methods import ChainOfMerges, MergingMethod
from com_lightning.methods.naming import as_rule
from com_lightning.options import MergeOptions
from com_lightning.plan import MergePlan, differences, make_plan
from com_lightning.progress import drawn, print_below
from com_lightning.results.atomic import Workplace
from com_lightning.results.folder import output_problems, space_problems
from com_lightning.results.journal import FileJournal
from com_lightning.results.loggers import log_layer, log_picture, log_settings, task_metrics
from com_lightning.results.origins import origin_of
from com_lightning.results.report import MergeReport
from com_lightning.shared_weights import average_shared, load_into, with_shared
from com_lightning.strategies import end_on_sigterm, join_parent, peers_of, require_mergeable, together, why_alone
from com_lightning.validation import borrowed, default_trainer, single_device_trainer, validate_tasks


class ChainOfMergesCallback(Callback):
    """Merges experts at the start of ``trainer.validate``, then validates every task with its merged module.

    It works with any ``Trainer`` and any LightningModule that can be validated. The calibration forward is the module's
    ``calibration_step(batch)`` if it has one, else its ``validation_step``. It runs on copies, with ``log`` muted, so
    that no metric changes. Padding is left out by the batch's ``attention_mask``, or by the module's
    ``calibration_mask(batch)``, a boolean mask over positions.

    Parameters with the same name and shape in the model and all experts are *shared* and merged. The others are
    *private* and stay with their task, for example heads with different numbers of classes. The module given to
    ``trainer.validate`` becomes the merged model of the first task, and Lightning's own validation pass is that of the
    first task. What ``trainer.validate`` returns, ``trainer.callback_metrics`` and the loggers hold the metrics of all
    tasks as well, as ``<task>/<metric>``, and their mean as ``merged/mean``. Another module given to a later
    ``trainer.validate`` is merged anew, and so is any module after the experts, the method or the options have changed.

    Args:
        experts: task -> its expert. An expert is a Lightning checkpoint (the model's class is built from its
            hyperparameters); a state dict or safetensors file; a folder written by ``save_pretrained`` of transformers
            or PEFT, or the name of such a model on the Hugging Face Hub (``"hf://owner/name"``); or a module or state
            dict in memory, of the whole model or of a part of it. Relative paths start at the working directory. No
            code in a file is executed.
        method: the merging rule, its class, or its name; by default :class:`~com_lightning.ChainOfMerges`.
        verbose: print the report at the end.
        options: see :class:`~com_lightning.MergeOptions`.

    Attributes:
        options: the :class:`~com_lightning.MergeOptions`.
        result: the :class:`~com_lightning.MergeResult`, once merged.

    Raises:
        MergeError: before any calibration batch is read, with all problems at once.

    Example::

        tasks = MergeDataModule({"mnist": MNISTData(), "digits": DigitsData()})
        merger = ChainOfMergesCallback(experts={"mnist": "mnist.ckpt", "digits": "digits.ckpt"})
        L.Trainer(callbacks=[merger]).validate(model, datamodule=tasks)
        print(merger.report)
    """

    merges_tasks = True
    """With this callback, a trainer that is given the data of all tasks merges and validates all of them."""

    def __init__(
        self,
        experts: Mapping[str, ExpertSource],
        method: MergingMethod | type[MergingMethod] | str | None = None,
        verbose: bool = False,
        **options: Any,
    ) -> None:
        if not isinstance(experts, Mapping):
            raise TypeError(f"experts: must be a mapping, task -> expert; got a {type(experts).__name__}")
        self.experts, self.method, self.verbose = experts, as_rule(method or ChainOfMerges), verbose
        self.options = MergeOptions(**options)
        self.result = MergeResult()
        self._ready: tuple[LightningModule, MergePlan] | None = None
        """A plan that was made before, and the only module that it is for."""
        self._plan: MergePlan | None = None
        """What is being merged."""
        self._merged_from: list[Any] = []
        """What the result depends on."""
        self._overwritten: LightningModule | None = None
        """The module that holds the weights of the last merge."""
        self._lend = False
        """Whether the module that is validated may share its tensors with the merged ones."""
        self._is_shown = True
        """Whether there is no report to print."""
        self._peers = Peers()
        self._workplace: Workplace | None = None
        join_parent()

    def __repr__(self) -> str:
        """Return the callback as Python code, with those options that differ from their defaults."""
        sources = {task: repr(s) if isinstance(s, (str, Path)) else "..." for task, s in self.experts.items()}
        settings = [f"{{{', '.join(f'{task!r}: {source}' for task, source in sources.items())}}}"]
        settings += [repr(self.method), *["verbose=True"] * self.verbose, *self.options.changed()]
        return f"{type(self).__name__}({', '.join(settings)})"

    @property
    def modules(self) -> dict[str, LightningModule]:
        """Task -> its merged module, once merged. Their shared parameters are the same tensors."""
        return self.result.modules

    @property
    def report(self) -> MergeReport:
        """The report, once merged."""
        return self.result.report

    @property
    def merged(self) -> bool:
        """Whether the merge has been done."""
        return bool(self.modules)

    def plan(
        self, model: LightningModule, data: MergeDataModule | None, becomes_first: bool = True, writes: bool = True
    ) -> MergePlan:
        """Load the experts and check everything, before any calibration batch is read.

        Args:
            model: a module of the experts' class.
            data: the tasks' data, set up; ``None`` if there are none.
            becomes_first: whether ``model`` is to become the merged model of the first task, and must be built like it.
                If not, it is not changed.
            writes: whether this process writes the result. Others may be on a machine without that folder.

        Returns:
            The plan.

        Raises:
            MergeError: with all problems at once.
        """
        options = self.options
        folder = Path(options.output_dir) if options.output_dir and writes else None
        problems = output_problems(folder, options.overwrite) if folder else []
        if not becomes_first and (options.resize_embeddings or is_overridden("configure_model", model)):
            model = copy_with_tensors(model)
        plan = make_plan(model, self.experts, data, self.method, options, problems, becomes_first)
        experts = plan.experts
        rule = plan.method.options
        own = plan.method.has_corrections or (rule is not None and rule.private_biases)
        if not own and not any(plan.parameters.private.values()):  # one file is written for all
            experts = dict([next(iter(experts.items()))])
        if folder and (problems := space_problems(folder, experts, bool(options.resume))):
            raise MergeError(problems)
        return plan

    def use(self, plan: MergePlan, model: LightningModule) -> None:
        """Merge by this plan when ``model`` is validated, instead of making another one.

        Args:
            plan: the plan.
            model: the module that it is for. It may share its tensors with the merged module of the first task.
        """
        self._ready = (model, plan)

    def merge(self, model: LightningModule, trainer: Trainer | None = None) -> MergeReport:
        """Merge now, without data: by a method that needs none, and without validation.

        Args:
            model: a module of the experts' class; it is not changed.
            trainer: its device and precision are used; by default the CPU and the experts' precision.

        Returns:
            The report, without metrics. The merged modules are in :attr:`modules`, and in ``output_dir`` if it is set.

        Raises:
            MergeError: before anything is merged, with all problems at once.

        Example::

            merger = ChainOfMergesCallback({"mnist": "mnist.ckpt", "digits": "digits.ckpt"}, TIES(), base="base.ckpt")
            merger.merge(model)
            merger.modules["mnist"]
        """
        trainer = trainer or default_trainer("cpu")
        if problems := of_other_package("model", model) + of_other_package("trainer", trainer):
            raise MergeError(problems)
        require_mergeable(trainer, self.options.output_dir)
        with own_modes(), drawn(trainer) as progress:
            self._begin(model, self._taken(model) or self.plan(model, None, becomes_first=False))
            self._execute(trainer, None, progress)
            self._finish()
        if self.verbose:
            print(f"\n{self.report}")
        return self.report

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the result to a folder, see :meth:`com_lightning.MergeResult.save`.

        Args:
            folder: the folder.
            overwrite: replace it if it exists.
        """
        self.result.save(folder, overwrite)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "validate" and not self.merged:
            rank_zero_warn(
                f"ChainOfMergesCallback merges in trainer.validate; in trainer.{stage} it does nothing. To merge, run "
                "trainer.validate(model, datamodule=tasks), or com_lightning.merge(model, experts, tasks)"
            )
        if stage != "validate" or self._is_result_of(pl_module):
            return
        require_mergeable(trainer, self.options.output_dir)
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, MergeDataModule):
            raise MergeError(
                ["the tasks' data are missing: use trainer.validate(model, datamodule=MergeDataModule(...))"]
            )
        if pl_module is self._overwritten and "base" in self.method.needs and self.options.base is None:
            raise MergeError(["base: the model now holds the weights of an earlier merge; give base, or another model"])
        self._peers = peers_of(trainer)
        with own_modes(), together(self._peers):
            plan = self._taken(pl_module)
            self._lend = plan is not None
            self._begin(pl_module, plan or self.plan(pl_module, data, writes=trainer.is_global_zero))
            if self.options.output_dir and self._peers.rank == 0:
                self._workplace = Workplace(Path(self.options.output_dir), discard_journal=not self.options.resume)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merged or self._plan is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.VALIDATING:
            return
        with own_modes(), together(self._peers), drawn(trainer) as progress:
            self._require_unchanged(pl_module)
            self._execute(trainer, trainer.datamodule, progress)  # type: ignore[attr-defined]
            self._overwritten = pl_module
            load_into(pl_module, next(iter(self.modules.values())), self._lend)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.merged or self._plan is None or self.report.metrics:
            return
        with own_modes(), together(self._peers), drawn(trainer) as progress:
            self._validate(trainer, self._plan, trainer.datamodule, progress)  # type: ignore[attr-defined]
        pl_module.log_dict(task_metrics(self.report), sync_dist=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.merged or self._plan is None or not self.report.metrics:
            return
        with own_modes(), together(self._peers):
            self._warn_of_others(trainer)
            log_picture(trainer.loggers, self.report, trainer.global_step)
            self._finish()
        self._is_shown = not self.verbose

    def on_validation_batch_end(self, trainer: Trainer, *batch: Any) -> None:
        if self._plan is not None:
            end_on_sigterm(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._plan is not None and not self.merged:
            rank_zero_warn("nothing was merged: limit_val_batches leaves nothing to validate")
            self._leave()
        if not self._is_shown and trainer.is_global_zero:  # after Lightning's own table, which is of the first task
            print_below(trainer, f"\n{self.report}")
        self._is_shown = True

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._peers.explain(exception)
        if trainer.world_size > 1 and not dist.is_initialized() and isinstance(exception, dist.DistError):
            exception.add_note(why_alone(trainer.global_rank, trainer.world_size, exception))
        try:
            if self.merged and self._plan is not None:
                self._stopped(self._plan, exception)
        finally:
            self._leave()

    def _require_unchanged(self, model: LightningModule) -> None:
        """Make sure that nobody has changed the model since the plan was made, as callbacks and ``setup`` may do."""
        assert self._plan is not None
        if problems := differences(model, *next(iter(self._plan.experts.items()))):
            self._plan = None  # a second attempt makes a new plan
            raise MergeError([f"{problem}. A callback or `setup` has changed it meanwhile" for problem in problems])

    def _is_result_of(self, model: LightningModule) -> bool:
        now, before = self._dependencies(model), self._merged_from
        return self.merged and len(now) == len(before) and all(one is other for one, other in zip(now, before))

    def _dependencies(self, model: LightningModule) -> list[Any]:
        return [model, *self.experts, *self.experts.values(), self.method, *vars(self.options).values()]

    def _taken(self, model: LightningModule) -> MergePlan | None:
        """Return the plan that was made for this model, if there is one. It serves once."""
        ready, self._ready = self._ready, None
        return ready[1] if ready and ready[0] is model else None

    def _begin(self, model: LightningModule, plan: MergePlan) -> None:
        self.result, self._merged_from, self._plan = MergeResult(), self._dependencies(model), plan
        for warning in plan.parameters.warnings:
            rank_zero_warn(warning)

    def _execute(self, trainer: Trainer, data: MergeDataModule | None, progress: Progress) -> None:
        assert self._plan is not None
        plan, loggers, step = self._plan, trainer.loggers, 0
        log_settings(loggers, {**plan.method.describe(), **({} if data is None else data.settings)})
        with own_modes(), borrowed(trainer):

            def on_layer(record: LayerRecord) -> None:
                nonlocal step
                log_layer(loggers, record, step)
                step += 1
                end_on_sigterm(trainer)

            options = self.options
            context = Context(on_layer, self._peers, memory_budget=options.budget, on_bad_batch=options.on_bad_batch)
            context.progress = progress
            if self._workplace and options.resume:
                context.journal = FileJournal(self._workplace.journal)
            try:
                modules, report = execute(plan, trainer, data, context, options)
            except BaseException:
                self._plan = None  # a second attempt makes a new plan
                raise
        report.command = command_line() or self._call(data is not None)
        for task in report.tasks:
            report.origins[task] = origin_of(self.experts[task], plan.files.get(f"expert '{task}'"))
        self.result = MergeResult(modules, report, files=options.files)

    def _call(self, has_data: bool) -> str:
        """The call in Python that does the same merge."""
        given = ["model", "experts", *["datamodule"] * has_data, f"method={self.method!r}", *self.options.changed()]
        return f"com_lightning.merge({', '.join(given)})"

    def _validate(self, trainer: Trainer, plan: MergePlan, data: MergeDataModule, progress: Progress) -> None:
        evaluator, sets = single_device_trainer(trainer), {"merged": self.modules}
        if self.options.baselines:
            sets = {"expert": plan.experts, "average": with_shared(plan, average_shared(plan)), **sets}
        for label, modules in sets.items():
            self.report.metrics[label] = validate_tasks(
                evaluator, modules, data, label, progress, prepared=True, peers=self._peers
            )
            end_on_sigterm(trainer)
        self.report.choose_monitor(self.options.monitor, self.options.mode)
        self.report.compare_with_average()

    def _warn_of_others(self, trainer: Trainer) -> None:
        """Warn of what was logged beside the metrics of the modules."""
        ours = {*next(iter(self.report.metrics["merged"].values())), *task_metrics(self.report)}
        if others := [name for name in trainer.logged_metrics if name not in ours]:
            self.report.warnings.append(
                f"{some(others)}: in no row, because callbacks of the trainer do not run when each task is validated "
                "with its own module; log it in the module"
            )

    def _finish(self) -> None:
        """Let go of the experts, and write the result."""
        assert self._plan is not None
        with own_modes():
            self.result.release(self._plan)
        if self.report.metrics and self.report.monitor is None:
            self.report.choose_monitor(self.options.monitor, self.options.mode)
        self._leave()
        if self.options.output_dir and self._peers.rank == 0:
            self.save(self.options.output_dir, self.options.overwrite)
            rank_zero_info(f"The merged model is in {self.options.output_dir}.")

    def _stopped(self, plan: MergePlan, cause: BaseException) -> None:
        """Keep a merge whose validation has raised something. It is written unless a repeated command can go on."""
        is_failure = isinstance(cause, Exception) and not self._peers.has_lost
        has_journal = self._workplace is not None and self._workplace.journal.is_dir()
        if is_failure or not (has_journal or "data" not in plan.method.needs):
            what = f"failed ({reason(cause)})" if isinstance(cause, Exception) else "was interrupted"
            self.report.warnings.append(
                f"the validation {what}, so that metrics are missing; validate the result again"
            )
            self._finish()
            return
        with own_modes():
            self.result.release(plan)
        self._merged_from = []  # the next call merges again
        if self.options.output_dir:
            rank_zero_warn(
                f"the validation was interrupted, and nothing was written to {self.options.output_dir}; run the same "
                f"again{': it goes on from the layers that were solved' if has_journal else ''}"
            )

    def _leave(self) -> None:
        """Let go of the plan with its experts, and of the lock on the output folder."""
        self._plan = None
        if self._workplace:
            self._workplace.close(keep=True)
            self._workplace = None
