"""Writes the difference of two models as an adapter that PEFT loads on the first of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.functional import pad

from com_lightning.core.tensors.modules import copy_on_same_storage, named_tensors
from com_lightning.errors import MergeError
from com_lightning.experts.state_dicts import plain, some, submodule
from com_lightning.experts.transformers_models import pretrained_parts, save_model, without_adapters

_EXACT = 1e-4
"""Relative error of a weight's difference up to which it counts as one of low rank: rounding in float32."""


@dataclass
class Adapter:
    """What an adapter consists of.

    Attributes:
        factors: name of each layer -> ``B``, ``(o, r)``, and ``A``, ``(r, k)``, whose product is added to its weight.
        biases: name of each of these layers -> what is added to its bias; a single zero if it has none.
        whole: names of the modules that are replaced: normalisations, heads, and layers of other types.
        kept: share of the squared difference of the factored weights that the factors have, from 0 to 1.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    biases: dict[str, Tensor]
    whole: list[str]
    kept: float

    def numel(self, model: nn.Module) -> int:
        """The number of values, in a model that the adapter was made for."""
        factors = sum(part.numel() for parts in self.factors.values() for part in parts)
        whole = sum(t.numel() for name in self.whole for _, t, _ in named_tensors(model.get_submodule(name)))
        return factors + sum(bias.numel() for bias in self.biases.values() if bias.dim()) + whole


def adapter_between(base: nn.Module, model: nn.Module, rank: int, approximate: bool = False) -> Adapter:
    """Find the adapter of a rank that turns one model into another.

    Args:
        base: the model that the adapter is for.
        model: the model that it makes, with the same modules. Shapes may differ (heads with other numbers of classes).
        rank: of the difference of each weight.
        approximate: whether a weight whose difference has a higher rank gets the nearest difference of this rank. If
            not, its layer is replaced as a whole.

    Returns:
        The adapter.

    Raises:
        MergeError: if the models have other modules, or PEFT cannot hold a difference.
    """
    ours = {name: tensor for name, tensor, _ in named_tensors(base)}
    theirs = {name: tensor for name, tensor, _ in named_tensors(model)}
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise MergeError([f"adapter: the models have other parameters: {some(odd)}"])
    changed = [name for name, tensor in theirs.items() if not _equal(tensor, ours[name])]
    adapter, energy, left = Adapter({}, {}, [], 1.0), 0.0, 0.0
    for place in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        layer = base.get_submodule(place)
        names = [name for name in changed if name.rpartition(".")[0] == place]
        weight = f"{place}.weight"
        matrix = _matrix(layer, theirs[weight], ours[weight]) if _is_adaptable(layer) else None
        within = {weight, f"{place}.bias"}
        if matrix is not None and within.issuperset(names):
            up, down, error = _factors(matrix, rank)
            total = float(matrix.square().sum())
            is_smaller = rank * sum(matrix.shape) < matrix.numel()
            if (approximate and is_smaller) or error <= _EXACT**2 * total:
                adapter.factors[place] = up, down
                bias = theirs.get(f"{place}.bias")
                adapter.biases[place] = torch.zeros(()) if bias is None else (bias - ours[f"{place}.bias"]).detach()
                energy, left = energy + total, left + error
                continue
        adapter.whole.append(place)
    if energy:
        adapter.kept = 1.0 - left / energy
    adapter.whole = [place for place in adapter.whole if not _is_inside(place, adapter.whole)]
    for place in [place for place in adapter.factors if _is_inside(place, adapter.whole)]:
        del adapter.factors[place], adapter.biases[place]
    names = [name for name, _ in base.named_modules()]
    for place in (*adapter.factors, *adapter.whole):
        if other := next((n for n in names if n != place and n.endswith(place)), None) if place else None:
            raise MergeError([f"adapter: PEFT finds modules by the end of their names, and {place} also ends {other}"])
    if not adapter.factors:
        raise MergeError([f"adapter: no weight of a linear layer or convolution differs by rank {rank}"])
    if not all(adapter.whole):
        raise MergeError(
            ["adapter: a parameter belongs to the model itself and not to a module in it, which PEFT needs"]
        )
    return adapter


def write_adapter(adapter: Adapter, base: nn.Module, model: nn.Module, rank: int, folder: Path) -> None:
    """Write an adapter as ``PeftModel.from_pretrained`` loads it on ``base``.

    Args:
        adapter: as :func:`adapter_between` finds it.
        base: the model that it is for. It is not changed.
        model: the model that it makes.
        rank: of the adapter.
        folder: where to write ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        MergeError: if peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MergeError(['adapters need peft: pip install "com_lightning[lora]"']) from error
    has_biases = any(bool(bias.any()) for bias in adapter.biases.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(adapter.factors),
        modules_to_save=adapter.whole or None,
        lora_bias=has_biases,
        init_lora_weights=False,
    )
    copied = copy_on_same_storage(base)
    for place in adapter.whole:  # which may have another shape
        copied.set_submodule(place, copy_on_same_storage(model.get_submodule(place)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that a base layer has no bias
        adapted: Any = get_peft_model(copied, config)
        layers = dict(adapted.base_model.model.named_modules())
        for place, (up, down) in adapter.factors.items():
            layer = layers[place]
            for factor, value in ((layer.lora_B["default"], up), (layer.lora_A["default"], down)):
                factor.weight.copy_(value.view(factor.weight.shape))
            if has_biases:
                layer.lora_B["default"].bias.copy_(adapter.biases[place])
        adapted.save_pretrained(str(folder), save_embedding_layers=False)


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
) -> list[str]:
    """Write the merged model without corrections, and an adapter of PEFT for each task.

    The base is ``base``, a folder for ``from_pretrained``, if a transformers model has all weights of the module. If
    not, it is the Lightning checkpoint ``base.ckpt``, and adapters are for the whole LightningModule.

    Args:
        corrections: what the merge gives.
        modules: task -> its merged module.
        folder: where to write. Each task gets a folder.
        save: writes the checkpoint of a module.

    Returns:
        Warnings of what is not written, or what needs care.
    """
    base = without_adapters(corrections.base)
    parts = pretrained_parts(base)
    place = next(iter(parts)) if len(parts) == 1 else ""
    if not all(plain(name).startswith(f"{place}.") for name, _, _ in named_tensors(base)):
        place = ""
    model = submodule(base, place)[1] if place else base
    folder.mkdir()
    told = []
    if place:
        save_model(model, folder / "base")
    else:
        save(corrections.base, folder / "base.ckpt")
    shapes = {name: tensor.shape for name, tensor, _ in named_tensors(model)}
    for task, module in modules.items():
        other = without_adapters(module)
        other = submodule(other, place)[1] if place else other
        try:
            adapter = adapter_between(model, other, corrections.rank)
            write_adapter(adapter, model, other, corrections.rank, folder / task)
        except MergeError as error:
            told.append(f"{folder.name}/{task} is not written: {error.problems[0]}")
            continue
        if resized := [name for name, tensor, _ in named_tensors(other) if tensor.shape != shapes[name]]:
            told.append(
                f"{folder.name}/{task}: {some(resized)} has another shape than in the base; give the base that shape "
                "before PEFT loads the adapter"
            )
    return told


def _is_inside(place: str, places: Collection[str]) -> bool:
    return any(place.startswith(f"{outer}.") for outer in places)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _is_adaptable(layer: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for it, in which a correction of its weight can be written."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    return type(layer) is nn.Linear or _is_transposed(layer)


def _is_transposed(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _matrix(layer: nn.Module, new: Tensor, old: Tensor) -> Tensor | None:
    """The difference of two weights as a matrix ``(o, k)``, in float64; ``None`` if their shapes differ."""
    if new.shape != old.shape:
        return None
    difference = new.detach().double() - old.detach().double()
    return difference.T if _is_transposed(layer) else difference.flatten(1)


def _factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Find the nearest matrix of a rank.

    Singular vectors come from a random projection: all of a large matrix take minutes, and few of them are needed.

    Returns:
        ``B``, ``(o, r)``, and ``A``, ``(r, k)``, of the same size, and the squared error of their product.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, min(rank + 8, *matrix.shape), niter=6)
    roots = values[:rank].sqrt()
    lacking = rank - len(roots)
    up, down = pad(left[:, :rank] * roots, (0, lacking)), pad(roots[:, None] * right.T[:rank], (0, 0, 0, lacking))
    return up, down, float((matrix - up @ down).square().sum())
