"""Merge the adapter in a folder, as PEFT's `save_pretrained` writes it, into the part of a model that it is for."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts.adapter_config import TRAINING, make_config, read_config
from com_lightning.experts.adapters import adapter_kind, peft_warnings, unload
from com_lightning.experts.files import folder_problems, read_checkpoint
from com_lightning.experts.state_dicts import plain, shape_of, some, submodule
from com_lightning.experts.tokenizers import remember_folder
from com_lightning.experts.transformers_models import pretrained_parts
from com_lightning.experts.vocabulary import resize_to
from com_lightning.extras import check_installed

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
_LONGEST = 1000
"""Characters of a tensor's name."""
_DEEPEST = 100
"""Dots in it."""
_NO_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version", "revision"),
    *("task_type", "runtime_config", "megatron_core", "eva_config", "corda_config", "lora_ga_config", "loftq_config"),
    # Which layers are adapted, and their ranks, show in the names and shapes of the weights.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "rank_pattern"),
    *("r", "target_parameters"),
}
"""Settings that may differ from those of the adapter whose place an adapter takes."""
_SAME_BASE = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Ways to make a new adapter that leave the base as it is."""


def load_adapter(folder: Path, module: nn.Module, label: str) -> None:
    """Merge an adapter into the part of ``module`` that it was trained on.

    Nothing outside of the folder is read, and only types and settings that are known are, see
    :mod:`~com_lightning.experts.adapter_config`.

    Args:
        folder: as PEFT's ``save_pretrained`` writes it: an ``adapter_config.json``, and the adapter's weights.
        module: changed in place; it holds the weights that the adapter was trained on.
        label: names the source in messages.

    Raises:
        MergeError: if peft is missing, the adapter fits no part or several parts of ``module``, or cannot be merged.
    """
    check_installed("peft", f"{label}: adapters")
    from peft import PeftModel

    path = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise MergeError([f"{label}: has no {' or '.join(_WEIGHTS)}"])
    if problems := folder_problems(folder):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    settings = read_config(folder, label)
    state = read_checkpoint(path, f"{label}: {path.name}")["state_dict"]
    if odd := [name for name in state if len(name) > _LONGEST or name.count(".") > _DEEPEST]:
        raise MergeError([f"{label}: {path.name} has a tensor with a name of {len(odd[0]):,} characters"])
    if other := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise MergeError([f"{label}: {path.name}: {other[0]} is a {shape_of(state[other[0]])}, not a tensor"])
    if any(isinstance(part, PeftModel) for part in module.modules()):
        remember_folder(_take_place(module, settings, state, label), folder)
        return  # merge_adapter merges it in place
    kind = settings["peft_type"]
    # Weights that no layer owns, such as VeRA's projections, have names without the whole prefix.
    names = {n.removeprefix(_PREFIX): t for n, t in state.items() if n.startswith(_PREFIX) or _PREFIX[:11] not in n}
    place, target = _target([*names], module, kind, label, _trained_on(settings.get("base_model_name_or_path")))
    parameters = dict(target.named_parameters())
    if quantised := [n for n, p in parameters.items() if hasattr(p, "quant_state") or p.dtype in _INTEGERS]:
        dtype = str(parameters[quantised[0]].dtype).removeprefix("torch.")
        raise MergeError(
            [
                f"{label}: {some(quantised, most=2)} of your model are {dtype}, and no adapter can be merged exactly "
                "into quantised weights: load the model without quantisation, also if the adapter was trained on a "
                "quantised one (QLoRA)"
            ]
        )
    whole = {name.replace(".base_layer.", "."): tensor for name, tensor in names.items()}
    resize_to(target, whole)
    _match_heads(whole, target, label)
    modules = [name for name, _ in target.named_modules() if name]
    largest = max((size for t in (*state.values(), *target.parameters()) for size in t.shape), default=1)
    layers = {name.rpartition(".lora_")[0] for name in names if ".lora_" in name}
    config = make_config(settings, modules, layers, largest, label)
    if "_niter_" in str(settings.get("init_lora_weights")):
        warnings.warn(
            f"{label}: the adapter belongs to a base that '{settings['init_lora_weights']}' has changed with random "
            "numbers, which are others now, so that the expert is only about what was trained; save it with "
            "path_initial_model_for_weight_conversion",
            MergeWarning,
            stacklevel=3,
        )
    modes = [(part, part.training) for part in target.modules()]
    adapted = _adapted(target, place, type(module).__name__, config, folder, label)
    for part, training in modes:  # PEFT puts it in eval mode
        part.training = training
    _check_base(settings, target, label)
    if unload(adapted, label) is not target:
        raise MergeError([f"{label}: {kind} makes another module of {place or 'the model'}, and cannot be merged"])
    remember_folder(target, folder)


def _adapted(target: nn.Module, place: str, model: str, config: Any, folder: Path, label: str) -> nn.Module:
    """A PeftModel around a module, with an adapter's weights. PEFT itself says which of them fit."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    hint, kind = _trained_on(config.base_model_name_or_path), adapter_kind(config)
    try:
        with torch.no_grad(), peft_warnings(label):
            config.inference_mode = True
            adapted = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(target, config)
            # What older transformers called the layers of this class.
            renamed = getattr(target, "_checkpoint_conversion_mapping", None) or None
            result = adapted.load_adapter(str(folder), "default", torch_device="cpu", key_mapping=renamed)
    except Exception as error:
        where = place or "the model"
        raise MergeError([f"{label}: {kind} cannot be merged into {where} ({reason(error)}).{hint}"]) from error
    # With bias="all", a file has the biases of layers that are replaced as a whole under two names.
    doubles = (".modules_to_save.", ".original_module.")
    extra = [n.removeprefix(_PREFIX) for n in result.unexpected_keys if not any(double in n for double in doubles)]
    # The bank of VB-LoRA has two names in the model, and one in the file.
    missing = [name.removeprefix(_PREFIX) for name in result.missing_keys if "vblora_vector_bank" not in name]
    if extra:
        raise MergeError([_other_architecture(kind, model, place, extra, label, hint)])
    if missing:
        raise MergeError([f"{label}: the {kind} adapter is incomplete: missing adapter keys: {some(missing)}.{hint}"])
    return adapted


