"""PEFT adapters as experts: folded into the weights that they adapt."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts.files import folder_problems, read_checkpoint
from com_lightning.experts.state_dicts import plain, shape_of, some, submodule

CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."


def unloaded(part: nn.Module, label: str) -> nn.Module:
    """A copy of a module without its adapters, which are folded into the weights; a plain copy where it has none.

    Raises:
        MergeError: if the adapter cannot be folded.
    """
    part = copy.deepcopy(part)
    if not _layers(part):
        return part
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    try:
        with torch.no_grad():
            if isinstance(part, PeftModel):
                return part.merge_and_unload()  # type: ignore[no-any-return]
            for name, layer in list(part.named_modules()):  # transformers' own `add_adapter`
                if isinstance(layer, BaseTunerLayer):
                    layer.merge()
                    part.set_submodule(name, layer.get_base_layer())
            return part
    except Exception as error:
        raise MergeError([f"{label}: its adapter cannot be folded into the weights ({reason(error)})"]) from error


def fold(module: nn.Module, label: str) -> None:
    """Fold LoRA adapters into the weights in place, and leave the layers as they are.

    The second factor of each adapter becomes zero, so that names and shapes stay those of the module's class: a
    checkpoint of the folded module, loaded by its class, computes what the module computed with its adapters.

    Raises:
        MergeError: for adapters that have no such fold (DoRA, IA³, ...).
    """
    layers = _layers(module)
    if not layers:
        return
    from peft.tuners.lora import LoraLayer

    def active(layer: Any) -> list[str]:
        return [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.scaling]

    plainly = {n: p for n, p in layers.items() if isinstance(p, LoraLayer) and not set(active(p)) & {*p.lora_variant}}
    if others := {name: layer for name, layer in layers.items() if name not in plainly}:
        kinds = sorted({_kind(layer) for layer in others.values()})
        raise MergeError(
            [
                f"{label}: adapters other than plain LoRA cannot be folded in place: {', '.join(kinds)} at "
                f"{some(list(others), most=2)}. Call merge_and_unload() on the PeftModel of every expert and of the "
                "model, and give the modules"
            ]
        )
    with torch.no_grad():
        for layer in plainly.values():
            names = active(layer)
            if unmerged := [name for name in names if name not in layer.merged_adapters]:
                layer.merge(adapter_names=unmerged)
            for name in names:
                factor = layer.lora_B[name] if name in layer.lora_B else layer.lora_embedding_B[name]
                for tensor in factor.parameters() if isinstance(factor, nn.Module) else (factor,):
                    tensor.zero_()


def adapter_problems(modules: Mapping[str, nn.Module]) -> list[str]:
    """What is wrong with adapters that are left in place: their layers' names are others than those of plain layers.

    Args:
        modules: name for messages -> module.
    """
    layers = {who: set(_layers(module)) for who, module in modules.items()}
    lacking: dict[tuple[str, frozenset[str]], list[str]] = {}
    for who, own in layers.items():
        for other, names in layers.items():
            if own - names:
                lacking.setdefault((other, frozenset(own - names)), []).append(who)
                break
    return [
        f"{' and '.join(several)} {'has an adapter' if len(several) == 1 else 'have adapters'} at {len(names)} layers "
        f"({some(sorted({name.rpartition('.')[2] for name in names}))}), {other} has none there. Call "
        "merge_and_unload() on all PeftModels, that of the model too, and give the modules; or take a model without "
        "adapter and give the adapters' folders"
        for (other, names), several in lacking.items()
    ]


def adapter_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers of adapters; what they adapt is not among them."""
    found = set()
    for name, layer in _layers(module).items():
        for kind in (*layer.adapter_layer_names, *layer.other_param_names):
            prefix = f"{name}.{kind}" if name else kind
            value = getattr(layer, kind, None)
            if isinstance(value, nn.Module):
                found |= {f"{prefix}.{own}" for own in (*_names(value),)}
    return found


def load_adapter(folder: Path, module: nn.Module, label: str) -> None:
    """Fold an adapter's folder, as PEFT's ``save_pretrained`` writes it, into the part of ``module`` it was trained on.

    Args:
        folder: with an ``adapter_config.json`` and the adapter's weights.
        module: changed in place; it holds the weights that the adapter was trained on.
        label: names the source in messages.

    Raises:
        MergeError: if peft is missing, the adapter fits no part or several parts of ``module``, or cannot be folded.
    """
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        raise MergeError([f'{label}: adapters need peft: pip install "com_lightning[lora]"']) from error
    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise MergeError([f"{label}: has no {' or '.join(_WEIGHTS)}"])
    if problems := folder_problems(folder):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    state = read_checkpoint(path, f"{label}: {path.name}")["state_dict"]
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:
        raise MergeError([f"{label}: {CONFIG} cannot be read ({reason(error)})"]) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind == "XLORA" or getattr(config, "megatron_config", None):  # files and modules that the configuration names
        raise MergeError([f"{label}: {CONFIG} makes PEFT load what is not in the folder, which is not done"])
    if config.is_prompt_learning:
        raise MergeError([f"{label}: {kind} changes what a model is given, not its weights: there is nothing to merge"])
    if wrapped := [part for part in module.modules() if isinstance(part, PeftModel)]:
        _check_same(config, state, wrapped[0].active_peft_config, get_peft_model_state_dict(wrapped[0]), label)
        set_peft_model_state_dict(wrapped[0], state)
        return  # to be folded in place
    place, target = _target(state, module, kind, label, _trained_on(config))
    _check_base(config, target, label)
    _match_heads(state, target, label)
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(target, str(folder), torch_device="cpu")
            folded = adapted.merge_and_unload()
    except Exception as error:
        raise MergeError(
            [f"{label}: {kind} cannot be folded into {place or 'the model'} ({reason(error)}).{_trained_on(config)}"]
        ) from error
    if missing := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
        raise MergeError([f"{label}: {missing[0]}"])
    assert folded is target


