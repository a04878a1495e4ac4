"""From experts and data to merged modules: the plan, checked before any data is read, and its execution."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from com_lightning.account import account
from com_lightning.adapters import adapter_parameters
from com_lightning.base_model import load_base
from com_lightning.checkpoints import collected_warnings
from com_lightning.core.candidates import Candidate, candidates
from com_lightning.core.layers import own_parameters
from com_lightning.core.placement import Placement
from com_lightning.core.rule import Task
from com_lightning.core.run import Run
from com_lightning.core.sharing import as_dtype, average, copy_module, named_tensors, size_of, tied_names
from com_lightning.datamodule import TRANSFER_HOOKS, CalibrationSample, MergeDataModule
from com_lightning.experts import ExpertSource, MergeError, Parameters, load_expert, sort_parameters, take_precision
from com_lightning.fingerprint import combined, fingerprint_of_data, fingerprint_of_experts, readable
from com_lightning.kinship import non_finite_weights
from com_lightning.masks import padding_mask, unmasked
from com_lightning.methods import Average, MergeJob, MergingMethod, ParameterRecord
from com_lightning.report import MergeReport, table
from com_lightning.state_dicts import some
from com_lightning.vocabulary import match_vocabularies


@dataclass
class MergePlan:
    """What is about to be merged, checked.

    Attributes:
        experts: task -> its module, in the order of the datamodule's tasks.
        method: the rule.
        parameters: shared and private names.
        layers: the layers to be solved, by name.
        frozen: parameters that no expert trains.
        data: in words, for each task.
        stored: task -> name of each tensor that its source stores in another precision than the model's -> that one.
        base: name of what is shared -> its value in the base, if the method needs it.
        need: in words, what the calibration forwards hold.
    """

    experts: dict[str, LightningModule]
    method: MergingMethod
    parameters: Parameters
    layers: dict[str, Candidate]
    frozen: set[str] = field(default_factory=set)
    data: str = ""
    stored: dict[str, dict[str, torch.dtype]] = field(default_factory=dict)
    base: Mapping[str, Tensor] | None = None

    def precision(self, task: str) -> dict[str, torch.dtype]:
        """Precision in which a task's merged parameters are stored: that of its source, and for shared ones the lowest
        that holds those of all sources."""
        result = dict(self.stored.get(task, {}))
        shared = {name: tensor.dtype for name, tensor, _ in named_tensors(self.experts[task])}
        for name in self.parameters.shared:
            for other in self.experts:
                own = self.stored.get(other, {}).get(name, shared[name])
                result[name] = own if other == next(iter(self.experts)) else torch.promote_types(result[name], own)
        return {name: dtype for name, dtype in result.items() if dtype != shared[name]}

    need: str = "the activations of the calibration data come on top."

    def others(self) -> dict[str, str]:
        """Name of each shared parameter that belongs to no layer -> what it is called in which class."""
        expert = next(iter(self.experts.values()))
        ties = tied_names(expert)
        of_layers = {ties[name] for layer in self.layers.values() for name in layer.parameters.values()}
        owners = {name: name.rpartition(".") for name in self.parameters.shared if ties[name] not in of_layers}
        parameters = {name for name, _, is_parameter in named_tensors(expert) if is_parameter}
        return {
            name: f"{type(expert.get_submodule(owner)).__name__}.{own}"
            for name, (owner, _, own) in owners.items()
            if name in parameters
        }

    def memory(self) -> dict[str, int]:
        """Bytes needed at least: the experts, the merged model, the statistics and solution of the largest layer."""
        sizes = [size_of(t for _, t, _ in named_tensors(e)) for e in self.experts.values()]
        largest = 0
        for layer in self.layers.values():
            groups, outputs, inputs = layer.kind.to_matrix(layer.module, layer.module).shape
            gram, weight = groups * inputs**2, groups * outputs * inputs
            largest = max(largest, len(sizes) * (2 * gram + weight) * 4 + (2 * gram + 3 * weight) * 8)
        return {"experts": sum(sizes), "merged model": max(sizes), "largest layer": largest}

    def __str__(self) -> str:
        expert = next(iter(self.experts.values()))
        counts: dict[str, list[int]] = {}
        for layer in self.layers.values():
            entry = counts.setdefault(layer.kind.name, [0, 0])
            entry[0] += 1
            entry[1] += sum(p.numel() for p in own_parameters(layer.module).values())
        tensors = {name: tensor for name, tensor, _ in named_tensors(expert)}
        loose: dict[str, list[int]] = {}
        for name, what in self.others().items():
            entry = loose.setdefault(what, [0, 0])
            entry[0] += 1
            entry[1] += tensors[name].numel()
        told = "to be seen" if self.layers else "averaged" if isinstance(self.method, Average) else "merged"
        rows = [["what", "layers", "values"]]
        rows += [[f"solved: {kind}", str(n), f"{values:,}"] for kind, (n, values) in counts.items()]
        rows += [[f"{told}: {what}", str(n), f"{values:,}"] for what, (n, values) in loose.items()]
        for task, names in self.parameters.private.items():
            own = {name: tensor for name, tensor, _ in named_tensors(self.experts[task])}
            total = sum(own[name].numel() for name in names)
            rows.append([f"private to {task}: {some(names) or 'nothing'}", "", f"{total:,}"])
        memory = self.memory()
        sizes = ", ".join(f"{what} {size / 2**20:,.1f} MiB" for what, size in memory.items())
        unseen = "Solved where a function that they go into is linear in them, else averaged: those to be seen.\n"
        return (
            f"Merging {len(self.experts)} experts ({', '.join(self.experts)}) with {type(self.method).__name__}.\n\n"
            f"{table(rows)}\n\n{self.data}{unseen if loose and self.layers else ''}"
            f"Memory: at least {sum(memory.values()) / 2**20:,.1f} MiB ({sizes})"
            + (f"; {self.need}" if self.layers else ".")
            + "".join(f"\nWarning: {warning}" for warning in self.parameters.warnings)
        )


def make_plan(
    model: LightningModule,
    sources: Mapping[str, ExpertSource],
    data: MergeDataModule | None,
    method: MergingMethod,
    private: Sequence[str] | None = None,
    problems: Sequence[str] = (),
    becomes_first: bool = False,
    grow_vocabulary: bool = False,
    base: ExpertSource | None = None,
) -> MergePlan:
    """Load the experts and check everything that can be checked before data is read.

    Args:
        model: a module of the experts' class.
        sources: task -> where its expert comes from.
        data: of the same tasks, set up; ``None``: none is at hand, and the method must need none.
        method: the rule.
        private: patterns of parameters that stay with their task; ``None``: those that differ in name or shape.
        problems: found elsewhere, to be reported with the others.
        becomes_first: whether ``model`` is to become the merged model of the first task, and must be built like it.
        grow_vocabulary: see :func:`~com_lightning.vocabulary.match_vocabularies`; ``model`` grows too.
        base: what the experts were fine-tuned from, for a method that needs it; ``None``: ``model``.

    Raises:
        MergeError: with all problems at once.
    """
    named = (*sources, *(data.tasks if data is not None else ()), *(method.importance or ()))
    if strange := [name for name in named if not isinstance(name, str)]:
        raise MergeError([f"names of tasks are text; put quotes around {strange[0]!r} wherever it stands"])
    if is_overridden("configure_model", model):  # Lightning calls it later, and asks that it may be called again
        with torch.inference_mode(False):
            model.configure_model()
    found = list(problems)
    known = list(sources) if data is None else list(data.tasks)
    if data is None and method.needs_data:
        found.append(
            f"data: {type(method).__name__} needs the tasks' data, a MergeDataModule; without data there are the rules "
            "of docs/methods.md that need none"
        )
    if data is None and not sources:
        found.append("experts: none is given")
    if data is not None and (unknown := [task for task in sources if task not in data.tasks]):
        found.append(f"experts: no data for {', '.join(unknown)}; data.tasks has {', '.join(data.tasks)}")
    if missing := [task for task in known if task not in sources]:
        found.append(f"data.tasks: no expert for {', '.join(missing)}; experts has {', '.join(sources) or 'none'}")
    for task in sources:
        if not task or task.startswith(".") or not all(c.isalnum() or c in "-_. " for c in task) or len(task) > 60:
            found.append(f"experts: '{task}' cannot name a file; use at most 60 letters, digits, '-', '_' and '.'")
    found += method.problems(known) + (data.problems() if data is not None else [])
    experts: dict[str, LightningModule] = {}
    stored: dict[str, dict[str, torch.dtype]] = {}
    with collected_warnings() as warnings:
        for task in [*(t for t in known if t in sources), *(t for t in sources if t not in known)]:
            try:
                experts[task] = load_expert(task, sources[task], model, as_stored=True)
                stored[task] = take_precision(experts[task], model)
            except MergeError as error:
                found += error.problems
    found += non_finite_weights(experts)
    parameters = Parameters()
    found += match_vocabularies(model, experts, private, grow_vocabulary)
    if experts:
        try:
            parameters = sort_parameters(model, experts, private)
        except MergeError as error:
            found += error.problems
        if becomes_first:
            found += _unlike(model, *next(iter(experts.items())))
    parameters.warnings[:0] = warnings
    origin: dict[str, Tensor] | None = None
    if method.needs_base and parameters.shared:
        try:
            origin, odd = load_base(base, model, experts, parameters.shared, grow_vocabulary)
            parameters.warnings += odd
        except MergeError as error:
            found += error.problems
    if found:
        for warning in parameters.warnings:
            rank_zero_warn(warning)
        raise MergeError(found)
    shared = set(parameters.shared)
    layers = {name: layer for expert in experts.values() for name, layer in candidates(expert, shared).items()}
    trained = {n for expert in experts.values() for n, p in _parameters(expert) if p.requires_grad}
    frozen = {n for expert in experts.values() for n, _ in _parameters(expert)} - trained
    for expert in experts.values():
        expert.requires_grad_(False)
    if data is None or not method.needs_data:
        return MergePlan(experts, method, parameters, {}, frozen, stored=stored, base=origin)
    held = ", held out of validation" if data.holdout else "" if data.source == "train" else ", which are validated too"
    told = f"Calibration: up to {data.samples:,} samples of each task's {data.source} data{held}.\n"
    return MergePlan(experts, method, parameters, layers, frozen, told, stored, origin)


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


def execute(
    plan: MergePlan,
    trainer: Trainer,
    data: MergeDataModule | None,
    run: Run,
    experts_stay: bool = False,
) -> tuple[dict[str, LightningModule], MergeReport]:
    """Merge. Returns task -> merged module (the shared tensors are the same in all), and the report without metrics.

    Must not run in inference mode: the tensors made here are to be trained again.

    Args:
        plan: what to merge.
        trainer: whose device, precision and limits are used.
        data: the tasks' data; ``None`` where the method needs none.
        run: how it is carried out.
        experts_stay: whether the experts' weights are brought to the device where they are used, and no sooner.
    """
    peers = run.peers
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    tasks, samples = calibration_tasks(plan, trainer, data, peers.rank, peers.size, experts_stay)
    if any(peers.exchange(run.journal.keeps)):
        told = {
            "method": describe(plan.method),
            "shared parameters": plan.parameters.shared,
            "on_bad_batch": run.on_bad_batch,
            "precision": trainer.precision,
            "device": device.type,
            "processes": peers.size,
            **{f"version of {package}": version for package, version in _versions().items()},
        }
        data_of_all = peers.exchange(fingerprint_of_data(tasks))
        run.journal.bind({**fingerprint_of_experts(tasks), **combined(tasks, data_of_all), **readable(told)})
    merged = average_shared(plan, plan.method.weights(list(plan.experts)), device)
    with torch.compiler.set_stance("force_eager"):  # a compiled forward does not pause at its layers
        try:
            records = plan.method.merge(MergeJob(tasks, merged, run, plan.base, device))
        except torch.OutOfMemoryError as error:
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(
                    "all calibration forwards pause at each layer and hold their activations there: give the merge a "
                    "memory_budget (in GiB; what is more goes to host memory), or lower the datamodule's samples"
                )
            raise
    modules = with_shared(plan, merged)
    report = MergeReport(
        method=describe(plan.method),
        tasks=list(plan.experts),
        layers=[record for record in records if not isinstance(record, ParameterRecord)],
        samples={name: sample.samples for name, sample in samples.items()},
        overlap={name: sample.overlap for name, sample in samples.items()},
        skipped=run.skipped,
        warnings=list(plan.parameters.warnings),
        seconds=time.perf_counter() - start,
        peak_memory=_peak_memory(device),
        seed=data.seed if data is not None else None,
        resumed=run.journal.resumed,
        versions=_versions(),
    )
    report.parameters, report.sizes = account(plan.experts, plan.parameters, records, plan.method.needs_data)
    everyones = peers.exchange(unmasked(tasks, records))
    report.warnings += dict.fromkeys(warning for warnings in everyones for warning in warnings)
    return modules, report


def calibration_tasks(
    plan: MergePlan,
    trainer: Trainer,
    data: MergeDataModule | None,
    rank: int,
    processes: int,
    experts_stay: bool = False,
    batches: int | None = None,
) -> tuple[list[Task], dict[str, CalibrationSample]]:
    """The tasks with the calibration batches of one process, or only the first few, all on the trainer's device.

    Also returns the samples that the batches were taken from, where the method needs any.
    """

    def move(module: nn.Module) -> nn.Module:
        return trainer.precision_plugin.convert_module(module).to(trainer.strategy.root_device)

    samples: dict[str, CalibrationSample] = {}
    tasks = []
    for name, expert in plan.experts.items():
        moved: list[_Batch] = []
        if plan.method.needs_data and data is not None:
            limit = trainer.limit_val_batches if data.source == "val" else trainer.limit_train_batches
            samples[name] = data.calibration(name, limit, rank, processes)
            running = Placement(expert, move).module()  # whose hooks may compute on the device
            assert isinstance(running, LightningModule)
            running.trainer = trainer
            for number, (batch, index) in list(zip(samples[name].numbers, samples[name].batches))[:batches]:
                label = f"task '{name}', calibration batch {number}"
                moved.append(_on_device(batch, index, running, data.tasks[name], trainer, label))
            del running
        numbers = samples[name].numbers if name in samples else None
        step = _CalibrationStep(trainer)
        tasks.append(Task(name, expert, moved, step, lambda batch: batch.keep, numbers, move, experts_stay))
    return tasks, samples


def average_shared(
    plan: MergePlan, weights: Sequence[float] | None = None, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """The average of each shared parameter and floating-point buffer, in the precision that it is stored in; one tensor
    for all names of a tied one."""
    precision = plan.precision(next(iter(plan.experts)))
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in plan.experts.values()]
    ties = tied_names(next(iter(plan.experts.values())))
    result: dict[str, Tensor] = {}
    for name in plan.parameters.shared:
        tensors = [state[name] for state in states]
        if ties[name] in result:
            result[name] = result[ties[name]]
        elif tensors[0].is_floating_point():
            value = average(tensors, weights).to(device, precision.get(name, tensors[0].dtype))
            result[name] = nn.Parameter(value, False) if isinstance(tensors[0], nn.Parameter) else value
    return result


def with_shared(plan: MergePlan, shared: Mapping[str, Tensor]) -> dict[str, LightningModule]:
    """Task -> a copy of its expert that holds the given shared tensors, in the experts' precision; the private ones are
    those of the expert."""
    converted: dict[int, Tensor] = {}
    modules = {}
    for task, expert in plan.experts.items():
        tensors = {}
        for name, tensor, _ in named_tensors(expert):
            if (value := shared.get(name)) is not None:
                if id(value) not in converted:
                    converted[id(value)] = as_dtype(value, tensor.dtype)
                tensors[id(tensor)] = converted[id(value)]
        module = copy_module(expert, tensors)
        assert isinstance(module, LightningModule)
        modules[task] = module
    return modules


@torch.no_grad()
def load_into(model: LightningModule, module: LightningModule) -> None:
    """Copy all parameters and buffers of ``module`` into ``model``, in place."""
    values = {name: tensor for name, tensor, _ in named_tensors(module)}
    for name, tensor, _ in named_tensors(model):
        tensor.copy_(values[name])


def describe(method: MergingMethod) -> dict[str, Any]:
    """Class and settings of a method, in plain values."""
    settings = {
        name: describe(value) if isinstance(value, MergingMethod) else value
        for name, value in vars(method).items()
        if name not in ("rule", "needs_data", "needs_base")
    }
    rule = getattr(method, "rule", None)
    return {"class": type(method).__name__, **(vars(rule) if rule else {}), **settings}


@dataclass
class _Batch:
    """A calibration batch on the device."""

    content: Any
    dataloader_idx: int
    keep: Tensor | None


def _on_device(
    batch: Any, index: int, expert: LightningModule, data: LightningDataModule, trainer: Trainer, label: str
) -> _Batch:
    """Lightning's own steps from the loader to ``validation_step``, with the hooks of whoever overrides them."""
    batch = trainer.precision_plugin.convert_input(batch)
    before, transfer, after = (getattr(data if is_overridden(h, data) else expert, h) for h in TRANSFER_HOOKS)
    batch = after(transfer(before(batch, index), trainer.strategy.root_device, index), index)
    return _Batch(batch, index, padding_mask(batch, expert, label))


