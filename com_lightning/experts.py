"""Experts: reading them safely, and telling shared parameters from private ones."""

from __future__ import annotations

import copy
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Union

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from com_lightning.core.candidates import candidates
from com_lightning.core.sharing import matches_any, named_tensors, tied_names

ExpertSource = Union[str, Path, LightningModule, Mapping[str, Tensor]]
"""A Lightning checkpoint, a state dict or safetensors file, a module or a state dict in memory."""


class MergeError(ValueError):
    """What stands in the way of a merge, all of it at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count}:\n" + "\n".join(f"  {n}. {p}" for n, p in enumerate(problems, 1)))


@dataclass
class Parameters:
    """What becomes of each parameter and buffer of the experts.

    Attributes:
        shared: names that are merged.
        private: task -> names that stay with it.
        warnings: what is odd but does not stand in the way.
    """

    shared: list[str] = field(default_factory=list)
    private: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def load_expert(name: str, source: ExpertSource, model: LightningModule) -> LightningModule:
    """The module of one expert, in eval mode on the CPU. Nothing is unpickled but tensors and plain values.

    Args:
        name: of the task, for messages.
        source: where it comes from. A Lightning checkpoint is rebuilt by the class of ``model`` from its own
            hyperparameters; a state dict is loaded into a copy of ``model``; a module is copied.
        model: gives the class.

    Raises:
        MergeError: if the source cannot be read, is not safe, or does not fit, naming the file and the keys.
    """
    if isinstance(source, LightningModule):
        expert = copy.deepcopy(source)
    elif isinstance(source, Mapping):
        expert = _filled(copy.deepcopy(model), source, f"expert '{name}'", assign=False)
    elif isinstance(source, (str, Path)):
        expert = _from_file(name, Path(source), model)
    else:
        raise MergeError(
            [f"expert '{name}': a {type(source).__name__} is neither a file, a LightningModule nor a state dict"]
        )
    return expert.eval()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's content, memory-mapped where its format allows; a safetensors file as ``{"state_dict": ...}``.

    Raises:
        MergeError: if the file is missing, is not a checkpoint, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise MergeError([f"{path}: no such file"])
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return {"state_dict": load_file(path)}
        except Exception as error:
            raise MergeError([f"{path}: not a readable safetensors file ({error})"]) from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise MergeError([_unsafe(path, error)]) from error
        # PyTorch's advice is to load the file unsafely.
        reason = "safe loading finds no tensors in it" if "weights_only" in str(error) else _first_line(error)
        raise MergeError([f"{path}: not a readable checkpoint ({reason})"]) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise MergeError([f"{path}: holds a {type(state).__name__}, not a checkpoint or state dict"])
    return content if "state_dict" in content else {"state_dict": content}


def sort_parameters(
    model: LightningModule, experts: Mapping[str, LightningModule], private: Sequence[str] | None
) -> Parameters:
    """Tell shared parameters (and buffers) from private ones.

    Args:
        model: the base, or any module of the base's architecture.
        experts: task -> its module.
        private: patterns of names that stay with their task, see :func:`~com_lightning.core.sharing.matches_any`.
            ``None``: whatever does not have one name and shape in the model and in all experts.

    Raises:
        MergeError: a name or shape differs and no pattern covers it; a pattern that matches nothing; nothing is shared.
    """
    result, problems = Parameters(private={task: [] for task in experts}), list[str]()
    differing: list[str] = []
    everyone = {"model": dict(_shapes(model)), **{task: dict(_shapes(e)) for task, e in experts.items()}}
    names = {name: None for shapes in everyone.values() for name in shapes}
    every = {name: {who: shape.get(name) for who, shape in everyone.items()} for name in names}
    for name, shapes in every.items():
        same = len(set(shapes.values())) == 1
        if same if private is None else not matches_any(name, private):
            result.shared.append(name)
            if not same:
                differing.append(f"{name}: {_told(shapes)}")
        else:
            for task in experts:
                if shapes[task] is not None:
                    result.private[task].append(name)
    if differing:
        problems.append(
            f"parameters differ: {_some(differing, '. ')}. Name them in `private`, or bring experts of one architecture"
        )
    for pattern in private or ():
        if not any(matches_any(name, [pattern]) for name in names):
            problems.append(f"private: '{pattern}' matches no parameter; there are {_some(list(names))}")
    if not problems and not any(candidates(expert, set(result.shared)) for expert in experts.values()):
        told = [f"{n}: {_told(s)}" for n, s in every.items() if len(set(s.values())) > 1]
        problems.append(
            "no layer can be merged: none has all its parameters shared, with one name and shape in the model and all "
            f"experts. {_some(told, '. ', 3)}"
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
    result.warnings += _kinship(model, experts, result.shared)
    return result


def _kinship(model: LightningModule, experts: Mapping[str, LightningModule], shared: Sequence[str]) -> list[str]:
    """Warn of experts that seem not to descend from one base: fine-tuning hardly turns a weight matrix, and two
    trainings from scratch end at right angles. Judged by the cosine between each expert and the mean of the others."""
    matrices = [n for n, t, is_parameter in named_tensors(model) if n in set(shared) and is_parameter and t.dim() > 1]
    states = {task: {n: t for n, t, _ in named_tensors(expert)} for task, expert in experts.items()}
    products = {task: torch.zeros(3, dtype=torch.float64) for task in experts}
    for name in matrices:
        values = {task: state[name].detach().flatten().float() for task, state in states.items()}
        total = torch.stack(list(values.values())).sum(0)
        for task, own in values.items():
            others = total - own
            products[task] += torch.stack([own @ others, own @ own, others @ others]).double()
    warnings = []
    for task, (across, own, others) in products.items():
        cosine = float(across / (own * others).sqrt().clamp_min(1e-30))
        if len(experts) > 1 and matrices and cosine < 0.2:
            warnings.append(
                f"expert '{task}' seems not to be fine-tuned from the same base as the others: the cosine between its "
                f"weight matrices and the mean of the others' is {cosine:.2f}; fine-tuned siblings are mostly above 0.9"
            )
    return warnings


def _from_file(name: str, path: Path, model: LightningModule) -> LightningModule:
    content = read_checkpoint(path)
    label = f"expert '{name}' ({path})"
    if "pytorch-lightning_version" not in content:
        return _filled(copy.deepcopy(model), content["state_dict"], label)
    try:
        expert = type(model).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except Exception as error:
        kind, reason = type(model).__name__, " ".join(str(error).split())
        raise MergeError(
            [f"{label}: {kind} cannot be rebuilt from its hyperparameters ({type(error).__name__}: {reason})"]
        ) from error
    # The tensors of the mapped file take the place of the copies just read, unless a hook has made others of them.
    hooked = is_overridden("on_load_checkpoint", expert)
    if not hooked and content["state_dict"].keys() == expert.state_dict().keys():
        _load(expert, content["state_dict"], assign=True)
    return expert


def _filled(module: LightningModule, state: Mapping[str, Tensor], label: str, assign: bool = True) -> LightningModule:
    own, ties = module.state_dict(), tied_names(module)
    state = dict(state)
    for key in own.keys() - state.keys():  # a tied tensor may be saved under one of its names only
        twins = [name for name in state if name in ties and ties[name] == ties.get(key)]
        if twins:
            state[key] = state[twins[0]]
    problems = []
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"{label}: missing keys: {_some(missing)}")
    if extra := sorted(state.keys() - own.keys()):
        problems.append(f"{label}: keys that {type(module).__name__} does not have: {_some(extra)}")
    shapes = {key: (_shape(state[key]), _shape(tensor)) for key, tensor in own.items() if key in state}
    if told := [f"{key} is {theirs}, in the model {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]:
        problems.append(
            f"{label}: {_some(told, '; ')}; give a Lightning checkpoint, whose hyperparameters rebuild its own shapes, "
            "or the module itself"
        )
    if problems:
        raise MergeError(problems)
    _load(module, state, assign)
    return module


def _load(module: LightningModule, state: Mapping[str, Tensor], assign: bool) -> None:
    """Load a state dict; where its tensors take the place of the module's, tied ones stay tied."""
    ties = tied_names(module)
    if assign:  # in the module's precision, not the file's
        dtypes = {key: value.dtype for key, value in module.state_dict().items() if isinstance(value, Tensor)}
        state = {key: value.to(dtypes[key]) if key in dtypes else value for key, value in state.items()}
    module.load_state_dict(state, assign=assign)
    for name, first in ties.items():
        if name != first:
            (owner, _, own), (holder, _, other) = name.rpartition("."), first.rpartition(".")
            setattr(module.get_submodule(owner), own, getattr(module.get_submodule(holder), other))


