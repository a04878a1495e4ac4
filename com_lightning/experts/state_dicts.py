"""Load a state dict into the part of a module that it belongs to, whatever wrapped the module that it is from."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.modules import named_tensors, tied_names
from com_lightning.errors import MergeError, MergeWarning
from com_lightning.errors import some as some
from com_lightning.experts.files import state_problems

# Segments that torch.compile, FSDP and activation checkpointing put into names, wherever they wrap a module.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# What DDP, DataParallel, AveragedModel and Lightning's strategies put before all names.
_OUTERMOST = ("module.", "_forward_module.")


_DECLARED = "_keys_to_ignore_on_load_unexpected"
"""Where a class of transformers declares which keys of a file it ignores, as regular expressions."""
_MOVED = (r"(^|\.)position_ids$", r"(^|\.)rotary_emb\.inv_freq$")
"""Buffers that transformers ignores wherever they are in a file, if the model has such a buffer anywhere."""
_TODAY = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")
_NAMES = {"gamma": "weight", "beta": "bias"}


class ExtraKeys(MergeError):
    """A state dict has all that a module needs, and more."""


def plain(name: str) -> str:
    """Returns the name of a parameter or module without what wrappers have put into it.

    Example::

        >>> plain("net._orig_mod.layers.0._checkpoint_wrapped_module.weight")
        'net.layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def plain_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a state dict under :func:`plain` names, without a prefix that a wrapper has given to all of them.

    Example::

        >>> plain_state({"module.net._orig_mod.weight": 1, "module.net._orig_mod.bias": 2})
        {'net.weight': 1, 'net.bias': 2}
    """
    result = {plain(name): value for name, value in state.items()}
    if len(result) < len(state):  # two tensors would get one name, and it is not known which is right
        return dict(state)
    for prefix in _OUTERMOST:
        inner = [name for name in result if name.startswith(prefix)]  # in the order of the file
        if inner and result.keys() - set(inner) <= {"n_averaged"}:  # a counter of torch's AveragedModel
            result = {name.removeprefix(prefix): result[name] for name in inner}
    return result


def places(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """The submodules of a module that fit a state dict best.

    Those fit best that have most names in common with it, then most shapes.

    Args:
        module: where to look.
        state: name -> tensor, as :func:`plain_state` gives it.

    Returns:
        Plain names of the submodules (``""``: the module itself). There are several if they fit equally well, and none
        if the best has less than half of the names in common, or no shape.
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
    """The submodule with a :func:`plain` name, and its real name. A wrapper comes before the module in it."""
    return next((name, part) for name, part in module.named_modules() if plain(name) == place)


def fill(module: nn.Module, state: Mapping[str, Any], label: str, assign: bool = True) -> str:
    """Load a state dict into the module, or into the one submodule that it fits.

    Args:
        module: changed in place; it gets the precision of the state dict.
        state: of the module or a part of it; names may have prefixes of wrappers.
        label: names the source in messages.
        assign: the tensors take the place of the module's tensors, without a copy.

    Returns:
        The plain name of the part that was filled; ``""``: the whole module.

    Raises:
        MergeError: if keys are missing or too many, shapes differ, or several submodules fit.
    """
    if problems := state_problems(state):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    state = plain_state(state)
    fitting = places(module, state)
    if len(fitting) > 1:
        where = f"{some(fitting)} of {type(module).__name__}"
        raise MergeError([f"{label}: fits {where} equally well; give the state dict of the whole module"])
    place = fitting[0] if fitting else ""
    _, target = submodule(module, place)
    values = target.state_dict()
    names = {plain(name): name for name in values}
    state = _renamed(state, names)
    ties = {plain(name): plain(first) for name, first in tied_names(target).items()}
    for key in names.keys() - state.keys():  # a tied tensor may be saved under one of its names only
        twins = [name for name in state if name in ties and ties[name] == ties.get(key)]
        if twins:
            state[key] = state[twins[0]]
    if adapters := sorted(key for key in state.keys() - names.keys() if is_peft(key)):
        raise MergeError(
            [
                f"{label}: the state dict of a PeftModel ({some(adapters, most=1)}): save its adapter by "
                "save_pretrained and give the folder, or call merge_and_unload() before saving"
            ]
        )
    if missing := sorted(names.keys() - state.keys()):
        problems.append(f"{label}: missing keys: {some(missing)}")
    unused = _unused(target, {key: value for key, value in state.items() if key not in names})
    target_name = type(target).__name__ + (f" ({place})" if place else "")
    if extra := sorted(state.keys() - names.keys() - unused):
        problems.append(
            f"{label}: keys that {target_name} does not have: {some(extra)}; if it does not need them, give its state "
            "dict without them, or drop them in its on_load_checkpoint"
        )
    pairs = {key: (state[key], values[name]) for key, name in names.items() if key in state}
    shapes = {key: (shape_of(theirs), shape_of(ours)) for key, (theirs, ours) in pairs.items()}
    if wrong := [f"{key} is {theirs}, in the model {ours}" for key, (theirs, ours) in shapes.items() if theirs != ours]:
        problems.append(
            f"{label}: {some(wrong, '; ')}; give a Lightning checkpoint, whose hyperparameters rebuild its own shapes, "
            "or the module itself"
        )
    if integers := [f"{key} is {theirs.dtype}" for key, (theirs, ours) in pairs.items() if _is_quantised(theirs, ours)]:
        dtypes = some(integers, most=2).replace("torch.", "")
        problems.append(f"{label}: {dtypes}, in the model floating point; give the weights before they were quantised")
    if problems:
        raise ExtraKeys(problems) if extra and len(problems) == 1 else MergeError(problems)
    if unused:
        warnings.warn(
            f"{label}: {some(sorted(unused))} are left out: older versions saved them, and {target_name} computes them "
            "itself or ignores them",
            MergeWarning,
            stacklevel=2,
        )
    for key, first in ties.items():
        if key != first and key in state and first in state and not torch.equal(state[key], state[first]):
            warnings.warn(
                f"{label}: {first} and {key} differ in it, and are one tensor in your model, which takes {key}",
                MergeWarning,
                stacklevel=2,
            )
    load(target, {name: state[key] for key, name in names.items()}, assign)
    return place


