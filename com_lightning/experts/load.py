"""Load one expert, from whatever it is given as, into a module of the model's class."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from com_lightning.compat import load_module, of_other_package
from com_lightning.core.tensors.modules import copy_with_tensors, named_tensors
from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts.adapter_config import ADAPTER_CONFIG
from com_lightning.experts.adapter_files import load_adapter
from com_lightning.experts.adapters import merge_adapter, merge_and_unload
from com_lightning.experts.compiled import compile_like, compiled_like, copy_of, forget_compilation, unwrapped
from com_lightning.experts.construction import (
    BoundedConstruction,
    TooLargeError,
    check_counts,
    empty_parameters,
    meta_tensors,
    require_values,
)
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.hyperparameters import check_hyperparameters, restore_hyperparameters
from com_lightning.experts.state_dicts import ExtraKeys, fill, places, plain, plain_state, shape_of, some, submodule
from com_lightning.experts.transformers_models import MODEL_CONFIG, load_pretrained, pretrained_parts
from com_lightning.experts.vocabulary import resize_to

ExpertSource = str | Path | nn.Module | Mapping[str, Tensor]
"""A checkpoint, state dict or safetensors file; a folder of ``save_pretrained`` (transformers or PEFT), or the name of
one on the Hub (``hf://owner/name``, see :mod:`com_lightning.experts.hub`); a module or a state dict in memory."""

_log = logging.getLogger(__name__)


SetUp = Callable[[LightningModule], None]
"""Calls ``setup`` of a module, as a trainer does before it loads a checkpoint."""

_set_up: ContextVar[SetUp | None] = ContextVar("set_up", default=None)
_lean: ContextVar[bool] = ContextVar("lean", default=False)


class SetUpError(MergeError):
    """The ``setup`` of a module failed."""


def load_expert(
    name: str,
    source: ExpertSource,
    model: LightningModule,
    label: str | None = None,
    as_stored: bool = False,
    set_up: SetUp | None = None,
    lean: bool = False,
) -> LightningModule:
    """The module of one expert, on the CPU and in eval mode. Only tensors and plain values are unpickled.

    A Lightning checkpoint is rebuilt by the class of ``model`` from its hyperparameters, and a LightningModule is
    copied. Any other source becomes part of a copy of ``model``: a state dict is loaded into the part that it fits; a
    module, or a folder of ``save_pretrained``, takes the place of such a part; an adapter is merged into it.

    Args:
        name: of the task, for messages.
        source: where the expert comes from.
        model: gives the class, and the weights that an adapter was trained on.
        label: what messages call the expert; by default ``expert 'name'``.
        as_stored: leave the tensors in the precision of the source, see :func:`take_precision`, and all submodules in
            the mode of the source.
        set_up: is called with a module that lacks parameters of the source, if its class overrides ``setup``.
        lean: build the module of a Lightning checkpoint without memory for the parameters that the file has, if its
            class allows that.

    Returns:
        The module; it shares no memory with ``source`` or ``model``.

    Raises:
        MergeError: if the source cannot be read, is not safe, or does not fit. It names the file and the keys.
    """
    label = label or f"expert '{name}'"
    tokens = _set_up.set(set_up), _lean.set(lean)
    try:
        expert = _loaded(source, model, label)
    finally:
        _set_up.reset(tokens[0])
        _lean.reset(tokens[1])
    require_values(expert, model, label)
    forget_compilation(expert)
    merge_adapter(expert, label)
    compile_like(expert, model)
    if not as_stored:
        take_precision(expert, model)
        expert.eval()
    return expert


def _loaded(source: ExpertSource, model: LightningModule, label: str) -> LightningModule:
    if isinstance(source, nn.Module):
        source = unwrapped(source)
        if absent := [name for name, tensor, _ in named_tensors(source) if tensor.is_meta]:
            raise MergeError(
                [
                    f"{label}: {some(absent, most=2)} are not in memory, but on the meta device (accelerate keeps them "
                    "on disk): load the module without device_map, or with device_map='cpu'"
                ]
            )
    if problems := of_other_package(label, source):
        raise MergeError(problems)
    if isinstance(source, LightningModule):
        expert = copy_with_tensors(source)
    elif isinstance(source, nn.Module):
        expert = _replaced(model, merge_and_unload(source, label), label)
    elif isinstance(source, Mapping):
        expert = _filled(model, source, label, assign=False)
    elif isinstance(source, (str, Path)):
        label = f"{label} ({source})"
        try:
            expert = _from_path(Path(source), model, label)
        except MergeError:
            raise
        except TooLargeError as error:
            message = f"{label}: it describes something much too large: {error}"
            raise MergeError([f"{message}. If that is right, build the module yourself, and give it"]) from error
        except Exception as error:  # anything can be in a file
            raise MergeError([f"{label}: cannot be loaded ({reason(error)})"]) from error
    else:
        raise MergeError([f"{label}: a {type(source).__name__} is neither a file, a folder, a module nor a state dict"])
    return expert


def lacks(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether a module has not all parameters of a state dict (or name -> shape), in their shapes."""
    ours = {plain(name): shape_of(tensor) for name, tensor, _ in named_tensors(module)}
    shapes = {plain(name): v if isinstance(v, tuple) else shape_of(v) for name, v in state.items()}
    return any(ours.get(name) != shape for name, shape in shapes.items())


def complete(module: LightningModule, label: str, set_up: SetUp) -> None:
    """Call ``setup`` of a module that lacks parameters: it may build them.

    Args:
        module: the module.
        label: what messages call the expert that has these parameters.
        set_up: see :func:`load_expert`.

    Raises:
        SetUpError: if it fails.
    """
    try:
        set_up(module)
    except Exception as error:
        raise SetUpError(
            [
                f"{label}: {type(module).__name__} lacks some of its parameters, and its setup, which may build them, "
                f"fails ({reason(error)}); build layers in __init__ or configure_model"
            ]
        ) from error


def _complete(module: LightningModule, state: Mapping[str, Any], label: str) -> None:
    if (set_up := _set_up.get()) and is_overridden("setup", module) and lacks(module, state):
        complete(module, label, set_up)


def take_precision(expert: nn.Module, model: nn.Module) -> dict[str, torch.dtype]:
    """Convert an expert in place to the precision of ``model``.

    A tensor that ``model`` lacks gets the precision of the first floating-point parameter of ``model``.

    Args:
        expert: the module to convert.
        model: the module whose precision it takes.

    Returns:
        Name of each parameter and buffer that was converted -> the precision that it was stored in.
    """
    dtypes = {name: tensor.dtype for name, tensor, _ in named_tensors(model)}
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    floating = [(name, tensor) for name, tensor, _ in named_tensors(expert) if tensor.is_floating_point()]
    stored = {name: tensor.dtype for name, tensor in floating}
    for name, tensor in floating:
        tensor.data = tensor.data.to(dtypes.get(name, usual))
    return {name: stored[name] for name, tensor in floating if tensor.dtype != stored[name]}


def _from_path(path: Path, model: LightningModule, label: str) -> LightningModule:
    if (path / ADAPTER_CONFIG).is_file():
        expert = copy_of(model)
        with BoundedConstruction(path, model):
            load_adapter(path, expert, label)
        _warn_of_differences(expert, model, label)
        return expert
    if (path / MODEL_CONFIG).is_file():
        check_counts(path / MODEL_CONFIG)
        with BoundedConstruction(path, model):
            network = load_pretrained(path, label)
        return _replaced(model, network, label)
    if path.name.startswith("adapter_model.") and (path.parent / ADAPTER_CONFIG).is_file():
        raise MergeError([f"{label}: this is the file of a PEFT adapter; give its folder, {path.parent}"])
    content = read_checkpoint(path, label)
    if "pytorch-lightning_version" not in content:
        return _filled(model, content["state_dict"], label)
    with BoundedConstruction(path, model):  # the file itself is read outside of it, which is faster
        return _from_lightning_checkpoint(content, path, model, label)


def _from_lightning_checkpoint(
    content: Mapping[str, Any], path: Path, model: LightningModule, label: str
) -> LightningModule:
    """The module that a Lightning checkpoint describes. Its hyperparameters are checked first, and stay as they are."""
    try:
        check_hyperparameters(content, model)
    except ValueError as error:
        raise MergeError([f"{label}: {error}"]) from error
    expert = _made(content, path, model, label)
    restore_hyperparameters(expert, content)
    return expert


def _made(content: Mapping[str, Any], path: Path, model: LightningModule, label: str) -> LightningModule:
    """Make the module of a checkpoint in one of two ways.

    Our way of filling it (:func:`_rebuilt`) goes by names and shapes. Where it does not fit, the class itself decides
    what its checkpoint means, through ``load_from_checkpoint``: it may rename keys, or leave some out.

    Returns:
        The module.

    Raises:
        SetUpError: if the module's ``setup`` fails.
        MergeError: if neither way makes a module.
        TooLargeError: if the class starts to make one that is much too large.
    """
    module_class = type(model)
    # A hook of the class may change the weights, so that the class has to read them.
    extra: ExtraKeys | None = None
    if not is_overridden("on_load_checkpoint", model):
        try:
            return _rebuilt(content, module_class, label)
        except (SetUpError, TooLargeError):
            raise
        except Exception as error:  # code of the class runs here, without weights
            extra = error if isinstance(error, ExtraKeys) else None
            _log.info("%s: read by %s.load_from_checkpoint (%s)", label, module_class.__name__, reason(error))
    try:
        return load_module(module_class, content, None if path.is_dir() else path)
    except TooLargeError:
        raise
    except Exception as error:
        if extra:  # it is not the hyperparameters
            raise extra from error
        raise MergeError(
            [
                f"{label}: {module_class.__name__} cannot be rebuilt from its hyperparameters ({reason(error)}). Call "
                "save_hyperparameters() in its __init__ and save it again, or give the module itself or its state dict"
            ]
        ) from error


def _rebuilt(content: Mapping[str, Any], module_class: type[LightningModule], label: str) -> LightningModule:
    """Returns a module made from hyperparameters, with the tensors of the mapped file.

    Names may differ by what wrapped the module, and embedding tables may be longer than the class makes them.

    Raises:
        MergeError: if names or shapes do not fit.
        SetUpError: if the module's ``setup`` fails.
        TooLargeError: if the class starts to make a module that is much too large.
    """
    if _lean.get():
        try:
            expert = _rebuilt_from(content, module_class, label, empty_parameters())
            if not (without := meta_tensors(expert)):
                return expert
            _log.info("%s: built with memory for its parameters, because of %s", label, some(without))
        except (SetUpError, TooLargeError):
            raise
        except Exception as error:  # code of the class runs here, which may need the values
            _log.info("%s: built with memory for its parameters (%s)", label, reason(error))
    return _rebuilt_from(content, module_class, label)


def _rebuilt_from(
    content: Mapping[str, Any],
    module_class: type[LightningModule],
    label: str,
    construction: AbstractContextManager[None] | None = None,
) -> LightningModule:
    with warnings.catch_warnings(), construction or nullcontext():
        warnings.simplefilter("ignore")  # that there are no weights
        expert = load_module(module_class, {**content, "state_dict": {}}, strict=False)
    state = plain_state(content["state_dict"])
    _complete(expert, state, label)
    resize_to(expert, state)
    if part := fill(expert, state, label):
        raise MergeError([f"{label}: its weights are those of {part} only"])
    return expert


def _filled(model: LightningModule, state: Mapping[str, Tensor], label: str, assign: bool = True) -> LightningModule:
    """A copy of ``model`` with a state dict in the part that it fits."""
    expert = copy_of(model)
    _complete(expert, state, label)
    _warn_of_rest(expert, fill(expert, state, label, assign), label)
    return expert


def _replaced(model: LightningModule, part: nn.Module, label: str) -> LightningModule:
    """A copy of ``model`` with a module in the place of the submodule that it has most in common with."""
    state = plain_state(part.state_dict())
    if packed := [f"{name} is {tensor.dtype}" for name, tensor in part.named_parameters() if not _is_number(tensor)]:
        raise MergeError(
            [f"{label}: its weights are quantised: {some(packed, most=2)}. Dequantise it, and save it in 16 or 32 bit"]
        )
    fitting = places(model, state)
    part_name, model_name = type(part).__name__, type(model).__name__
    if len(fitting) != 1:
        why = f"fits {some(fitting)} of {model_name} equally well"
        if not fitting:
            parts = "".join(f"; its {place} is a {type(p).__name__}" for place, p in pretrained_parts(model).items())
            why = f"has little in common with any part of {model_name}{parts}"
        raise MergeError([f"{label}: the {part_name} {why}. Give a LightningModule"])
    place = fitting[0]
    if not place:
        return _filled(model, state, label, assign=False)
    name, old = submodule(model, place)
    inside = {id(item) for item in (*old.modules(), *old.parameters())}
    everywhere = (*model.named_modules(remove_duplicate=False), *model.named_parameters(remove_duplicate=False))
    if others := [n for n, p in everywhere if id(p) in inside and n != name and not n.startswith(f"{name}.")]:
        raise MergeError([f"{label}: {model_name} uses {place} also as {others[0]}. Give a LightningModule"])
    part = part.to("cpu" if (device := next(model.parameters()).device).type == "meta" else device)
    # The copy never holds the weights that are replaced.
    expert = copy_of(model, {id(old): compiled_like(part, old) if isinstance(old, OptimizedModule) else part})
    _warn_of_rest(expert, place, label)
    _warn_of_differences(expert, model, label)
    return expert


def _is_number(tensor: Tensor) -> bool:
    """Whether a parameter holds what it stands for, and not codes for it."""
    return tensor.is_floating_point() or tensor.is_complex()


def _warn_of_rest(model: LightningModule, place: str, label: str) -> None:
    """Warn of parameters that an expert leaves as they are, because it is only a part of the model."""
    rest = [name for name, _ in model.named_parameters() if place and not plain(name).startswith(f"{place}.")]
    if rest:
        warnings.warn(
            f"{label} is taken for {place}; {some(rest)} stay as they are in your model", MergeWarning, stacklevel=2
        )


def _warn_of_differences(expert: LightningModule, model: LightningModule, label: str) -> None:
    """Warn of parameters that the class of the model, with the model's hyperparameters, would not make."""
    ours, theirs = ({plain(n): shape_of(t) for n, t, _ in named_tensors(m)} for m in (model, expert))
    if differing := [name for name in theirs if ours.get(name) != theirs[name]]:
        names = [f"{name} ({theirs[name]}, in your model {ours.get(name, 'missing')})" for name in differing]
        warnings.warn(
            f"{label}: {some(names, most=2)} differ from your model's, while metrics and hyperparameters are still "
            "those of your model: where they depend on it (a number of classes), give a LightningModule in memory "
            f"that was built to match. {type(model).__name__}.load_from_checkpoint cannot load the result's checkpoint "
            "of this task; load its state_dict into a module built alike"
            + (", or its folder in `transformers` with from_pretrained" if pretrained_parts(expert) else ""),
            MergeWarning,
            stacklevel=2,
        )