def _shape(value: object) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def _shapes(module: LightningModule) -> Sequence[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor, _ in named_tensors(module)]


def _some(keys: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    return separator.join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def _told(shapes: Mapping[str, torch.Size | None]) -> str:
    return "; ".join(f"{who} {'lacks it' if shape is None else tuple(shape)}" for who, shape in shapes.items())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unsafe(path: Path, error: Exception) -> str:
    try:
        culprits = [f"{key} ({kind})" for key, kind in _unsafe_keys(path).items()]
    except Exception:  # not a file of today's format
        culprits = []
    told = culprits or re.findall(r"GLOBAL (\S+)", str(error))[:1]
    return (
        f"{path}: holds objects that safe loading refuses: {', '.join(told)}; save hyperparameters as plain values, "
        "or, if you trust the file, allow the class with torch.serialization.add_safe_globals or load the module "
        "yourself and pass it in place of the path"
    )


def _unsafe_keys(path: Path) -> dict[str, str]:
    """Where a checkpoint holds objects of classes that safe loading refuses. No class in it is looked up or called."""
    refused = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))

    class Inert:
        kind = ""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return super().__new__(cls)

        def __setstate__(self, state: Any) -> None:
            pass

        def __setitem__(self, key: Any, value: Any) -> None:
            pass

        def append(self, value: Any) -> None:
            pass

        def extend(self, values: Any) -> None:
            pass

    class Plain(dict[Any, Any]):  # unlike a dict it takes attributes, such as a state dict's metadata
        pass

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            full = f"{module}.{name}"
            if full == "collections.OrderedDict":
                return Plain
            return type("Inert", (Inert,), {"kind": full if full in refused else ""})

        def persistent_load(self, pid: Any) -> Any:
            return None

    with zipfile.ZipFile(path) as archive:
        entry = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
        with archive.open(entry) as stream:
            content = Reader(stream).load()
    found: dict[str, str] = {}

    def walk(value: Any, key: str) -> None:
        if kind := getattr(value, "kind", ""):
            found[key] = kind
        elif isinstance(value, dict):
            for name, part in value.items():
                walk(part, f"{key}.{name}" if key else str(name))
        elif isinstance(value, (list, tuple)):
            for position, part in enumerate(value):
                walk(part, f"{key}[{position}]")

    walk(content, "")
    return found