def _renamed(state: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """A state dict in which normalisations have today's names, if the module has them, in place of TensorFlow's."""
    new = {key: _TODAY.sub(lambda match: _NAMES[match[1]], key) for key in state}
    return {new[key] if new[key] in names and new[key] not in state else key: value for key, value in state.items()}


def _unused(module: nn.Module, extra: Mapping[str, Any]) -> set[str]:
    """Returns which keys of a file a module does not need, of those that it does not have. Older versions saved them.

    These are buffers that it computes and does not save, of the value in the file; and what a transformers model in it
    ignores, as from_pretrained does.
    """
    buffers = {plain(name): buffer for name, buffer in module.named_buffers()}
    unused = {key for key, value in extra.items() if key in buffers and _is_equal(value, buffers[key])}
    for name, part in module.named_modules():
        if not hasattr(part, _DECLARED):
            continue
        prefix = f"{plain(name)}." if name else ""
        moved = [pattern for pattern in _MOVED if any(re.search(pattern, buffer) for buffer in buffers)]
        patterns = [*(getattr(part, _DECLARED) or ()), *moved]
        for key in extra:
            ignored = any(re.search(pattern, key.removeprefix(prefix)) for pattern in patterns)
            if key.startswith(prefix) and (ignored or key in buffers):
                unused.add(key)
    return unused


def _is_equal(value: object, buffer: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != buffer.shape:
        return False
    return buffer.is_meta or torch.equal(value.to(buffer), buffer)


def _is_quantised(theirs: object, ours: object) -> bool:
    """Whether a value has integers where the model has floating-point numbers."""
    if not (isinstance(theirs, Tensor) and isinstance(ours, Tensor)):
        return False
    return ours.is_floating_point() and not theirs.is_floating_point()


def is_peft(key: str) -> bool:
    """Whether a tensor of this name belongs to a PeftModel."""
    return key.startswith("base_model.model.") or bool({"base_layer", "lora_A", "lora_B"} & {*key.split(".")})


def load(module: nn.Module, state: Mapping[str, Any], assign: bool) -> None:
    """Load a state dict in its own precision. Tied tensors stay tied.

    Args:
        module: changed in place.
        state: all that the module has.
        assign: the tensors take the place of the module's tensors; otherwise copies of them do.
    """
    before = {name: tensor for name, tensor, _ in named_tensors(module)}
    if not assign:
        state = {key: value.detach().clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    # Whatever else refers to a tensor of the module (a tie, a list of weights) has to see the new values. Of several
    # values of one tensor the last one counts, as if each were copied into it.
    replaced: dict[int, Tensor] = {}
    for name, old in before.items():
        owner, _, attribute = name.rpartition(".")
        part = module.get_submodule(owner)
        new = getattr(part, attribute)
        if new is not old and type(new) is type(old) and new.device == old.device:
            old.data = new.data
            new = old
        replaced[id(old)] = new
    for name, old in before.items():
        owner, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(owner), attribute, replaced[id(old)])


def shape_of(value: object) -> tuple[int, ...] | str:
    """The shape of a tensor; the name of its type for anything else in a state dict."""
    return tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__


def group_warnings(warnings: Sequence[str], labels: Mapping[str, Any]) -> list[str]:
    """Join warnings that differ only in the label that they begin with.

    Args:
        warnings: each begins with a label, which its source in brackets may follow.
        labels: label -> source.

    Returns:
        The warnings, fewer or as many.

    Example::

        >>> group_warnings(["a (a.pt) has no head", "b has no head"], {"a": "a.pt", "b": None})
        ['a, b: has no head']
    """
    groups: dict[str, dict[str, str]] = {}
    for warning in warnings:
        label = next((label for label in labels if warning.startswith(label)), "")
        rest = warning.removeprefix(label).removeprefix(f" ({labels.get(label)})").removeprefix(":").strip()
        groups.setdefault(rest, {})[label] = warning
    return [next(iter(g.values())) if len(g) == 1 else f"{some([*g])}: {rest}" for rest, g in groups.items()]