def _layers(module: nn.Module) -> dict[str, Any]:
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def _kind(layer: Any) -> str:
    variants = [type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()]
    return ", ".join(variants) or f"{type(layer).__module__.split('.')[-2]} {type(layer).__name__}"


def _trained_on(config: Any) -> str:
    """The base that an adapter names, for where it does not fit the model."""
    base = config.base_model_name_or_path
    return f" It was trained on '{base}': load the model from there" if base else ""


def _target(state: dict[str, Any], module: nn.Module, kind: str, label: str, hint: str) -> tuple[str, nn.Module]:
    """The part of a module that has all the layers which an adapter's weights name."""
    names = [name.removeprefix(_PREFIX) for name in state]
    modules = [plain(name) for name, _ in module.named_modules()]
    known = set(modules)

    def layer_of(name: str, place: str) -> str | None:
        parts = name.split(".")
        paths = (".".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))
        return next((path for path in paths if (f"{place}.{path}" if place else path) in known), None)

    # A layer is followed by the adapter's own parameter, as in `encoder.query.lora_A.weight`: at most two segments.
    def lacking(place: str) -> list[str]:
        return [n for n in names if (layer := layer_of(n, place)) is None or n.count(".") - layer.count(".") > 2]

    fitting = [place for place in modules if not lacking(place)]
    # A wrapper and what it wraps have one plain name.
    fitting = list(dict.fromkeys(fitting))
    if len(fitting) != 1:
        whom = type(module).__name__
        if fitting:
            raise MergeError([f"{label}: the {kind} adapter fits {some(fitting)} of {whom} equally well"])
        closest = min(modules, key=lambda place: len(lacking(place)))
        raise MergeError(
            [
                f"{label}: the {kind} adapter was trained on another architecture: no part of {whom} has all its "
                f"layers; {closest or whom} comes closest and lacks {some(lacking(closest), most=3)}.{hint}"
            ]
        )
    target = submodule(module, fitting[0])[1]
    return fitting[0], getattr(target, "_orig_mod", target)


def _check_same(config: Any, state: dict[str, Any], ours: Any, own: dict[str, Any], label: str) -> None:
    """An adapter takes the place of the one in the user's module, so that its class fits: it must be alike."""
    shapes = [{name: shape_of(tensor) for name, tensor in each.items()} for each in (state, own)]
    differing = sorted(name for name in {*state, *own} if shapes[0].get(name) != shapes[1].get(name))
    told = [f"{n} is {shapes[0].get(n, 'missing')}, in the model {shapes[1].get(n, 'missing')}" for n in differing]
    settings = ("peft_type", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    for name in settings:
        theirs, mine = getattr(config, name, None), getattr(ours, name, None)
        if theirs != mine:
            told.append(f"{name} is {theirs}, in the model {mine}")
    if told:
        raise MergeError(
            [
                f"{label}: the adapter differs from the one in your model: {some(told, '; ', 3)}. Give a model without "
                "adapter, into which adapters of any kind are folded, or a Lightning checkpoint"
            ]
        )


def _check_base(config: Any, target: nn.Module, label: str) -> None:
    trained_on, ours = config.base_model_name_or_path, getattr(getattr(target, "config", None), "_name_or_path", None)
    if trained_on and ours and Path(trained_on).name != Path(ours).name:
        warnings.warn(
            f"{label}: the adapter was trained on '{trained_on}', and is folded into your model's '{ours}'; if these "
            f"are not the same weights, the expert is wrong: load the model from '{trained_on}'",
            MergeWarning,
            stacklevel=4,
        )


def _match_heads(state: dict[str, Any], target: nn.Module, label: str) -> None:
    """Give layers that the adapter brings whole (`modules_to_save`, heads mostly) the size that they have there."""
    own = target.state_dict()
    whole = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    for name, tensor in whole.items():
        if name in own and shape_of(tensor) != shape_of(own[name]):
            layer = target.get_submodule(name.rpartition(".")[0])
            if not isinstance(layer, nn.Linear):
                told = f"{name} is {shape_of(tensor)}, in the model {shape_of(own[name])}"
                raise MergeError([f"{label}: {told}; give the module itself"])
            value = nn.Parameter(torch.empty_like(tensor, dtype=own[name].dtype))
            setattr(layer, name.rpartition(".")[2], value)
            if tensor.dim() == 2:
                layer.out_features, layer.in_features = tensor.shape
                if hasattr(target, "num_labels") and own[name].shape[0] == target.num_labels:
                    target.num_labels = target.config.num_labels = tensor.shape[0]  # type: ignore[union-attr]
