"""PEFT adapters as experts: merged into the weights that they adapt."""

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
from com_lightning.experts.tokenizers import remember_folder

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."


def merge_and_unload(part: nn.Module, label: str) -> nn.Module:
    """Copy a module, and merge its adapters into the weights.

    Args:
        part: the module.
        label: names it in messages.

    Returns:
        A copy without adapters.

    Raises:
        MergeError: if an adapter cannot be merged.
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
        raise MergeError([f"{label}: its adapter cannot be merged into the weights ({reason(error)})"]) from error


def merge_adapter(module: nn.Module, label: str) -> None:
    """Merge LoRA adapters into the weights in place, and leave the adapters' layers where they are.

    The second factor of each adapter becomes zero, and names and shapes stay as they are. So a checkpoint of the module
    can still be loaded by its class, and then computes the same as the module did with its adapters.

    Args:
        module: changed in place; nothing happens to a module without adapters.
        label: names it in messages.

    Raises:
        MergeError: for adapters of other kinds (DoRA, IA³, ...), which cannot be merged in place.
    """
    layers = _layers(module)
    if not layers:
        return
    from peft.tuners.lora import LoraLayer

    def active(layer: Any) -> list[str]:
        return [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.scaling]

    plain_lora = {n: p for n, p in layers.items() if isinstance(p, LoraLayer) and not {*active(p)} & {*p.lora_variant}}
    if others := {name: layer for name, layer in layers.items() if name not in plain_lora}:
        types = sorted({_adapter_type(layer) for layer in others.values()})
        raise MergeError(
            [
                f"{label}: adapters other than plain LoRA cannot be merged in place: {', '.join(types)} at "
                f"{some(list(others), most=2)}. Call merge_and_unload() on the PeftModel of every expert and of the "
                "model, and give the modules"
            ]
        )
    with torch.no_grad():
        for layer in plain_lora.values():
            names = active(layer)
            if unmerged := [name for name in names if name not in layer.merged_adapters]:
                layer.merge(adapter_names=unmerged)
            for name in names:
                factor = layer.lora_B[name] if name in layer.lora_B else layer.lora_embedding_B[name]
                for tensor in factor.parameters() if isinstance(factor, nn.Module) else (factor,):
                    tensor.zero_()


def adapter_problems(modules: Mapping[str, nn.Module]) -> list[str]:
    """Say which modules have adapters where others have none: the names of their parameters then differ.

    Args:
        modules: name for messages -> module.

    Returns:
        One sentence for each such difference.
    """
    adapted = {label: set(_layers(module)) for label, module in modules.items()}
    lacking: dict[tuple[str, frozenset[str]], list[str]] = {}
    for label, layers in adapted.items():
        for other, others in adapted.items():
            if layers - others:
                lacking.setdefault((other, frozenset(layers - others)), []).append(label)
                break
    return [
        f"{' and '.join(labels)} {'has an adapter' if len(labels) == 1 else 'have adapters'} at {len(layers)} layers "
        f"({some(sorted({name.rpartition('.')[2] for name in layers}))}), {other} has none there. Call "
        "merge_and_unload() on all PeftModels, including the model's, and give the modules; or take a model without "
        "adapter and give the adapters' folders"
        for (other, layers), labels in lacking.items()
    ]


def adapter_parameters(module: nn.Module) -> set[str]:
    """Names of the parameters and buffers of adapters, without those of the layers that they adapt."""
    names = set()
    for layer_name, layer in _layers(module).items():
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            prefix = f"{layer_name}.{attribute}" if layer_name else attribute
            value = getattr(layer, attribute, None)
            if isinstance(value, nn.Module):
                names |= {f"{prefix}.{name}" for name, _ in (*value.named_parameters(), *value.named_buffers())}
    return names


def load_adapter(folder: Path, module: nn.Module, label: str) -> None:
    """Merge an adapter into the part of ``module`` that it was trained on.

    Args:
        folder: as PEFT's ``save_pretrained`` writes it: an ``adapter_config.json``, and the adapter's weights.
        module: changed in place; it holds the weights that the adapter was trained on.
        label: names the source in messages.

    Raises:
        MergeError: if peft is missing, the adapter fits no part or several parts of ``module``, or cannot be merged.
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
        raise MergeError([f"{label}: {ADAPTER_CONFIG} cannot be read ({reason(error)})"]) from error
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    # Such configurations name further files and modules.
    if peft_type == "XLORA" or getattr(config, "megatron_config", None):
        raise MergeError([f"{label}: {ADAPTER_CONFIG} makes PEFT load what is not in the folder, which is not done"])
    if config.is_prompt_learning:
        raise MergeError([f"{label}: {peft_type} changes a model's inputs, not its weights: there is nothing to merge"])
    if wrapped := [part for part in module.modules() if isinstance(part, PeftModel)]:
        _check_same(config, state, wrapped[0].active_peft_config, get_peft_model_state_dict(wrapped[0]), label)
        set_peft_model_state_dict(wrapped[0], state)
        remember_folder(wrapped[0].get_base_model(), folder)
        return  # merge_adapter merges it in place
    place, target = _target(state, module, peft_type, label, _trained_on(config))
    _check_base(config, target, label)
    _match_heads(state, target, label)
    try:
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            adapted = PeftModel.from_pretrained(target, str(folder), torch_device="cpu")
            merged = adapted.merge_and_unload()
    except Exception as error:
        where = place or "the model"
        raise MergeError(
            [f"{label}: {peft_type} cannot be merged into {where} ({reason(error)}).{_trained_on(config)}"]
        ) from error
    if missing := [str(w.message) for w in caught if "missing adapter keys" in str(w.message)]:
        raise MergeError([f"{label}: {missing[0]}"])
    assert merged is target
    remember_folder(target, folder)


