"""Which parameters of the experts are shared, and which are private to a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from lightning.pytorch import LightningModule

from com_lightning.core.layers.candidates import candidates
from com_lightning.core.tensors.modules import matches_any, named_tensors, tied_names
from com_lightning.errors import MergeError
from com_lightning.experts.adapters import adapter_parameters, adapter_problems
from com_lightning.experts.settings import computed_buffers, described, differences_of_experts
from com_lightning.experts.similarity import foreign_values, unrelated_weights
from com_lightning.experts.state_dicts import some

Shapes = Mapping[str, torch.Size | None]
"""``"model"`` or task -> the shape that one parameter has there; ``None`` where it does not exist."""


@dataclass
class Parameters:
    """What becomes of each parameter and buffer of the experts.

    Attributes:
        shared: names of those that are merged.
        private: task -> names of those that stay with it.
        merged_adapters: names of adapter parameters. The adapters are merged into the weights, and what is left of them
            computes nothing.
        warnings: what is odd, but does not prevent the merge.
    """

    shared: list[str] = field(default_factory=list)
    private: dict[str, list[str]] = field(default_factory=dict)
    merged_adapters: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def sort_parameters(
    model: LightningModule, experts: Mapping[str, LightningModule], private: Sequence[str] | None
) -> Parameters:
    """Sort the parameters and buffers of the experts into shared and private ones.

    Args:
        model: the base, or any module of the base's architecture.
        experts: task -> its module.
        private: patterns of names that stay with their task, see
            :func:`~com_lightning.core.tensors.modules.matches_any`. ``None``: all names that are missing somewhere, or
            have different shapes in the model and the experts.

    Returns:
        The names of both sorts, with warnings.

    Raises:
        MergeError: if a name or shape differs and no pattern covers it, a pattern matches nothing, tied parameters are
            sorted differently, or no layer is shared.
    """
    modules = {"the model": model, **{f"expert '{task}'": expert for task, expert in experts.items()}}
    if problems := adapter_problems(modules):  # all other differences follow from these
        raise MergeError(problems)
    adapters = set().union(*map(adapter_parameters, experts.values()))
    shapes = _shapes({"model": model, **experts})
    result = Parameters(private={task: [] for task in experts}, merged_adapters=adapters)
    computed = _own_buffers(experts, shapes)
    for name in [name for name in shapes if name not in adapters]:
        is_shared = not _differs(shapes[name]) if private is None else not matches_any(name, private)
        if is_shared and name not in computed:
            result.shared.append(name)
        else:
            for task in experts:
                if shapes[name][task] is not None:
                    result.private[task].append(name)
    if differing := [f"{name}: {_shapes_as_text(shapes[name])}" for name in result.shared if _differs(shapes[name])]:
        problems.append(
            f"parameters differ: {some(differing, '. ')}. Name them in `private`, or bring experts of one architecture"
        )
    for pattern in private or ():
        if not any(matches_any(name, [pattern]) for name in shapes):
            problems.append(f"private: '{pattern}' matches no parameter; there are {some(list(shapes))}")
    shared = set(result.shared)
    if not problems and not any(candidates(expert, shared) for expert in experts.values()):
        differing = [f"{name}: {_shapes_as_text(entry)}" for name, entry in shapes.items() if _differs(entry)]
        problems.append(
            "no layer can be merged: none has all its parameters shared, with one name and shape in the model and all "
            f"experts. {some(differing, '. ', 3)}"
        )
    problems += _tie_problems(experts, shared) or _untied(model, experts)
    if problems:
        raise MergeError(problems)
    if private is None and len(experts) > 1 and not any(set(names) - computed for names in result.private.values()):
        result.warnings.append(
            "every parameter is shared, heads included; if classes differ between tasks, name the head in `private` "
            "(an empty list says that they do not)"
        )
    expected = adapters | {name for name in shapes if matches_any(name, private or ())}
    result.warnings += foreign_values(modules, expected) + unrelated_weights(experts, shared)
    if differences := differences_of_experts(experts, result.private):
        result.warnings.append(
            f"the experts differ in what shapes the outputs of shared layers: {described(differences)}. Each task "
            "keeps its own, and its results are written separately"
        )
    return result


def _own_buffers(experts: Mapping[str, LightningModule], shapes: Mapping[str, Shapes]) -> set[str]:
    """Names of buffers that are computed, not saved, and not the same everywhere. Their average means nothing."""
    buffers = [computed_buffers(expert) for expert in experts.values()]
    names = set().union(*buffers)
    own = {name for name in names if _differs(shapes[name]) or any(name not in entry for entry in buffers)}
    return own | {n for n in names - own if any(not torch.equal(entry[n], buffers[0][n]) for entry in buffers[1:])}


def _tie_problems(experts: Mapping[str, LightningModule], shared: set[str]) -> list[str]:
    """Tied parameters of which only some are shared, or that are tied in some experts only."""
    problems = []
    ties = {task: tied_names(expert) for task, expert in experts.items()}
    for task, tied in ties.items():
        for name, first in tied.items():
            if (name in shared) != (first in shared):
                problems.append(f"{name} and {first} are one tensor in '{task}': name both in `private`, or neither")
    reference_task, reference = next(iter(ties.items()))
    for task, tied in ties.items():
        names = [name for name in reference if name in shared and name in tied and tied[name] != reference[name]]
        if names:
            problems.append(f"{names[0]} is tied to another parameter in '{reference_task}' or '{task}', not in both")
    return problems


def _untied(model: LightningModule, experts: Mapping[str, LightningModule]) -> list[str]:
    """Parameters that are one tensor in the model and several in experts, whose checkpoint would be loaded wrongly."""
    # The reverse does no harm: the model then has the same values twice.
    apart: dict[tuple[str, str], list[str]] = {}
    for task, expert in experts.items():
        tied = tied_names(expert)
        for name, first in tied_names(model).items():
            if name in tied and first in tied and tied[name] != tied[first]:
                apart.setdefault((name, first), []).append(f"'{task}'")
    return [
        f"{name} and {first} are one tensor in your model, and two in {some(tasks)}: your class could not load what is "
        "merged. Untie them where your class makes the network, by a copy of its weight and, with transformers, "
        "config.tie_word_embeddings = False, or give experts that tie them"
        for (name, first), tasks in apart.items()
    ]


def _shapes(modules: Mapping[str, LightningModule]) -> dict[str, Shapes]:
    """Name of each parameter and buffer -> its shape in each module."""
    shapes = {key: {name: tensor.shape for name, tensor, _ in named_tensors(m)} for key, m in modules.items()}
    names = dict.fromkeys(name for entry in shapes.values() for name in entry)
    return {name: {key: entry.get(name) for key, entry in shapes.items()} for name in names}


def _differs(shapes: Shapes) -> bool:
    return len(set(shapes.values())) > 1


def _shapes_as_text(shapes: Shapes) -> str:
    return "; ".join(f"{key} {'lacks it' if shape is None else tuple(shape)}" for key, shape in shapes.items())