def _other_architecture(kind: str, model: str, place: str, lacking: Sequence[str], label: str, hint: str) -> str:
    return (
        f"{label}: the {kind} adapter was trained on another architecture: no part of {model} has all its layers; "
        f"{place or model} comes closest and lacks {some(lacking, most=3)}.{hint}"
    )


def _trained_on(base: str | None) -> str:
    """A hint at the base model that an adapter names, for messages on adapters that do not fit."""
    return f" It was trained on '{base}': load the model from there" if base else ""


def _target(names: Sequence[str], module: nn.Module, kind: str, label: str, hint: str) -> tuple[str, nn.Module]:
    """Find the part of a module that has most of the layers that an adapter's weights name.

    Whether it has all of them, PEFT finds out: layers of older transformers have other names.

    Returns:
        Its plain name and itself.

    Raises:
        MergeError: if there is none, or several.
    """
    places = [plain(name) for name, _ in module.named_modules()]
    existing, starts = set(places), {name.split(".")[0] for name in names}
    parents = dict.fromkeys(place.rpartition(".")[0] for place in places if place.rpartition(".")[2] in starts)

    def depth(name: str, place: str) -> int:
        """The number of segments of a name that lead to a module."""
        parts = name.split(".")
        paths = (".".join([place, *parts[:cut]] if place else parts[:cut]) for cut in range(1, len(parts)))
        return next((cut for cut, path in enumerate(paths) if path not in existing), len(parts) - 1)

    depths = {place: sum(depth(name, place) for name in names) for place in parents}
    most = max(depths.values(), default=0)
    fitting = [place for place, value in depths.items() if value == most > 0] if names else [*pretrained_parts(module)]
    if len(fitting) > 1:
        raise MergeError([f"{label}: the {kind} adapter fits {some(fitting)} of {type(module).__name__} equally well"])
    if not fitting:
        raise MergeError([_other_architecture(kind, type(module).__name__, "", names, label, hint)])
    target = submodule(module, fitting[0])[1]
    return fitting[0], getattr(target, "_orig_mod", target)


