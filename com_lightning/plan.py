"""What will be merged, and how. All of it is checked before calibration batches are read."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from com_lightning.core.layers import stored_parameters
from com_lightning.core.layers.candidates import Candidate, candidates
from com_lightning.core.tensors.modules import named_tensors, num_bytes, tied_names
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError, collected_warnings
from com_lightning.experts.adapters import adapter_parameters
from com_lightning.experts.base_model import load_base
from com_lightning.experts.hub import local_folders
from com_lightning.experts.load import ExpertSource, SetUp, complete, lacks, load_expert, take_precision
from com_lightning.experts.owner import compare_with_owner
from com_lightning.experts.parameters import Parameters, sort_parameters
from com_lightning.experts.settings import computed_buffers, described, differing, settings_of
from com_lightning.experts.similarity import non_finite_weights, unmergeable_weights
from com_lightning.experts.state_dicts import group_warnings, some
from com_lightning.experts.transformers_models import writing_warnings
from com_lightning.experts.vocabulary import match_vocabularies
from com_lightning.extras import missing
from com_lightning.methods import Average, MergingMethod
from com_lightning.options import MergeOptions
from com_lightning.results.corrections import Corrections
from com_lightning.results.tables import table
from com_lightning.results.verification import Trial


@dataclass
class MergePlan:
    """What will be merged, after all checks.

    Attributes:
        experts: task -> its module, in the order of the datamodule's tasks.
        method: the rule.
        parameters: names of the shared and the private parameters.
        layers: name -> layer that will be solved.
        frozen: names of the parameters that neither the model nor any expert trains.
        training: task -> names of the submodules that its source has in train mode.
        data: a sentence on the calibration data.
        stored: task -> name of each tensor that its source stores in another precision than the model's -> that
            precision.
        base: name of each shared parameter -> its value in the base, if the method needs it.
        need: words on the memory that the calibration forwards take.
        trials: task -> a calibration forward, to be repeated with what is written.
        corrections: what each task adds to the weights of the merged model, if the method has that.
        checks: what was checked, and what could not be.
        files: ``expert 'name'`` or ``base`` -> the file or folder that it was loaded from, if it was.
    """

    experts: dict[str, LightningModule]
    method: MergingMethod
    parameters: Parameters
    layers: dict[str, Candidate]
    frozen: set[str] = field(default_factory=set)
    training: dict[str, set[str]] = field(default_factory=dict)
    data: str = ""
    stored: dict[str, dict[str, torch.dtype]] = field(default_factory=dict)
    base: Mapping[str, Tensor] | None = None
    need: str = "the activations of the calibration data come on top."
    trials: dict[str, Trial] = field(default_factory=dict)
    corrections: Corrections | None = None
    checks: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)

    def precision(self, task: str) -> dict[str, torch.dtype]:
        """Find the precision that a task's merged parameters are stored in, where it is not that of the module.

        A private parameter has the precision of its source, a shared one the lowest that holds those of all sources.

        Args:
            task: name of the task.

        Returns:
            Name -> precision.
        """
        result = dict(self.stored.get(task, {}))
        current = {name: tensor.dtype for name, tensor, _ in named_tensors(self.experts[task])}
        for name in self.parameters.shared:
            dtypes = [self.stored.get(other, {}).get(name, current[name]) for other in self.experts]
            result[name] = functools.reduce(torch.promote_types, dtypes)
        return {name: dtype for name, dtype in result.items() if dtype != current[name]}

    def outside_layers(self) -> dict[str, str]:
        """Find the shared parameters that belong to no layer.

        Returns:
            Name -> class of the module that holds it, and its name there.
        """
        expert = next(iter(self.experts.values()))
        ties = tied_names(expert)
        of_layers = {ties[name] for layer in self.layers.values() for name in layer.parameters.values()}
        parameters = {name for name, _, is_parameter in named_tensors(expert) if is_parameter}
        result = {}
        for name in self.parameters.shared:
            if ties[name] not in of_layers and name in parameters:
                owner, _, attribute = name.rpartition(".")
                result[name] = f"{type(expert.get_submodule(owner)).__name__}.{attribute}"
        return result

    def memory(self) -> dict[str, int]:
        """Estimate the memory that is needed at least.

        Returns:
            Bytes of the experts, the merged model (with corrections one more for each task, and one more where a rule
            is the anchor), and the statistics and solution of the largest layer.
        """
        options = self.method.options
        sizes = [num_bytes(t for _, t, _ in named_tensors(e)) for e in self.experts.values()]
        largest = 0
        for layer in self.layers.values():
            groups, outputs, inputs = layer.layer_type.to_matrix(layer.module, layer.module).shape
            gram, weight = groups * inputs**2, groups * outputs * inputs
            grams = 3 if options and options.by_similarity else 2
            largest = max(largest, len(sizes) * (grams * gram + weight) * 4 + (2 * gram + 3 * weight) * 8)
        copies = 1 + len(sizes) * self.method.has_corrections + bool(options and options.anchor == "rule")
        return {"experts": sum(sizes), "merged model": max(sizes) * copies, "largest layer": largest}

    def __str__(self) -> str:
        states = {task: {n: tensor for n, tensor, _ in named_tensors(expert)} for task, expert in self.experts.items()}
        values = next(iter(states.values()))
        solved: dict[str, list[int]] = {}
        for layer in self.layers.values():
            count = sum(parameter.numel() for parameter in stored_parameters(layer.module).values())
            solved.setdefault(f"solved: {layer.layer_type.name}", []).append(count)
        verb = "to be seen" if self.layers else "averaged" if isinstance(self.method, Average) else "merged"
        outside: dict[str, list[int]] = {}
        for name, description in self.outside_layers().items():
            outside.setdefault(f"{verb}: {description}", []).append(values[name].numel())
        rows = [["what", "layers", "values"]]
        rows += [[label, str(len(counts)), f"{sum(counts):,}"] for label, counts in {**solved, **outside}.items()]
        for task, names in self.parameters.private.items():
            total = sum(states[task][name].numel() for name in names)
            rows.append([f"private to {task}: {some(names) or 'nothing'}", "", f"{total:,}"])
        memory = self.memory()
        sizes = ", ".join(f"{label} {size / 2**20:,.1f} MiB" for label, size in memory.items())
        unseen = (
            'The parameters "to be seen" are solved if each function that uses them is linear in them; else averaged.\n'
        )
        return (
            f"Merging {len(self.experts)} experts ({', '.join(self.experts)}) with {type(self.method).__name__}.\n\n"
            f"{table(rows)}\n\n{self.data}{unseen if outside and self.layers else ''}"
            f"Memory: at least {sum(memory.values()) / 2**20:,.1f} MiB ({sizes})"
            + (f"; {self.need}" if self.layers else ".")
            + "".join(f"\nWarning: {warning}" for warning in self.parameters.warnings)
        )


def make_plan(
    model: LightningModule,
    sources: Mapping[str, ExpertSource],
    data: MergeDataModule | None,
    method: MergingMethod,
    options: MergeOptions | None = None,
    problems: Sequence[str] = (),
    becomes_first: bool = False,
) -> MergePlan:
    """Load the experts and check everything that can be checked before calibration batches are read.

    Args:
        model: a module of the experts' class. With ``resize_embeddings`` it is resized, too.
        sources: task -> its expert. Names on the Hub are all looked up before any is downloaded.
        data: the data of the same tasks, set up; ``None`` if there are none.
        method: the rule.
        options: how to merge.
        problems: problems found elsewhere, to be reported with the others.
        becomes_first: whether ``model`` is to become the merged model of the first task, and must be built like it.

    Returns:
        The plan.

    Raises:
        MergeError: with all problems at once.
    """
    options = options or MergeOptions()
    tasks = list(sources) if data is None else list(data.tasks)
    for name in (*sources, *tasks, *method.given_importance()):
        if not isinstance(name, str):
            raise MergeError([f"names of tasks are text; put quotes around {name!r} wherever it stands"])
    if is_overridden("configure_model", model):  # Lightning calls it again later, as it is meant to be
        with torch.inference_mode(False):
            model.configure_model()
    found = [*problems, *options.problems(), *_task_problems(sources, data, method), *method.problems(tasks)]
    if data is not None:
        data.calibrates = "data" in method.needs
        found += data.problems()
    wanted: dict[str, Any] = {f"expert '{task}'": source for task, source in sources.items()}
    local, absent = local_folders({**wanted, "base": options.base} if "base" in method.needs else wanted)
    found += absent
    experts: dict[str, LightningModule] = {}
    stored: dict[str, dict[str, torch.dtype]] = {}
    lean = options.offload == "layers"
    checks: list[str] = []
    with collected_warnings() as warnings:
        for task in sorted(sources, key=lambda task: tasks.index(task) if task in tasks else len(tasks)):
            if (label := f"expert '{task}'") in local:
                with _collecting(found):
                    set_up = _set_up(task, data)
                    experts[task] = load_expert(task, local[label], model, as_stored=True, set_up=set_up, lean=lean)
                    stored[task] = take_precision(experts[task], model)
                    checks += compare_with_owner(label, local[label], experts[task], model)
    built: list[str] = []
    if experts:
        with _collecting(found):
            model, built = _completed(model, *next(iter(experts.items())), data, becomes_first)
    found += non_finite_weights(experts)
    with collected_warnings() as odd_tokenizers:
        found += match_vocabularies(model, experts, options.private, options.resize_embeddings)
    parameters = Parameters()
    if experts:
        with _collecting(found):
            parameters = sort_parameters(model, experts, options.private)
        if becomes_first:
            found += differences(model, *next(iter(experts.items())))
            parameters.warnings += _other_settings(model, *next(iter(experts.items())))
    labelled = {"the model": model, **{f"expert '{task}'": expert for task, expert in experts.items()}}
    found += unmergeable_weights(
        labelled, set(parameters.shared), {f"expert '{task}'": dtypes for task, dtypes in stored.items()}
    )
    parameters.warnings += _repeated(sources)
    parameters.warnings[:0] = [*built, *group_warnings(warnings, local)]
    parameters.warnings += [*odd_tokenizers, *writing_warnings(experts)]
    if method.has_corrections and (problem := missing("peft", "the tasks' adapters")):
        parameters.warnings.append(f"{problem}. Without it, a result has whole checkpoints alone")
    base: dict[str, Tensor] | None = None
    if "base" in local and parameters.shared:
        with _collecting(found):
            base, odd = load_base(local["base"], model, experts, parameters.shared, options.resize_embeddings)
            parameters.warnings += [warning for warning in odd if warning not in parameters.warnings]
    if "loss" in method.needs:
        found += _loss_problems(method, experts, data)
        if data is not None and data.batch_size != 1:
            parameters.warnings.append(
                f"data.batch_size is {data.batch_size or 'that of the loaders'}: {type(method).__name__} squares the "
                "gradients of single samples, and those of larger batches only stand in for them; set it to 1"
            )
    if data is not None and not found:
        parameters.warnings += data.warnings()
    if found:
        for warning in parameters.warnings:
            rank_zero_warn(warning)
        raise MergeError(found)
    # PEFT freezes what it loads, so that an expert alone does not tell what its user freezes.
    everything = [entry for m in (model, *experts.values()) for entry in m.named_parameters(remove_duplicate=False)]
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    frozen -= {name for name, parameter in everything if parameter.requires_grad}
    training = {task: {name for name, part in e.named_modules() if part.training} for task, e in experts.items()}
    plan = MergePlan(experts, method, parameters, {}, frozen, training, stored=stored, base=base)
    plan.checks = group_warnings(checks, local)
    plan.files = {label: Path(source) for label, source in local.items() if isinstance(source, (str, Path))}
    for expert in experts.values():
        expert.eval()
        if method.options and data is not None:
            plan.layers.update(candidates(expert, set(parameters.shared)))
        expert.requires_grad_(False)
    if data is not None and "data" in method.needs:
        held = [name for name in data.tasks if data.holds_out(name)]
        used = ", held out of validation" if held else "" if data.split == "train" else ", also validated"
        used += f" in {some(held)} alone" if 0 < len(held) < len(data.tasks) else ""
        copies = f", with {data.augmented_copies} perturbed copies of each" if data.augmented_copies else ""
        plan.data = f"Calibration: up to {data.num_samples:,} samples of each task's {data.split} data{used}{copies}.\n"
    return plan


def _repeated(sources: Mapping[str, ExpertSource]) -> list[str]:
    """Warnings of experts that are one and the same."""
    tasks: dict[object, list[str]] = {}
    for task, source in sources.items():
        is_path = isinstance(source, (str, Path))
        tasks.setdefault(Path(source).resolve() if is_path else id(source), []).append(task)  # type: ignore[arg-type]
    return [
        f"experts {', '.join(map(repr, same))}: all come from the same source, which counts {len(same)} times; is one "
        "of them meant to be another?"
        for same in tasks.values()
        if len(same) > 1
    ]


def _set_up(task: str, data: MergeDataModule | None) -> SetUp:
    """What calls ``setup`` of a module of this task."""
    return partial(data.set_up_module, task) if data is not None else lambda module: module.setup(stage="validate")


def _completed(
    model: LightningModule, task: str, expert: LightningModule, data: MergeDataModule | None, in_place: bool
) -> tuple[LightningModule, list[str]]:
    """Let ``setup`` of the model build the parameters that it lacks. Returns it, and a warning if that was so."""
    if not is_overridden("setup", model) or not lacks(model, {n: tuple(t.shape) for n, t, _ in named_tensors(expert)}):
        return model, []
    before = {name for name, _, _ in named_tensors(model)}
    model = model if in_place else copy.deepcopy(model)
    complete(model, f"expert '{task}'", _set_up(task, data))
    built = some([name for name, _, _ in named_tensors(model) if name not in before], most=2)
    warning = (
        f"{type(model).__name__}.setup builds {built or 'layers'}: a trainer that runs a merged module builds them "
        "anew, with random values. Give it the merged checkpoint as ckpt_path, too, or build them in __init__ or "
        "configure_model"
    )
    return model, [warning]


@contextmanager
def _collecting(found: list[str]) -> Iterator[None]:
    """Add the problems of a MergeError to a list, and go on."""
    try:
        yield
    except MergeError as error:
        found += error.problems


def _task_problems(
    sources: Mapping[str, ExpertSource], data: MergeDataModule | None, method: MergingMethod
) -> list[str]:
    """Check that each task has an expert and data, and a name that can be that of a file."""
    found = []
    if data is None and "data" in method.needs:
        found.append(
            f"data: {type(method).__name__} needs the tasks' data, a MergeDataModule; the rules of docs/methods.md "
            "that need none work without"
        )
    if data is None and not sources:
        found.append("experts: none is given")
    if data is not None and (unknown := [task for task in sources if task not in data.tasks]):
        found.append(f"experts: no data for {', '.join(unknown)}; data.tasks has {', '.join(data.tasks)}")
    if data is not None and (missing := [task for task in data.tasks if task not in sources]):
        found.append(f"data.tasks: no expert for {', '.join(missing)}; experts has {', '.join(sources) or 'none'}")
    for task in sources:
        if not task or task.startswith(".") or not all(c.isalnum() or c in "-_. " for c in task) or len(task) > 60:
            found.append(f"experts: '{task}' cannot name a file; use at most 60 letters, digits, '-', '_' and '.'")
    return found


def _loss_problems(
    method: MergingMethod, experts: Mapping[str, LightningModule], data: MergeDataModule | None
) -> list[str]:
    """Check that there are losses to differentiate."""
    found = [
        f"task '{task}': {type(method).__name__} needs a loss, but {type(expert).__name__} has no training_step; "
        "give it one, or take a method that needs none"
        for task, expert in experts.items()
        if not is_overridden("training_step", expert)
    ]
    if data is not None and data.augmented_copies:
        found.append(
            f"data.augmented_copies: {type(method).__name__} needs labels, and those of perturbed samples are not "
            "known; set it to 0"
        )
    return found


def _other_settings(model: LightningModule, task: str, expert: LightningModule) -> list[str]:
    """Warn of what shapes outputs without being a parameter, and is not the same in the model as in its expert."""
    settings = {"your model": settings_of(model), "its expert": settings_of(expert)}
    found = {name: values for name, values in differing(settings).items() if name not in computed_buffers(expert)}
    return [
        f"the model given to trainer.validate becomes the merged model of task '{task}', but {text}. So that model "
        "and Lightning's own table are not what is reported and written; take the callback's `modules`"
        for text in [described(found)]
        if text
    ]


def differences(model: LightningModule, task: str, expert: LightningModule) -> list[str]:
    """Check that the model is built like the expert of its task.

    Args:
        model: the module given to ``trainer.validate``.
        task: the first task, whose merged module it becomes.
        expert: of that task.

    Returns:
        One problem, or none.
    """
    if adapter_parameters(model) != adapter_parameters(expert):
        return []  # another message says how adapters differ
    ours = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(model)}
    theirs = {name: tuple(tensor.shape) for name, tensor, _ in named_tensors(expert)}
    differing = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return [
        f"the model given to trainer.validate becomes the merged model of task '{task}', but does not fit: {name} is "
        f"{ours.get(name, 'missing')}, in its expert {theirs.get(name, 'missing')}; give a module built like "
        "that one"
        for name in differing[:1]
    ]
