"""Which part of a module a state dict belongs to, whatever wrapped the module that it was saved from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from com_lightning.core.tensors.modules import tied_names
from com_lightning.errors import MergeError
from com_lightning.experts.files import state_problems

# Segments that torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What DDP, DataParallel, AveragedModel and Lightning's strategies put before all names.
_OUTERMOST = ("module.", "_forward_module.")


def plain(name: str) -> str:
    """The name of a parameter or module without what wrappers have put into it.

    Example::

        >>> plain("net._orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'net.layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under :func:`plain` names, and without a prefix that a wrapper has given to all of them.

    Example::

        >>> plain_state({"module.net._orig_mod.weight": 1, "module.net._orig_mod.bias": 2})
        {'net.weight': 1, 'net.bias': 2}
    """
    result = {plain(name): value for name, value in state.items()}
    if len(result) < len(state):  # one tensor under two names: whichever is right, it is not for us to say
        return dict(state)
    for prefix in _OUTERMOST:
        inner = [name for name in result if name.startswith(prefix)]  # in the order of the file
        if inner and result.keys() - set(inner) <= {"n_averaged"}:  # a counter of torch's AveragedModel
            result = {name.removeprefix(prefix): result[name] for name in inner}
    return result


def places(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of the submodules of ``module`` (``""``: itself) that have most of their names, then shapes, in common with
    a state dict. Several if they fit equally well, none if even the best has less than half of the names in common, or
    no shape.

    Args:
        module: where to look.
        state: name -> tensor, as :func:`plain_state` gives it.
    """
    common, same, total = Counter[str](), Counter[str](), Counter[str]()
    for name, tensor in module.state_dict().items():
        parts = plain(name).split(".")
        for cut in range(len(parts)):
            prefix, rest = ".".join(parts[:cut]), ".".join(parts[cut:])
            total[prefix] += 1
            if rest in state:
                common[prefix] += 1
                same[prefix] += shape_of(state[rest]) == shape_of(tensor)
    score = {p: (common[p] / (total[p] + len(state) - common[p]), same[p] / common[p]) for p in common if same[p]}
    best = max(score.values(), default=(0.0, 0.0))
    return [p for p, value in score.items() if value == best] if best[0] >= 0.5 else []


def submodule(module: nn.Module, place: str) -> tuple[str, nn.Module]:
    """The submodule at a :func:`plain` name, and its own name. Where a wrapper has the same plain name: the wrapper."""
    return next((name, part) for name, part in module.named_modules() if plain(name) == place)


def fill(module: nn.Module, state: Mapping[str, Any], label: str, assign: bool = True) -> str:
    """Load a state dict into the module, or into the one submodule that it fits.

    Args:
        module: what is filled, in the precision of the state dict.
        state: from the module or a part of it; names may have prefixes of wrappers.
        label: names its source in messages.
        assign: the tensors take the place of the module's, without a copy.

    Returns:
        The plain name of what was filled; ``""``: the whole module.

    Raises:
        MergeError: keys that are missing or too many, shapes that differ, or several submodules that fit.
    """
    if problems := state_problems(state):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    state = plain_state(state)
    found = places(module, state)
    if len(found) > 1:
        where = f"{some(found)} of {type(module).__name__}"
        raise MergeError([f"{label}: fits {where} equally well; give the state dict of the whole module"])
    place = found[0] if found else ""
    _, target = submodule(module, place)
    own = {plain(key): key for key in target.state_dict()}
    values, ties = target.state_dict(), {plain(n): plain(first) for n, first in tied_names(target).items()}
    for key in own.keys() - state.keys():  # a tied tensor may be saved under one of its names only
        twins = [name for name in state if name in ties and ties[name] == ties.get(key)]
        if twins:
            state[key] = state[twins[0]]
    if strange := sorted(key for key in state.keys() - own.keys() if is_peft(key)):
        raise MergeError(
            [
                f"{label}: the state dict of a PeftModel ({some(strange, most=1)}): save its adapter by "
                "save_pretrained and give the folder, or call merge_and_unload() before saving"
            ]
        )
    if missing := sorted(own.keys() - state.keys()):
        problems.append(f"{label}: missing keys: {some(missing)}")
    if extra := sorted(state.keys() - own.keys()):
        whom = type(target).__name__ + (f" ({place})" if place else "")
        problems.append(f"{label}: keys that {whom} does not have: {some(extra)}")
    shapes = {key: (shape_of(state[key]), shape_of(values[full])) for key, full in own.items() if key in state}
    if told := [f"{key} is {theirs}, in the model {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]:
        problems.append(
            f"{label}: {some(told, '; ')}; give a Lightning checkpoint, whose hyperparameters rebuild its own shapes, "
            "or the module itself"
        )
    there = [key for key in own if key in state]
    if whole := [f"{key} is {state[key].dtype}" for key in there if _is_whole(state[key], values[own[key]])]:
        kinds = some(whole, most=2).replace("torch.", "")
        problems.append(f"{label}: {kinds}, in the model floating point; give the weights before they were quantised")
    if problems:
        raise MergeError(problems)
    load(target, {full: state[key] for key, full in own.items()}, assign)
    return place


def _is_whole(value: object, own: object) -> bool:
    """Whether a value has whole numbers where the model has others."""
    if not (isinstance(value, Tensor) and isinstance(own, Tensor)):
        return False
    return own.is_floating_point() and not value.is_floating_point()


def is_peft(key: str) -> bool:
    """Whether a tensor of this name is from a PeftModel."""
    return key.startswith("base_model.model.") or bool({"base_layer", "lora_A", "lora_B"} & {*key.split(".")})


def load(module: nn.Module, state: Mapping[str, Any], assign: bool) -> None:
    """Load a state dict, in its own precision; its tensors, or copies of them, take the place of the module's, and tied
    ones stay tied."""
    ties = tied_names(module)
    if not assign:
        state = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    for name, first in ties.items():
        if name != first:
            (owner, _, own), (holder, _, other) = name.rpartition("."), first.rpartition(".")
            setattr(module.get_submodule(owner), own, getattr(module.get_submodule(holder), other))


def shape_of(value: object) -> tuple[int, ...] | str:
    """The shape of a tensor; what else a state dict holds is named by its type."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def some(keys: Sequence[str], separator: str = ", ", most: int = 5) -> str:
    """The first few of many, and how many more there are."""
    return separator.join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def told_once(warnings: Sequence[str], labels: Mapping[str, Any]) -> list[str]:
    """Warnings, where those that differ only in what they begin with become one.

    Args:
        warnings: each about one thing, which it names first, with or without where it is from.
        labels: what such things are called -> where they are from.

    Example::

        >>> told_once(["a (a.pt) has no head", "b has no head"], {"a": "a.pt", "b": None})
        ['a, b: has no head']
    """
    alike: dict[str, dict[str, str]] = {}
    for warning in warnings:
        label = next((label for label in labels if warning.startswith(label)), "")
        told = warning.removeprefix(label).removeprefix(f" ({labels.get(label)})").removeprefix(":").strip()
        alike.setdefault(told, {})[label] = warning
    return [next(iter(own.values())) if len(own) == 1 else f"{some([*own])}: {told}" for told, own in alike.items()]
