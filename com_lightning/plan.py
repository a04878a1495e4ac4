"""What is to be merged, and how: checked before any data is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn

from com_lightning.core.layers import own_parameters
from com_lightning.core.layers.candidates import Candidate, candidates
from com_lightning.core.tensors.modules import named_tensors, num_bytes, tied_names
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError, collected_warnings
from com_lightning.experts.adapters import adapter_parameters
from com_lightning.experts.base_model import load_base
from com_lightning.experts.hub import local_folders
from com_lightning.experts.load import ExpertSource, load_expert, take_precision
from com_lightning.experts.parameters import Parameters, sort_parameters
from com_lightning.experts.similarity import non_finite_weights
from com_lightning.experts.state_dicts import group_warnings, some
from com_lightning.experts.vocabulary import match_vocabularies
from com_lightning.methods import Average, MergingMethod
from com_lightning.results.tables import table


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
        sizes = [num_bytes(t for _, t, _ in named_tensors(e)) for e in self.experts.values()]
        largest = 0
        for layer in self.layers.values():
            groups, outputs, inputs = layer.layer_type.to_matrix(layer.module, layer.module).shape
            gram, weight = groups * inputs**2, groups * outputs * inputs
            largest = max(largest, len(sizes) * (2 * gram + weight) * 4 + (2 * gram + 3 * weight) * 8)
        return {"experts": sum(sizes), "merged model": max(sizes), "largest layer": largest}

    def __str__(self) -> str:
        expert = next(iter(self.experts.values()))
        counts: dict[str, list[int]] = {}
        for layer in self.layers.values():
            entry = counts.setdefault(layer.layer_type.name, [0, 0])
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
    resize_embeddings: bool = False,
    base: ExpertSource | None = None,
) -> MergePlan:
    """Load the experts and check everything that can be checked before data is read.

    Args:
        model: a module of the experts' class.
        sources: task -> where its expert comes from. Names on the Hub are looked up, all of them, before any is
            downloaded.
        data: of the same tasks, set up; ``None``: none is at hand, and the method must need none.
        method: the rule.
        private: patterns of parameters that stay with their task; ``None``: those that differ in name or shape.
        problems: found elsewhere, to be reported with the others.
        becomes_first: whether ``model`` is to become the merged model of the first task, and must be built like it.
        resize_embeddings: see :func:`~com_lightning.experts.vocabulary.match_vocabularies`; ``model`` grows too.
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
    if data is None and "data" in method.needs:
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
    wanted: dict[str, Any] = {f"expert '{task}'": source for task, source in sources.items()}
    local, absent = local_folders({**wanted, "base": base} if "base" in method.needs else wanted)
    found += absent
    experts: dict[str, LightningModule] = {}
    stored: dict[str, dict[str, torch.dtype]] = {}
    with collected_warnings() as warnings:
        for task in [*(t for t in known if t in sources), *(t for t in sources if t not in known)]:
            if (label := f"expert '{task}'") not in local:
                continue
            try:
                experts[task] = load_expert(task, local[label], model, as_stored=True)
                stored[task] = take_precision(experts[task], model)
            except MergeError as error:
                found += error.problems
    found += non_finite_weights(experts)
    parameters = Parameters()
    found += match_vocabularies(model, experts, private, resize_embeddings)
    if experts:
        try:
            parameters = sort_parameters(model, experts, private)
        except MergeError as error:
            found += error.problems
        if becomes_first:
            found += _unlike(model, *next(iter(experts.items())))
    parameters.warnings[:0] = group_warnings(warnings, local)
    origin: dict[str, Tensor] | None = None
    if "base" in local and parameters.shared:
        try:
            origin, odd = load_base(local["base"], model, experts, parameters.shared, resize_embeddings)
            parameters.warnings += odd
        except MergeError as error:
            found += error.problems
    if "loss" in method.needs:
        found += [
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
        if data is not None and data.batch_size != 1:
            parameters.warnings.append(
                f"data.batch_size is {data.batch_size or 'that of the loaders'}: {type(method).__name__} squares the "
                "gradients of single samples, and those of larger batches only stand in for them; set it to 1"
            )
    if found:
        for warning in parameters.warnings:
            rank_zero_warn(warning)
        raise MergeError(found)
    shared = set(parameters.shared)
    layers: dict[str, Candidate] = {}
    for expert in experts.values() if method.options else ():
        layers.update(candidates(expert, shared))
    trained = {n for expert in experts.values() for n, p in _parameters(expert) if p.requires_grad}
    frozen = {n for expert in experts.values() for n, _ in _parameters(expert)} - trained
    for expert in experts.values():
        expert.requires_grad_(False)
    if data is None or "data" not in method.needs:
        return MergePlan(experts, method, parameters, {}, frozen, stored=stored, base=origin)
    held = ", held out of validation" if data.holdout else "" if data.split == "train" else ", which are validated too"
    copies = f", with {data.augmented_copies} perturbed copies of each" if data.augmented_copies else ""
    told = f"Calibration: up to {data.num_samples:,} samples of each task's {data.split} data{held}{copies}.\n"
    return MergePlan(experts, method, parameters, layers, frozen, told, stored, origin)


def _parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return module.named_parameters(remove_duplicate=False)


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