def _take_place(module: nn.Module, settings: Mapping[str, Any], state: Mapping[str, Tensor], label: str) -> nn.Module:
    """Load an adapter into the PeftModel in a module in place of the adapter that it has.

    Returns:
        The model in the PeftModel.

    Raises:
        MergeError: if they differ in shapes, or in a setting that the weights cannot tell.
    """
    from peft import PeftModel, set_peft_model_state_dict

    parts = {name: part for name, part in module.named_modules() if isinstance(part, PeftModel)}
    problems = {name: _differences(part, settings, state) for name, part in parts.items()}
    fitting = [name for name, found in problems.items() if not found]
    if len(fitting) > 1:
        raise MergeError([f"{label}: the adapter fits {some(fitting)} of {type(module).__name__} equally well"])
    if not fitting:
        fewest = min(problems.values(), key=len)
        raise MergeError(
            [
                f"{label}: the adapter differs from the one in your model: {some(fewest, '; ', 3)}. Give a model "
                "without adapter, into which adapters of any kind are merged, or a Lightning checkpoint"
            ]
        )
    part = parts[fitting[0]]
    result: Any = set_peft_model_state_dict(part, dict(state), adapter_name=part.active_adapters[0])
    if result.unexpected_keys:
        raise MergeError([f"{label}: the adapter in your model lacks {some(result.unexpected_keys)}"])
    return part.get_base_model()


def _differences(part: Any, settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> list[str]:
    """What differs between an adapter in a folder and the active one of a PeftModel."""
    from peft import get_peft_model_state_dict

    if len(part.active_adapters) != 1:
        return [f"{len(part.active_adapters)} adapters are active in the model: {some(part.active_adapters)}"]
    name = part.active_adapters[0]
    config = part.peft_config[name]
    ours = get_peft_model_state_dict(part, adapter_name=name, save_embedding_layers=False)
    tables = {key: tensor for key, tensor in part.state_dict().items() if key in state}
    shapes, our_shapes = ({key: shape_of(t) for key, t in each.items()} for each in (state, {**tables, **ours}))
    keys = sorted(key for key in {*shapes, *our_shapes} if shapes.get(key) != our_shapes.get(key))
    problems = [f"{k} is {shapes.get(k, 'missing')}, in the model {our_shapes.get(k, 'missing')}" for k in keys]
    if settings["peft_type"] != (kind := adapter_kind(config)):
        problems.insert(0, f"its type is {settings['peft_type']}, in the model {kind}")
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        value, our_value = settings.get(field.name, default), getattr(config, field.name)
        if field.name in _NO_EFFECT or field.name.endswith(TRAINING):
            continue
        if field.name == "init_lora_weights":
            value, our_value = (True if each in _SAME_BASE else each for each in (value, our_value))
        if (value or None) != (our_value or None):
            problems.append(f"{field.name} is {value}, in the model {our_value}")
    return problems


def _check_base(settings: Mapping[str, Any], target: nn.Module, label: str) -> None:
    """Warn of an adapter that was trained on a base model of another name."""
    trained_on = settings.get("base_model_name_or_path")
    ours = getattr(getattr(target, "config", None), "_name_or_path", None)
    if trained_on and ours and Path(trained_on).name != Path(ours).name:
        warnings.warn(
            f"{label}: the adapter was trained on '{trained_on}', and is merged into your model's '{ours}'; if these "
            f"are not the same weights, the expert is wrong: load the model from '{trained_on}'",
            MergeWarning,
            stacklevel=4,
        )


def _match_heads(names: Mapping[str, Tensor], target: Any, label: str) -> None:
    """Resize layers that the adapter replaces as a whole (`modules_to_save`, mostly heads) to the size that it has."""
    ours = target.state_dict()
    for name, tensor in names.items():
        if name in ours and shape_of(tensor) != shape_of(ours[name]):
            layer = target.get_submodule(name.rpartition(".")[0])
            if not isinstance(layer, nn.Linear):
                shapes = f"{name} is {shape_of(tensor)}, in the model {shape_of(ours[name])}"
                advice = "give the module itself"
                if isinstance(layer, nn.Embedding) and tensor.shape[1:] == ours[name].shape[1:]:
                    advice = f"call resize_token_embeddings({len(tensor)}) on your model's network first"
                raise MergeError([f"{label}: {shapes}; {advice}"])
            value = nn.Parameter(torch.empty_like(tensor, dtype=ours[name].dtype))
            setattr(layer, name.rpartition(".")[2], value)
            if tensor.dim() == 2:
                layer.out_features, layer.in_features = tensor.shape
                if hasattr(target, "num_labels") and ours[name].shape[0] == target.num_labels:
                    target.num_labels = target.config.num_labels = tensor.shape[0]
