"""From experts and data to merged modules."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from com_lightning.core.sweep.context import Context, one_at_a_time
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.forward_check import ForwardCheck, check_forwards
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.allocator import automatic_budget, free_memory
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.core.tensors.placement import Offload, Placement
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.data.one_task import TRANSFER_HOOKS
from com_lightning.data.padding import count_padding, describe_padding, padding_masks
from com_lightning.data.sampling import CalibrationSample
from com_lightning.data.smaller_batches import smaller_batches
from com_lightning.data.steps import Batch, CalibrationStep, Prediction, TrainingLoss, samples_in, shortened
from com_lightning.data.trainer_view import trainer_of_task
from com_lightning.environment import date, package_versions, peak_memory
from com_lightning.errors import MergeError
from com_lightning.experts.state_dicts import some
from com_lightning.methods import MergeJob, ParameterRecord
from com_lightning.options import MergeOptions
from com_lightning.plan import MergePlan
from com_lightning.results.corrections import Corrections
from com_lightning.results.fingerprint import (
    combined,
    fingerprint_of_base,
    fingerprint_of_data,
    fingerprint_of_experts,
    readable,
    sketch_of_experts,
)
from com_lightning.results.folder import save_results
from com_lightning.results.model_size import measure_size
from com_lightning.results.parameter_summary import describe_private, summarize_parameters
from com_lightning.results.report import MergeReport
from com_lightning.results.verification import Trial
from com_lightning.shared_weights import average_shared, with_shared


@dataclass(repr=False)
class MergeResult:
    """What a merge gives.

    Attributes:
        modules: task -> its merged module. Their shared parameters are the same tensors.
        report: the report; ``str(result)`` shows its table.
        shared: names of the shared parameters and buffers.
        precision: task -> name of each tensor that is stored in another precision than the module's -> that precision.
        files: further text files to save, name -> text.
        trials: task -> a calibration forward, with which :meth:`save` checks what it has written.
        corrections: the merged model without the tasks' corrections of low rank, if they have some.
    """

    modules: dict[str, LightningModule] = field(default_factory=dict)
    report: MergeReport = field(default_factory=MergeReport)
    shared: list[str] = field(default_factory=list)
    precision: dict[str, dict[str, torch.dtype]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)
    corrections: Corrections | None = None

    def save(self, folder: str | Path, overwrite: bool = False) -> None:
        """Write the result to a folder, see :func:`~com_lightning.results.folder.save_results`.

        Args:
            folder: the folder.
            overwrite: replace it if it exists.

        Raises:
            RuntimeError: if nothing has been merged.
        """
        if not self.modules:
            raise RuntimeError("nothing has been merged yet: run trainer.validate(model, datamodule=tasks) first")
        save_results(
            Path(folder),
            self.modules,
            self.shared,
            self.report,
            overwrite,
            self.files,
            self.precision,
            self.trials,
            self.corrections,
        )

    def release(self, plan: MergePlan) -> None:
        """Leave the modules as ``load_from_checkpoint`` gives them: on the CPU, trainable, without memory of experts.

        Each submodule is in the mode of the expert's source. A network from ``from_pretrained`` is in eval mode.

        Args:
            plan: what was merged.
        """
        shared = set(plan.parameters.shared)
        for task, module in self.modules.items():
            for place, part in module.named_modules():
                part.training = place in plan.training.get(task, ())
            for name, tensor, is_parameter in named_tensors(module):
                tensor.data = tensor.data.cpu()
                if name not in shared or not tensor.is_floating_point():  # it may be a page of the expert's file
                    tensor.data = tensor.data.clone()
                tensor.requires_grad_(is_parameter and tensor.is_floating_point() and name not in plan.frozen)
        self.trials, self.corrections = plan.trials, plan.corrections
        for _, tensor, _ in named_tensors(self.corrections.base) if self.corrections else ():
            tensor.data = tensor.data.cpu()
        self.precision = {task: plan.precision(task) for task in self.modules}
        tensors = [{name: id(tensor) for name, tensor, _ in named_tensors(m)} for m in self.modules.values()]
        self.shared = [name for name in plan.parameters.shared if len({ids[name] for ids in tensors}) == 1]

    def __repr__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        """The report in a notebook."""
        return self.report._repr_html_()


def execute(
    plan: MergePlan,
    trainer: Trainer,
    data: MergeDataModule | None,
    context: Context,
    options: MergeOptions,
) -> tuple[dict[str, LightningModule], MergeReport]:
    """Merge, outside of inference mode, so that the merged tensors can be trained.

    Args:
        plan: what to merge.
        trainer: whose device, precision and limits are used.
        data: the tasks' data; ``None`` where the method needs none.
        context: how it is carried out.
        options: what stays off the device, and how much memory forwards may take.

    Returns:
        Task -> merged module (the shared tensors are the same in all), and the report without metrics.

    Raises:
        MergeError: if a task has no calibration data, or processes differ in what they merge.
        OutOfMemoryError: with advice on how to take less memory.
    """
    peers = context.peers
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    tasks, samples = calibration_tasks(plan, trainer, data, peers, options.offload)
    if empty := [name for name, sample in samples.items() if not sample.samples]:
        raise MergeError([f"task '{name}': its loader gives no batch to calibrate on" for name in empty])
    settings = {
        "method": plan.method.describe(),
        "shared parameters": plan.parameters.shared,
        "on_bad_batch": context.on_bad_batch,
        "precision": trainer.precision,
        "device": device.type,
        "processes": peers.size,
        **{f"version of {package}": version for package, version in package_versions().items()},
    }
    _require_agreement(tasks, samples, settings, data, peers)
    if any(peers.exchange(context.journal.keeps)):
        data_of_all = peers.exchange(fingerprint_of_data(tasks))
        given, exact = plan.files, options.resume == "exact"
        known = {**fingerprint_of_experts(tasks, given, exact), **fingerprint_of_base(plan.base, given, exact)}
        known.update(combined(tasks, data_of_all))
        context.journal.bind({**known, **readable(settings)})
    merged = average_shared(
        plan,
        plan.method.weights(list(plan.experts)),
        device,
        plan.method.starts_from_average,
        is_mapped=options.offload == "layers",
    )
    with one_at_a_time(), torch.compiler.set_stance("force_eager"):  # a compiled forward does not pause at its layers
        try:
            check = None
            if plan.method.runs_calibration_forwards:
                check = check_forwards(tasks, merged, context, shortened)
                if options.memory_budget == "auto":
                    _limit_memory(plan, trainer, tasks, check, context)
            job = MergeJob(tasks, merged, context, plan.base, device)
            records = plan.method.merge(job)
        except torch.OutOfMemoryError as error:
            error.add_note(
                "all calibration forwards pause at each layer and hold their activations there: give the merge a "
                "memory_budget (in GiB; what is more goes to host memory), or lower the datamodule's num_samples"
            )
            raise
    modules = with_shared(plan, merged, job.task_tensors, job.heads)
    if ranks := {name: record.rank for record in records for name in record.of_tasks if record.rank}:
        names = [name for name in ranks if job.task_tensors[name][0].dim() > 1]
        base = with_shared(plan, merged, refitted=job.heads)[tasks[0].name]
        plan.corrections = Corrections(base, names, max(ranks.values()))
    if peers.size == 1:  # with several, a step that waits for the others would wait forever
        plan.trials = {task.name: trial for task in tasks if (trial := Trial.of(task, device)) is not None}
    report = MergeReport(
        method=plan.method.describe(),
        tasks=list(plan.experts),
        layers=[record for record in records if not isinstance(record, ParameterRecord)],
        samples={name: sample.samples for name, sample in samples.items()},
        overlap={name: sample.overlap for name, sample in samples.items()},
        held_out={name: data.holds_out(name) for name in samples} if data is not None else {},
        skipped=context.skipped,
        checks=[*([] if check is None else [f"calibration forwards: {check}"]), *plan.checks],
        warnings=plan.parameters.warnings + context.warnings + job.warnings + (check.warnings if check else []),
        seconds=time.perf_counter() - start,
        peak_memory=peak_memory(device),
        seed=data.seed if data is not None else None,
        resumed=context.journal.resumed,
        versions=package_versions(),
        date=date(),
    )
    report.parameters, report.sizes = summarize_parameters(
        plan.experts, plan.parameters, records, bool(plan.layers) and plan.method.merges_layers, job.heads
    )
    corrected = plan.corrections.names if plan.corrections else []
    stored, folded = {task: plan.precision(task) for task in plan.experts}, plan.parameters.merged_adapters
    corrections = report.sizes.get("correction", 0) // len(modules)
    report.size = measure_size(plan.experts, modules, stored, folded, corrected, corrections)
    report.private = describe_private(plan.experts, plan.parameters.private, job.heads, records) if job.heads else []
    if names := [record.name for record in report.layers if record.permuted]:
        report.warnings.append(
            f"the rows of {some(names)} come in another order in the merged model than in the experts, as proposals "
            "that a detector sorts by score, or tokens that a mixture sorts by expert. These calls were merged "
            "one-sided. To merge them two-sided, give the module a calibration_step(batch) in which rows keep their "
            "places"
        )
    report.padding, unmasked = describe_padding(peers.exchange(count_padding(tasks)), report.layers, context.unplaced)
    report.warnings += unmasked
    report.warnings += [warning for sample in samples.values() for warning in sample.warnings]
    return modules, report


def _limit_memory(
    plan: MergePlan, trainer: Trainer, tasks: Sequence[Task], check: ForwardCheck, context: Context
) -> None:
    """Give paused forwards a budget if they would need most of the memory that is free, and say so."""
    device = trainer.strategy.root_device
    free, most = free_memory(device), max(check.held.values(), default=0.0)
    if free is None or plan.method.options is None:
        return
    if device.type == "cpu":  # which the processes of this machine share
        free //= trainer.num_devices
    samples = [sum(map(task.size, task.batches)) for task in tasks]
    of_stream = sum(count * check.held.get(task.name, most) for count, task in zip(samples, tasks))
    held = len(plan.method.options.streams) * of_stream
    context.memory_budget = automatic_budget(held, free, plan.memory()["largest layer"])
    if context.memory_budget is not None:
        where = "temporary files" if device.type == "cpu" else "host memory"
        warning = (
            f"paused forwards would hold about {held / 2**30:.2f} GiB, and {free / 2**30:.2f} GiB are free: what "
            f"exceeds {context.memory_budget / 2**30:.2f} GiB is moved to {where}, which takes time. The result is the "
            "same. To avoid it, lower the datamodule's num_samples"
        )
        rank_zero_warn(warning)
        context.warnings.append(warning)


def _require_agreement(
    tasks: Sequence[Task],
    samples: Mapping[str, CalibrationSample],
    settings: Mapping[str, Any],
    data: MergeDataModule | None,
    peers: Peers,
) -> None:
    """Make sure that all processes merge the same experts, in the same way, on samples of the same data.

    Raises:
        MergeError: in all processes, naming what differs and where.
    """
    if peers.size == 1:
        return
    mine = {
        "order of tasks": [task.name for task in tasks],
        **{f"number of samples of '{name}'": sample.samples for name, sample in samples.items()},
        **({} if data is None else {"seed of the samples": data.seed, "split": data.split}),
        **({} if data is None else {"holdout": [data.holds_out(name) for name in data.tasks]}),
        **settings,
        **sketch_of_experts(tasks),
    }
    first, *others = peers.exchange(readable(mine))
    problems = []
    for rank, theirs in enumerate(others, start=1):
        if differing := [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]:
            problems.append(
                f"process {rank} of {peers.size} differs from process 0 in {some(differing)}; start all processes with "
                "the same files, configuration and versions"
            )
    if problems:
        raise MergeError(problems)


def calibration_tasks(
    plan: MergePlan,
    trainer: Trainer,
    data: MergeDataModule | None,
    peers: Peers,
    offload: Offload = None,
    batches: int | None = None,
) -> tuple[list[Task], dict[str, CalibrationSample]]:
    """Load the calibration batches of one process to the trainer's device, or only the first few of them.

    Perturbed copies of the batches come after them, unless only the first few batches are wanted.

    Returns:
        The tasks with their batches, and the samples that the batches were taken from, if the method needs any.
    """

    def move(module: nn.Module) -> nn.Module:
        return trainer.precision_plugin.convert_module(module).to(trainer.strategy.root_device)

    samples: dict[str, CalibrationSample] = {}
    tasks = []
    for name, expert in plan.experts.items():
        moved: list[Batch] = []
        own = trainer if data is None else trainer_of_task(trainer, data, name)
        numbers: list[int] | None = None
        if "data" in plan.method.needs and data is not None:
            limit = trainer.limit_val_batches if data.split == "val" else trainer.limit_train_batches
            samples[name] = data.calibration(name, limit, peers)
            running = Placement(expert, move).module()  # whose hooks may compute on the device
            assert isinstance(running, LightningModule)
            running.trainer = own
            for number, (batch, index) in list(zip(samples[name].numbers, samples[name].batches))[:batches]:
                label = f"task '{name}', calibration batch {number}"
                with data.seeded(name, number, cuda=trainer.strategy.root_device.type == "cuda"):  # hooks may augment
                    moved.append(_on_device(batch, index, running, data.tasks[name], trainer, label))
            del running
            numbers = samples[name].numbers
            if batches is None:
                moved, numbers = data.augmented(name, moved, samples[name])
        step = CalibrationStep(own)
        task = Task(name, expert, moved, step, lambda batch: batch.masks, numbers, move, offload)
        task.cuts = smaller_batches
        task.prepare, task.size = step.prepare, samples_in
        if step.calibration_step(expert) and is_overridden("validation_step", expert):
            validation = CalibrationStep(own, validates=True)
            task.validation = validation.prepare, validation
        task.loss, task.predict = TrainingLoss(own, name), Prediction(own, name)
        tasks.append(task)
    return tasks, samples


def _on_device(
    batch: Any, index: int, expert: LightningModule, data: LightningDataModule, trainer: Trainer, label: str
) -> Batch:
    """Lightning's own steps from the loader to ``validation_step``, with the hooks of whoever overrides them."""
    batch = trainer.precision_plugin.convert_input(batch)
    before, transfer, after = (getattr(data if is_overridden(h, data) else expert, h) for h in TRANSFER_HOOKS)
    batch = after(transfer(before(batch, index), trainer.strategy.root_device, index), index)
    return Batch(batch, index, padding_masks(batch, expert, label))