def _layers(module: nn.Module) -> dict[str, Any]:
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def _adapter_type(layer: Any) -> str:
    variants = [type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()]
    return ", ".join(variants) or f"{type(layer).__module__.split('.')[-2]} {type(layer).__name__}"


def _trained_on(config: Any) -> str:
    """A hint at the base model that an adapter names, for messages on adapters that do not fit."""
    base = config.base_model_name_or_path
    return f" It was trained on '{base}': load the model from there" if base else ""


def _target(state: dict[str, Any], module: nn.Module, peft_type: str, label: str, hint: str) -> tuple[str, nn.Module]:
    """The one part of a module that has all layers that an adapter's weights name, and its name."""
    names = [name.removeprefix(_PREFIX) for name in state]
    modules = [plain(name) for name, _ in module.named_modules()]
    existing = set(modules)

    def layer_of(name: str, place: str) -> str | None:
        parts = name.split(".")
        paths = (".".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))
        return next((path for path in paths if (f"{place}.{path}" if place else path) in existing), None)

    # The name of a layer is followed by that of the adapter's parameter, at most two segments: `query.lora_A.weight`.
    def lacking(place: str) -> list[str]:
        return [n for n in names if (layer := layer_of(n, place)) is None or n.count(".") - layer.count(".") > 2]

    fitting = [place for place in modules if not lacking(place)]
    fitting = list(dict.fromkeys(fitting))  # a wrapper and the module in it have one plain name
    if len(fitting) != 1:
        model = type(module).__name__
        if fitting:
            raise MergeError([f"{label}: the {peft_type} adapter fits {some(fitting)} of {model} equally well"])
        closest = min(modules, key=lambda place: len(lacking(place)))
        raise MergeError(
            [
                f"{label}: the {peft_type} adapter was trained on another architecture: no part of {model} has all its "
                f"layers; {closest or model} comes closest and lacks {some(lacking(closest), most=3)}.{hint}"
            ]
        )
    target = submodule(module, fitting[0])[1]
    return fitting[0], getattr(target, "_orig_mod", target)


def _check_same(config: Any, state: dict[str, Any], our_config: Any, our_state: dict[str, Any], label: str) -> None:
    """Refuse an adapter that differs in shape or settings from the one in the model, whose place it takes."""
    theirs, ours = ({name: shape_of(tensor) for name, tensor in each.items()} for each in (state, our_state))
    names = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
    problems = [f"{n} is {theirs.get(n, 'missing')}, in the model {ours.get(n, 'missing')}" for n in names]
    settings = ("peft_type", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "use_dora")
    for name in settings:
        value, our_value = getattr(config, name, None), getattr(our_config, name, None)
        if value != our_value:
            problems.append(f"{name} is {value}, in the model {our_value}")
    if problems:
        raise MergeError(
            [
                f"{label}: the adapter differs from the one in your model: {some(problems, '; ', 3)}. Give a model "
                "without adapter, into which adapters of any kind are merged, or a Lightning checkpoint"
            ]
        )


def _check_base(config: Any, target: nn.Module, label: str) -> None:
    """Warn of an adapter that was trained on a base model of another name."""
    trained_on, ours = config.base_model_name_or_path, getattr(getattr(target, "config", None), "_name_or_path", None)
    if trained_on and ours and Path(trained_on).name != Path(ours).name:
        warnings.warn(
            f"{label}: the adapter was trained on '{trained_on}', and is merged into your model's '{ours}'; if these "
            f"are not the same weights, the expert is wrong: load the model from '{trained_on}'",
            MergeWarning,
            stacklevel=4,
        )


def _match_heads(state: dict[str, Any], target: nn.Module, label: str) -> None:
    """Resize layers that the adapter replaces as a whole (`modules_to_save`, mostly heads) to the size that it has."""
    ours = target.state_dict()
    whole = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
    for name, tensor in whole.items():
        if name in ours and shape_of(tensor) != shape_of(ours[name]):
            layer = target.get_submodule(name.rpartition(".")[0])
            if not isinstance(layer, nn.Linear):
                shapes = f"{name} is {shape_of(tensor)}, in the model {shape_of(ours[name])}"
                raise MergeError([f"{label}: {shapes}; give the module itself"])
            value = nn.Parameter(torch.empty_like(tensor, dtype=ours[name].dtype))
            setattr(layer, name.rpartition(".")[2], value)
            if tensor.dim() == 2:
                layer.out_features, layer.in_features = tensor.shape
                if hasattr(target, "num_labels") and ours[name].shape[0] == target.num_labels:
                    target.num_labels = target.config.num_labels = tensor.shape[0]  # type: ignore[union-attr]