@dataclass
class _CalibrationStep:
    """Runs a module's own ``calibration_step``, or else its ``validation_step``, with ``log`` muted."""

    trainer: Trainer

    def __call__(self, module: nn.Module, batch: _Batch, index: int) -> None:
        assert isinstance(module, LightningModule)
        module.trainer = self.trainer
        for part in module.modules():
            if isinstance(part, LightningModule):
                for name in ("log", "log_dict"):
                    object.__setattr__(part, name, lambda *args, **kwargs: None)
        # Two forwards run on each batch, and a step may take things out of it, or change them in place.
        content = apply_to_collection(batch.content, Tensor, torch.clone)
        with self.trainer.precision_plugin.forward_context():
            if callable(calibration_step := getattr(module, "calibration_step", None)):
                calibration_step(content)
                return
            module.on_validation_start()
            module.on_validation_epoch_start()
            module.on_validation_batch_start(content, index, batch.dataloader_idx)
            # Lightning's own way to tell what a step takes.
            arguments = [content]
            if is_param_in_hook_signature(module.validation_step, "batch_idx", min_args=2):
                arguments.append(index)
            if is_param_in_hook_signature(module.validation_step, "dataloader_idx", min_args=3):
                arguments.append(batch.dataloader_idx)
            module.validation_step(*arguments)


def _unlike(model: LightningModule, task: str, expert: LightningModule) -> list[str]:
    if adapter_parameters(model) != adapter_parameters(expert):
        return []  # it is told how adapters differ
    ours = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(model)}
    theirs = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(expert)}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [
        f"the model given to trainer.validate becomes the merged model of task '{task}', but does not fit: {name} is "
        f"{ours.get(name, 'missing')}, in its expert {theirs.get(name, 'missing')}; give a module built like that one"
        for name in differing[:1]
    ]


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for package in ("com_lightning", "torch", "lightning", "torchmetrics", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
