"""The merge as a Lightning callback."""

from __future__ import annotations

import copy
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from tqdm.auto import tqdm

from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError
from com_lightning.execution import average_shared, execute, load_into, with_shared
from com_lightning.experts.load import ExpertSource
from com_lightning.experts.state_dicts import some
from com_lightning.methods import ChainOfMerges, MergingMethod
from com_lightning.plan import MergePlan, make_plan
from com_lightning.results.atomic import Workplace
from com_lightning.results.folder import output_problems, save_results, space_problems
from com_lightning.results.journal import FileJournal
from com_lightning.results.loggers import log_layer, log_tasks
from com_lightning.results.report import MergeReport
from com_lightning.strategies import peers_of, require_mergeable, together
from com_lightning.validation import quiet_lightning, single_device_trainer, validate_tasks


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
            state dict or safetensors file; a folder that transformers' or PEFT's ``save_pretrained`` has written, or
            the name of such a model on the Hugging Face Hub (``"hf://owner/name"``); or a module or state dict in
            memory, of the whole model or of a part of it. Relative paths are relative to the working directory. Nothing
            in a file is executed.
        method: the merging rule; :class:`~com_lightning.ChainOfMerges` by default.
        private: patterns of parameters that stay with their task (``"head"``, ``"*.classifier.*"``), all others being
            shared. By default those are private that differ in name or shape.
        metric: the logged metric that tables show; by default the first one that is not a loss. What is logged is
            known after validation only: a name that is not is told in the report, and another is shown.
        baselines: also validate the experts and their plain average, to compare with.
        output_dir: folder for the result (see :func:`~com_lightning.results.folder.save_results`); ``None``: see :meth:`save`.
        overwrite: replace an existing ``output_dir``.
        verbose: print the report at the end, for where there is no line of code to print it.
        on_bad_batch: what NaN or infinity in a calibration batch, or in what the models make of it, does: ``"raise"``
            an error that names task, batch and layer, or ``"skip"`` the batch from that layer on, and go on.
        grow_vocabulary: if embedding tables differ in length, give all of them the rows of the longest: rows that all
            have are merged, the others kept. Otherwise such tables are an error.
        no_resume: keep no record of merged layers. Otherwise an ``output_dir`` has one beside it until the result is
            there, about as large as the merged model, and a merge that was killed goes on from it when it is started
            again with the same experts, data, settings and versions.
        experts_device: ``"cpu"``: experts stay where they were loaded, and each weight is brought to the device when
            the expert's forward uses it, and no sooner. By default those whose forwards are needed are on the device
            during the merge.
        base: the model that the experts were fine-tuned from, given as an expert is, for methods that need it (task
            arithmetic and its relatives); by default the module given to ``trainer.validate``, with its weights as they
            are.
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
        method: MergingMethod | None = None,
        private: list[str] | None = None,
        metric: str | None = None,
        baselines: bool = True,
        output_dir: str | None = None,
        overwrite: bool = False,
        verbose: bool = False,
        grow_vocabulary: bool = False,
        no_resume: bool = False,
        experts_device: Literal["cpu"] | None = None,
        on_bad_batch: Literal["raise", "skip"] = "raise",
        base: ExpertSource | None = None,
        memory_budget: float | None = None,
    ) -> None:
        if not isinstance(experts, Mapping):
            raise TypeError(f"experts: must be a mapping, task -> expert; got a {type(experts).__name__}")
        private = [private] if isinstance(private, str) else private
        self.experts, self.method, self.private, self.metric = experts, method or ChainOfMerges(), private, metric
        self.grow_vocabulary, self.base, self.on_bad_batch = grow_vocabulary, base, on_bad_batch
        self.no_resume, self.experts_device, self.memory_budget = no_resume, experts_device, memory_budget
        self.baselines, self.output_dir, self.overwrite, self.verbose = baselines, output_dir, overwrite, verbose
        self.report = MergeReport()
        self.modules: dict[str, LightningModule] = {}
        self.files: dict[str, str] = {}
        """Further files for the result folder, name -> text."""
        self._plan: MergePlan | None = None
        self._peers = Peers()
        self._workplace: Workplace | None = None
        self._shared: list[str] = []
        self._precision: dict[str, dict[str, torch.dtype]] = {}
        self._lent = False
        """Whether the model that is validated may share its tensors with the merged ones."""

    @property
    def merged(self) -> bool:
        """Whether the merge has been done."""
        return bool(self.modules)

    def plan(
        self, model: LightningModule, data: MergeDataModule | None, becomes_first: bool = True, writes: bool = True
    ) -> MergePlan:
        """Load the experts and check everything, before any data is read. ``data`` must be set up.

        Args:
            model: a module of the experts' class.
            data: the tasks' data; ``None``: none is at hand.
            becomes_first: whether ``model`` is to become the merged model of the first task, and must be built like it.
            writes: whether this process is to write the result; others may be on a machine without that folder.
        """
        problems = output_problems(Path(self.output_dir), self.overwrite) if self.output_dir and writes else []
        if self.on_bad_batch not in ("raise", "skip"):
            problems.append(f"on_bad_batch: must be 'raise' or 'skip', got {self.on_bad_batch!r}")
        if self.experts_device not in (None, "cpu"):
            problems.append(f"experts_device: must be 'cpu' or not given, got {self.experts_device!r}")
        if self.memory_budget is not None and not 0 < self.memory_budget < math.inf:
            problems.append(f"memory_budget: must be a number of GiB above 0, got {self.memory_budget}")
        if outside := [name for name in self.files if name in ("", ".", "..") or name != Path(name).name]:
            problems.append(f"files: {some(outside)} would be written outside the result's folder; give plain names")
        self._plan = make_plan(
            model,
            self.experts,
            data,
            self.method,
            self.private,
            problems,
            becomes_first,
            self.grow_vocabulary,
            self.base,
        )
        experts, folder = self._plan.experts, self.output_dir
        if not any(self._plan.parameters.private.values()):  # one file is written for all
            experts = dict([next(iter(experts.items()))])
        if folder and writes and (problems := space_problems(Path(folder), experts, not self.no_resume)):
            raise MergeError(problems)
        return self._plan

    def merge(self, model: LightningModule, trainer: Trainer | None = None) -> MergeReport:
        """Merge now, without data: by a method that needs none, and without validating anything.

        Args:
            model: a module of the experts' class; it is not changed.
            trainer: whose device and precision are used; by default a CPU and that of the experts.

        Returns:
            The report, without metrics. The merged modules are in :attr:`modules`, and in ``output_dir`` if it is set.

        Raises:
            MergeError: before anything is merged, with all problems at once.

        Example::

            merger = ChainOfMergesCallback({"mnist": "mnist.ckpt", "digits": "digits.ckpt"}, TIES(), base="base.ckpt")
            merger.merge(model)
            merger.modules["mnist"]
        """
        with quiet_lightning():
            trainer = trainer or Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
        require_mergeable(trainer, self.output_dir)
        plan = self._plan or self.plan(copy.deepcopy(model) if self.grow_vocabulary else model, None, False)
        self._plan = None  # whatever becomes of its experts
        for warning in plan.parameters.warnings:
            rank_zero_warn(warning)
        with torch.inference_mode(False):
            self.modules, self.report = execute(plan, trainer, None, Run())
            self._finish(plan)
        if self.verbose:
            print(f"\n{self.report}")
        return self.report

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the result to a folder, see :func:`~com_lightning.results.folder.save_results`."""
        if not self.merged:
            raise RuntimeError("nothing has been merged yet: run trainer.validate(model, datamodule=tasks) first")
        save_results(Path(folder), self.modules, self._shared, self.report, overwrite, self.files, self._precision)

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
            plan = self._plan or self.plan(pl_module, data, writes=trainer.is_global_zero)
            if self.output_dir and self._peers.rank == 0:
                self._workplace = Workplace(Path(self.output_dir), afresh=self.no_resume)
        for warning in plan.parameters.warnings:
            rank_zero_warn(warning)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.merged or self._plan is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.VALIDATING:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        with (
            torch.inference_mode(False),
            together(self._peers),
            tqdm(total=len(self._plan.layers) or None, desc="merging", disable=_quiet(trainer), leave=False) as bar,
        ):
            step = 0

            def on_layer(record: LayerRecord) -> None:
                nonlocal step
                bar.set_postfix_str(record.name)
                bar.update()
                log_layer(loggers, record, step)
                step += 1
                if trainer.received_sigterm:  # of which Lightning takes note, and goes on
                    raise SIGTERMException(128 + signal.SIGTERM)

            loggers, trainer.loggers = trainer.loggers, [DummyLogger()]  # calibration forwards log nowhere
            budget = None if self.memory_budget is None else int(self.memory_budget * 2**30)
            run = Run(on_layer, self._peers, memory_budget=budget, on_bad_batch=self.on_bad_batch)
            run.quiet = _quiet(trainer)
            if self._workplace and not self.no_resume:
                run.journal = FileJournal(self._workplace.journal)
            try:
                self.modules, self.report = execute(self._plan, trainer, data, run, self.experts_device == "cpu")
            except BaseException:
                self._plan = None  # a second attempt looks at everything anew
                raise
            finally:
                trainer.loggers = loggers
            load_into(pl_module, next(iter(self.modules.values())), self._lent)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.merged or self._plan is None or self.report.metrics:
            return
        with torch.inference_mode(False), together(self._peers):
            self._validate(trainer, self._plan, trainer.datamodule)  # type: ignore[attr-defined]
            self._finish(self._plan)
        if self.verbose and trainer.is_global_zero:
            print(f"\n{self.report}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._peers.explain(exception)
        try:
            if self.merged and self._plan is not None:  # whatever a validation raised, the merge is not lost
                with torch.inference_mode(False):
                    self._finish(self._plan)
        finally:
            self._leave_workplace()

    def _finish(self, plan: MergePlan) -> None:
        """Leave modules as ``load_from_checkpoint`` gives them, let go of the experts, and write the result."""
        shared = set(plan.parameters.shared)
        for module in self.modules.values():
            module.train()
            for name, tensor, is_parameter in named_tensors(module):
                tensor.data = tensor.data.cpu()
                if name not in shared or not tensor.is_floating_point():  # maybe a page of the expert's file
                    tensor.data = tensor.data.clone()
                tensor.requires_grad_(is_parameter and tensor.is_floating_point() and name not in plan.frozen)
        self._precision = {task: plan.precision(task) for task in self.modules}
        tensors = [{name: tensor for name, tensor, _ in named_tensors(m)} for m in self.modules.values()]
        apart = {name for name in shared if len({id(own[name]) for own in tensors}) > 1}
        self._shared, self._plan = [name for name in plan.parameters.shared if name not in apart], None
        if self.report.metrics and self.report.metric is None:
            self.report.choose_metric(self.metric)
        self._leave_workplace()
        if self.output_dir and self._peers.rank == 0:
            self.save(self.output_dir, self.overwrite)
            rank_zero_info(f"The merged model is in {self.output_dir}.")

    def _leave_workplace(self) -> None:
        if self._workplace:
            self._workplace.close(keep=True)
            self._workplace = None

    def _validate(self, trainer: Trainer, plan: MergePlan, data: MergeDataModule) -> None:
        evaluator, quiet = single_device_trainer(trainer), _quiet(trainer)
        sets = {"merged": self.modules}
        if self.baselines:
            mean = average_shared(plan)
            sets = {"expert": plan.experts, "average": with_shared(plan, mean), **sets}
        for label, modules in sets.items():
            self.report.metrics[label] = validate_tasks(
                evaluator, modules, data, label, quiet, prepared=True, peers=self._peers
            )
        self.report.choose_metric(self.metric)
        self.report.compare_with_average()
        log_tasks(trainer.loggers, self.report, trainer.global_step)


def _quiet(trainer: Trainer) -> bool:
    return trainer.progress_bar_callback is None or not trainer.is_global_zero
