"""One merged model and an adapter of PEFT for each task: what a merge with corrections of low rank writes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn

from com_lightning.core.tensors.modules import copy_with_tensors, named_tensors
from com_lightning.errors import MergeError
from com_lightning.experts.state_dicts import plain, some, submodule
from com_lightning.experts.tokenizers import find_tokenizer, write_tokenizer
from com_lightning.experts.transformers_models import pretrained_parts, save_model, without_adapters
from com_lightning.results.lora import adapter_between, grouped, write_adapter

BASE, BASE_CHECKPOINT = "base", "base.ckpt"
"""The folder, or the checkpoint, of the model that the tasks' adapters are for."""


@dataclass
class Corrections:
    """What a merge gives where each task has a correction of low rank.

    Attributes:
        base: the merged model without corrections, with the private parameters of the first task.
        names: names of the weights that have corrections.
        rank: of the corrections.
    """

    base: LightningModule
    names: list[str]
    rank: int


def write_corrections(
    corrections: Corrections,
    modules: Mapping[str, LightningModule],
    folder: Path,
    save: Callable[[LightningModule, Path], object],
    name: str = "",
) -> tuple[list[str], dict[Path, tuple[str, nn.Module, str]]]:
    """Write the merged model without corrections, and an adapter of PEFT for each task.

    The base is ``base``, a folder for ``from_pretrained``, if a transformers model has all weights of the module. If
    not, it is the Lightning checkpoint ``base.ckpt``, and adapters are for the whole LightningModule.

    Args:
        corrections: what the merge gives.
        modules: task -> its merged module.
        folder: where to write. Each task gets a folder.
        save: writes the checkpoint of a module.
        name: of the folder, as adapters call it; by default its path.

    Returns:
        Warnings of what is not written, or what needs care; and folder of each adapter that was written -> task, its
        module, and the name of the model in it that the adapter is for.
    """
    base = without_adapters(corrections.base)
    parts = pretrained_parts(base)
    place = next(iter(parts)) if len(parts) == 1 else ""
    if not all(plain(name).startswith(f"{place}.") for name, _, _ in named_tensors(base)):
        place = ""
    model = submodule(base, place)[1] if place else base
    others = {task: without_adapters(module) for task, module in modules.items()}
    folder.mkdir()
    told: list[str] = []
    written: dict[Path, tuple[str, nn.Module, str]] = {}
    large: dict[str, None] = {}
    if place:
        save_model(model, folder / BASE)
        sources = {task: find_tokenizer(other, submodule(other, place)[1]) for task, other in others.items()}
        told += write_tokenizer(sources, folder / BASE)
    else:
        save(corrections.base, folder / BASE_CHECKPOINT)
    base_name = f"{name or folder}/{BASE if place else BASE_CHECKPOINT}"
    shapes = {name: tensor.shape for name, tensor, _ in named_tensors(model)}
    for task, outer in others.items():
        other = submodule(outer, place)[1] if place else outer
        try:
            adapter = adapter_between(model, other, corrections.rank)
            write_adapter(adapter, model, other, folder / task, base_name)
        except MergeError as error:
            told.append(f"{folder.name}/{task} is not written: {error.problems[0]}")
            continue
        written[folder / task] = task, outer, place
        names = [plain(name).removeprefix(f"{place}.") for name in corrections.names]
        large |= dict.fromkeys(name for name in names if any(name.startswith(f"{w}.") for w in adapter.whole))
        if resized := [name for name, tensor, _ in named_tensors(other) if tensor.shape != shapes[name]]:
            told.append(
                f"{folder.name}/{task}: {some(resized)} has another shape than in the base; give the base that shape "
                "before PEFT loads the adapter"
            )
    if large:
        told.append(
            f"{folder.name}: {grouped([*large])} is in the adapters as a whole and not as factors, which PEFT does not "
            "have for it; these adapters are larger than the corrections"
        )
    return told, written


def load_on_base(base: nn.Module, folder: Path, like: nn.Module) -> nn.Module:
    """Load an adapter as a user would, and merge it into the weights, to compare them.

    Args:
        base: as its own files give it. It is changed.
        folder: of the adapter.
        like: the model that the adapter makes. Only shapes are taken from it: a module of another shape is replaced by
            one of that shape, with zeros.

    Returns:
        The model with the adapter merged.
    """
    from peft import PeftModel

    shapes = {plain(name): tensor.shape for name, tensor, _ in named_tensors(base)}
    other = [name for name, tensor, _ in named_tensors(like) if tensor.shape != shapes.get(plain(name), tensor.shape)]
    for place in dict.fromkeys(name.rpartition(".")[0] for name in other):
        resized = copy_with_tensors(like.get_submodule(place))
        for _, tensor, _ in named_tensors(resized):
            tensor.data = torch.zeros_like(tensor)
        base.set_submodule(place, resized)
    adapted: Any = PeftModel.from_pretrained(base, str(folder))
    for layer in adapted.modules():  # PEFT merges no bias into a layer without one, not even zeros
        if getattr(layer, "lora_bias", None) and getattr(layer.get_base_layer(), "bias", None) is None:
            is_zero = {name: not bool(layer.lora_B[name].bias.any()) for name, has in layer.lora_bias.items() if has}
            layer.lora_bias.update({name: False for name, zero in is_zero.items() if zero})
    merged: nn.Module = adapted.merge_and_unload()
    return merged
