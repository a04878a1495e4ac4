"""Merge the adapters of PEFT that a module has into the weights that they adapt."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from com_lightning.core.tensors.modules import copy_with_tensors
from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts.adapter_check import Fold, adapter_layers, adapter_type
from com_lightning.experts.state_dicts import some

_SHOWN = (UserWarning, RuntimeWarning)
_DEALT_WITH = (
    *("tie_word_embeddings", "no longer tied", "already merged", "CUDA extension", "speed up", "layer type"),
    "_pattern keys did not match",  # PEFT adds some where it converts an adapter to a newer transformers
)
"""Parts of PEFT's warnings of ties, which are checked here, and of what changes no result."""


def merge_and_unload(part: nn.Module, label: str) -> nn.Module:
    """Copy a module, and merge its adapters into the weights.

    Args:
        part: the module.
        label: names it in messages.

    Returns:
        A copy without adapters, which computes what ``part`` does. Where it has to, it is no longer tied.

    Raises:
        MergeError: if an adapter cannot be merged.
    """
    if "peft" not in sys.modules:
        return copy_with_tensors(part)
    from peft import PeftModel

    if unfit := [p for p in part.modules() if isinstance(p, PeftModel) and not hasattr(p.base_model, "unload")]:
        kind = adapter_kind(unfit[0].active_peft_config)
        raise MergeError([f"{label}: {kind} changes what a model computes, not its weights: there is nothing to merge"])
    try:
        part = copy_with_tensors(part)
    except RuntimeError as error:  # adapters that PEFT ties hold tensors that cannot be copied
        raise MergeError(
            [f"{label}: cannot be copied ({reason(error)}); write it with save_pretrained, and give the folder"]
        ) from error
    return unload(part, label) if adapter_layers(part) else part


def unload(part: nn.Module, label: str) -> nn.Module:
    """Merge the adapters of a module into the weights.

    Args:
        part: changed in place.
        label: names it in messages.

    Returns:
        The module without adapters; that in a PeftModel, if it is one.

    Raises:
        MergeError: if an adapter cannot be merged, or not exactly.
    """
    from peft import PeftModel

    fold = Fold(part, label)
    try:
        with torch.no_grad(), peft_warnings(label):
            if isinstance(part, PeftModel):
                part = part.merge_and_unload()
            else:
                _unload(part)
    except Exception as error:
        raise MergeError([f"{label}: its adapter cannot be merged into the weights ({reason(error)})"]) from error
    fold.finish()
    return part


@contextmanager
def peft_warnings(label: str) -> Iterator[None]:
    """Show what PEFT warns of as a :class:`MergeWarning`, each text once, without what is of no interest here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    texts = dict.fromkeys(" ".join(str(w.message).split()) for w in caught if issubclass(w.category, _SHOWN))
    for text in texts:
        if not any(known in text for known in _DEALT_WITH):
            warnings.warn(f"{label}: PEFT warns: {text}", MergeWarning, stacklevel=4)


def _unload(module: nn.Module) -> None:
    """Merge PeftModels in a module, and adapters that transformers' own `add_adapter` has made."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    done: list[str] = []
    for name, part in list(module.named_modules()):
        if any(name.startswith(f"{outer}.") for outer in done):
            continue
        if isinstance(part, PeftModel):
            instead = part.merge_and_unload()
        elif hasattr(part, "unload_and_optionally_merge_module"):
            instead = part.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
        elif isinstance(part, BaseTunerLayer):
            for inner in adapter_layers(module.get_submodule(name)).values():  # one for each adapted parameter
                inner.merge()
            instead = part.get_base_layer()
        else:
            continue
        module.set_submodule(name, instead)
        done.append(name)


def merge_adapter(module: nn.Module, label: str) -> None:
    """Merge LoRA adapters into the weights in place, and leave the adapters' layers where they are.

    The second factor of each adapter becomes zero, and names and shapes stay as they are. So a checkpoint of the module
    can still be loaded by its class, and then computes the same as the module did with its adapters.

    Args:
        module: changed in place; nothing happens to a module without adapters.
        label: names it in messages.

    Raises:
        MergeError: for adapters of other kinds (DoRA, IA³, ...), which cannot be merged in place, and for those that
            are disabled or partly merged.
    """
    layers = adapter_layers(module)
    if not layers:
        return
    from peft.tuners.lora import LoraLayer

    plain_lora = {n: p for n, p in layers.items() if isinstance(p, LoraLayer) and not p.lora_variant}
    if others := {name: layer for name, layer in layers.items() if name not in plain_lora}:
        types = sorted({adapter_type(layer) for layer in others.values()})
        raise MergeError(
            [
                f"{label}: adapters other than plain LoRA cannot be merged in place: {', '.join(types)} at "
                f"{some(list(others), most=2)}. Call merge_and_unload() on the PeftModel of every expert and of the "
                "model, and give the modules"
            ]
        )
    fold = Fold(module, label)
    with torch.no_grad():
        for layer in plain_lora.values():
            if names := [a for a in layer.active_adapters if a in layer.scaling and a not in layer.merged_adapters]:
                layer.merge(adapter_names=names)
            # Of inactive adapters too: the class of the module may make one of them the active one.
            for factor in (*layer.lora_B.values(), *layer.lora_embedding_B.values()):
                for tensor in factor.parameters() if isinstance(factor, nn.Module) else (factor,):
                    tensor.zero_()
    fold.finish()


def adapter_problems(modules: Mapping[str, nn.Module]) -> list[str]:
    """Say which modules have adapters where others have none: the names of their parameters then differ.

    Args:
        modules: name for messages -> module.

    Returns:
        One sentence for each such difference.
    """
    adapted = {label: set(adapter_layers(module)) for label, module in modules.items()}
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
    for layer_name, layer in adapter_layers(module).items():
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            prefix = f"{layer_name}.{attribute}" if layer_name else attribute
            value = getattr(layer, attribute, None)
            if isinstance(value, nn.Module):
                names |= {f"{prefix}.{name}" for name, _ in (*value.named_parameters(), *value.named_buffers())}
    return names


def adapter_kind(config: Any) -> str:
    """The type in a configuration of PEFT, such as ``LORA``."""
    return str(getattr(config.peft_type, "value", config.peft_type))
