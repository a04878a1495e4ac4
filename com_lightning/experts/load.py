"""Experts: reading them safely, and telling shared parameters from private ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.optim.swa_utils import AveragedModel

from com_lightning.compat import load_module
from com_lightning.core.layers.candidates import candidates
from com_lightning.core.tensors.modules import matches_any, named_tensors, tied_names
from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts import adapters
from com_lightning.experts import transformers_models as pretrained
from com_lightning.experts.adapters import adapter_parameters, adapter_problems, fold, load_adapter, unloaded
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.similarity import foreign_values, unrelated_weights
from com_lightning.experts.state_dicts import fill, places, plain, plain_state, shape_of, some, submodule
from com_lightning.experts.transformers_models import load_pretrained, pretrained_parts
from com_lightning.experts.vocabulary import grow_to

__all__ = ["ExpertSource", "MergeError", "Parameters", "load_expert", "read_checkpoint", "sort_parameters"]

ExpertSource = str | Path | nn.Module | Mapping[str, Tensor]
"""A checkpoint, state dict or safetensors file; a folder of ``save_pretrained`` (transformers or PEFT), or the name of
one on the Hub (``hf://owner/name``, see :mod:`com_lightning.experts.hub`); a module or a state dict in memory."""

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


@dataclass
class Parameters:
    """What becomes of each parameter and buffer of the experts.

    Attributes:
        shared: names that are merged.
        private: task -> names that stay with it.
        folded: names that are left of adapters, which have been folded into the weights and compute nothing.
        warnings: what is odd but does not stand in the way.
    """

    shared: list[str] = field(default_factory=list)
    private: dict[str, list[str]] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


def load_expert(
    name: str, source: ExpertSource, model: LightningModule, label: str | None = None, as_stored: bool = False
) -> LightningModule:
    """The module of one expert, in eval mode on the CPU. Nothing is unpickled but tensors and plain values.

    Args:
        name: of the task, for messages.
        source: where it comes from. A Lightning checkpoint is rebuilt by the class of ``model`` from its own
            hyperparameters; a LightningModule is copied. All else becomes part of a copy of ``model``: a state dict is
            loaded into the part that it fits, another module and a folder of ``save_pretrained`` take its place, and a
            folder with an adapter is folded into it.
        model: gives the class, and the weights that an adapter was trained on.
        as_stored: leave the tensors in the precision of the source, see :func:`take_precision`.
        label: what messages call it, if not an expert.

    Raises:
        MergeError: if the source cannot be read, is not safe, or does not fit, naming the file and the keys.
    """
    label = label or f"expert '{name}'"
    if isinstance(source, nn.Module):
        source = _unwrapped(source)
    if isinstance(source, LightningModule):
        expert = copy.deepcopy(source)
    elif isinstance(source, nn.Module):
        expert = _replaced(model, unloaded(source, label), label)
    elif isinstance(source, Mapping):
        expert = _filled(model, source, label, assign=False)
    elif isinstance(source, (str, Path)):
        label = f"{label} ({source})"
        try:
            expert = _from_path(Path(source), model, label)
        except MergeError:
            raise
        except Exception as error:  # whatever else somebody has put into a file
            raise MergeError([f"{label}: cannot be loaded ({reason(error)})"]) from error
    else:
        raise MergeError([f"{label}: a {type(source).__name__} is neither a file, a folder, a module nor a state dict"])
    _eager(expert)
    fold(expert, label)
    _align(expert, model)
    if not as_stored:
        take_precision(expert, model)
    return expert.eval()


def take_precision(expert: nn.Module, model: nn.Module) -> dict[str, torch.dtype]:
    """Give an expert the precision of ``model``, in place; of what that lacks, its parameters' in general.

    Returns:
        Name of each parameter and buffer that is changed -> the precision that it was stored in.
    """
    dtypes = {name: tensor.dtype for name, tensor, _ in named_tensors(model)}
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    floating = [(name, tensor) for name, tensor, _ in named_tensors(expert) if tensor.is_floating_point()]
    stored = {name: tensor.dtype for name, tensor in floating}
    for name, tensor in floating:
        tensor.data = tensor.data.to(dtypes.get(name, usual))
    return {name: stored[name] for name, tensor in floating if tensor.dtype != stored[name]}


def sort_parameters(
    model: LightningModule, experts: Mapping[str, LightningModule], private: Sequence[str] | None
) -> Parameters:
    """Tell shared parameters (and buffers) from private ones.

    Args:
        model: the base, or any module of the base's architecture.
        experts: task -> its module.
        private: patterns of names that stay with their task, see :func:`~com_lightning.core.tensors.modules.matches_any`.
            ``None``: whatever does not have one name and shape in the model and in all experts.

    Raises:
        MergeError: a name or shape differs and no pattern covers it; a pattern that matches nothing; nothing is shared.
    """
    whose = {"the model": model, **{f"expert '{task}'": expert for task, expert in experts.items()}}
    if problems := adapter_problems(whose):  # all else that differs follows from it
        raise MergeError(problems)
    folded = set().union(*map(adapter_parameters, experts.values()))
    result = Parameters(private={task: [] for task in experts}, folded=folded)
    differing: list[str] = []
    everyone = {"model": dict(_shapes(model)), **{task: dict(_shapes(e)) for task, e in experts.items()}}
    names = {name: None for shapes in everyone.values() for name in shapes}
    every = {name: {who: shape.get(name) for who, shape in everyone.items()} for name in names}
    for name, shapes in every.items():
        same = len(set(shapes.values())) == 1
        if name not in folded and (same if private is None else not matches_any(name, private)):
            result.shared.append(name)
            if not same:
                differing.append(f"{name}: {_told(shapes)}")
        elif name not in folded:
            for task in experts:
                if shapes[task] is not None:
                    result.private[task].append(name)
    if differing:
        problems.append(
            f"parameters differ: {some(differing, '. ')}. Name them in `private`, or bring experts of one architecture"
        )
    for pattern in private or ():
        if not any(matches_any(name, [pattern]) for name in names):
            problems.append(f"private: '{pattern}' matches no parameter; there are {some(list(names))}")
    if not problems and not any(candidates(expert, set(result.shared)) for expert in experts.values()):
        told = [f"{n}: {_told(s)}" for n, s in every.items() if len(set(s.values())) > 1]
        problems.append(
            "no layer can be merged: none has all its parameters shared, with one name and shape in the model and all "
            f"experts. {some(told, '. ', 3)}"
        )
    shared = set(result.shared)
    for task, expert in experts.items():
        for name, first in tied_names(expert).items():
            if (name in shared) != (first in shared):
                problems.append(f"{name} and {first} are one tensor in '{task}': name both in `private`, or neither")
    ties = {task: {n: t for n, t in tied_names(e).items() if n in shared} for task, e in experts.items()}
    reference_task, reference = next(iter(ties.items()))
    for task, tie in ties.items():
        if torn := [n for n in reference if n in tie and tie[n] != reference[n]]:
            problems.append(f"{torn[0]} is tied to another parameter in '{reference_task}' or '{task}', not in both")
    if problems:
        raise MergeError(problems)
    if private is None and len(experts) > 1 and not any(result.private.values()):
        result.warnings.append(
            "every parameter is shared, heads included; if classes differ between tasks, name the head in `private` "
            "(an empty list says that they do not)"
        )
    expected = folded | {name for name in names if matches_any(name, private or ())}
    result.warnings += foreign_values(whose, expected) + unrelated_weights(experts, set(result.shared))
    return result


def _from_path(path: Path, model: LightningModule, label: str) -> LightningModule:
    if (path / adapters.CONFIG).is_file():
        expert = _copy(model)
        load_adapter(path, expert, label)
        _say_what_differs(expert, model, label)
        return expert
    if (path / pretrained.CONFIG).is_file():
        return _replaced(model, load_pretrained(path, label), label)
    if path.name.startswith("adapter_model.") and (path.parent / adapters.CONFIG).is_file():
        raise MergeError([f"{label}: this is the file of a PEFT adapter; give its folder, {path.parent}"])
    content = read_checkpoint(path, label)
    state = content["state_dict"]
    if "pytorch-lightning_version" not in content:
        return _filled(model, state, label)
    kind = type(model)
    # What a hook of the class makes of the weights is not known, so that the class has to read them.
    hooked = is_overridden("on_load_checkpoint", model)
    if not hooked and (rebuilt := _rebuilt(content, state, kind, label)) is not None:
        return rebuilt
    try:
        return load_module(kind, content, path)
    except Exception as error:
        raise MergeError(
            [
                f"{label}: {kind.__name__} cannot be rebuilt from its hyperparameters ({reason(error)}). Call "
                "save_hyperparameters() in its __init__ and save it again, or give the module itself or its state dict"
            ]
        ) from error


def _rebuilt(
    content: Mapping[str, Any], state: Mapping[str, Any], kind: type[LightningModule], label: str
) -> LightningModule | None:
    """A module built from the hyperparameters of a Lightning checkpoint, with the tensors of the mapped file. Names may
    differ by what wrapped the module, and vocabularies may have grown. ``None`` if there is more to it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no weights are in it
            expert = load_module(kind, {**content, "state_dict": {}}, strict=False)
        state = plain_state(state)
        grow_to(expert, state)
        return None if fill(expert, state, label) else expert
    except Exception:
        return None


def _filled(model: LightningModule, state: Mapping[str, Tensor], label: str, assign: bool = True) -> LightningModule:
    expert = _copy(model)
    _say_what_is_left(expert, fill(expert, state, label, assign), label)
    return expert


def _replaced(model: LightningModule, part: nn.Module, label: str) -> LightningModule:
    """A copy of ``model`` with a module in the place of the submodule that it has most in common with."""
    state = plain_state(part.state_dict())
    found = places(model, state)
    kind, whole = type(part).__name__, type(model).__name__
    if len(found) != 1:
        why = f"fits {some(found)} of {whole} equally well"
        if not found:
            own = "".join(f"; its {place} is a {type(p).__name__}" for place, p in pretrained_parts(model).items())
            why = f"has little in common with any part of {whole}{own}"
        raise MergeError([f"{label}: the {kind} {why}. Give a LightningModule"])
    if not found[0]:
        return _filled(model, state, label, assign=False)
    name, old = submodule(model, found[0])
    inside = {id(part) for part in (*old.modules(), *old.parameters())}
    everywhere = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    if torn := [n for n, p in everywhere if id(p) in inside and n != name and not n.startswith(f"{name}.")]:
        raise MergeError([f"{label}: {whole} uses {found[0]} also as {torn[0]}. Give a LightningModule"])
    first = next(model.parameters())
    part = part.to(first.device)
    # The copy never holds the weights that are replaced.
    expert = _copy(model, {id(old): _compiled(part, old) if isinstance(old, OptimizedModule) else part})
    _say_what_is_left(expert, found[0], label)
    _say_what_differs(expert, model, label)
    return expert


def _say_what_is_left(model: LightningModule, place: str, label: str) -> None:
    left = [name for name, _ in model.named_parameters() if place and not plain(name).startswith(f"{place}.")]
    if left:
        warnings.warn(
            f"{label} is taken for {place}; {some(left)} stay as they are in your model", MergeWarning, stacklevel=2
        )


def _say_what_differs(expert: LightningModule, model: LightningModule, label: str) -> None:
    """The class of a model rebuilds from its hyperparameters what is in the model, not what took its place."""
    ours, theirs = ({plain(n): shape_of(t) for n, t, _ in named_tensors(m)} for m in (model, expert))
    if differing := [name for name in theirs if ours.get(name) != theirs[name]]:
        told = [f"{name} ({theirs[name]}, in your model {ours.get(name, 'missing')})" for name in differing]
        warnings.warn(
            f"{label}: {some(told, most=2)} differ from your model's, while metrics and hyperparameters are still "
            "those of your model: where they depend on it (a number of classes), give a LightningModule in memory "
            f"that was built to match. {type(model).__name__}.load_from_checkpoint cannot load the result's checkpoint "
            "of this task; load its state_dict into a module built alike"
            + (", or its folder in `transformers` with from_pretrained" if pretrained_parts(expert) else ""),
            MergeWarning,
            stacklevel=2,
        )


def _unwrapped(module: nn.Module) -> nn.Module:
    if isinstance(module, OptimizedModule):
        return _unwrapped(module._orig_mod)
    return _unwrapped(module.module) if isinstance(module, (*_WRAPPERS,)) else module


def _compiled(module: nn.Module, like: OptimizedModule) -> nn.Module:
    """Compiled with the options (backend, mode, ...) of another compiled module."""
    compiled: Any = like.dynamo_ctx(module)
    assert isinstance(compiled, nn.Module)
    return compiled


def _copy(model: LightningModule, instead: dict[int, nn.Module] | None = None) -> LightningModule:
    """A copy; ``instead`` has what takes the place of a submodule, by its ``id``."""
    model = copy.deepcopy(model, instead)
    _eager(model)
    return model


def _eager(module: LightningModule) -> None:
    """Undo what ``trainer.validate(torch.compile(module))`` does: its methods run those of the module it was."""
    if module._compiler_ctx is not None:
        module._compiler_ctx = None
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(module).pop(name, None)


def _align(expert: LightningModule, model: LightningModule) -> None:
    """Compile the same submodules as in ``model``, so that names fit."""
    compiled = {plain(name): part for name, part in model.named_modules() if isinstance(part, OptimizedModule)}
    for name, part in reversed(list(expert.named_modules())):  # what is inside before what is around it
        if isinstance(part, OptimizedModule) and plain(name) not in compiled:
            expert.set_submodule(name, part._orig_mod)
    for place in sorted(compiled, key=len, reverse=True):
        found = next(((n, p) for n, p in expert.named_modules() if plain(n) == place), None)
        if found and not isinstance(found[1], OptimizedModule):
            expert.set_submodule(found[0], _compiled(found[1], compiled[place]))


def _shapes(module: LightningModule) -> Sequence[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor, _ in named_tensors(module)]


def _told(shapes: Mapping[str, torch.Size | None]) -> str:
    return "; ".join(f"{who} {'lacks it' if shape is None else tuple(shape)}" for who, shape in shapes.items())
