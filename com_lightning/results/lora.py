"""Writes the difference of two models as an adapter that PEFT loads on the first of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.modules import copy_module, named_tensors, writable_copy
from com_lightning.errors import MergeError
from com_lightning.experts.state_dicts import some

_EXACT = 1e-4
"""Relative error of a weight's difference up to which it counts as one of low rank: rounding in float32."""


@dataclass
class Adapter:
    """What an adapter consists of.

    Attributes:
        factors: name of each layer -> ``B``, ``(o, r)``, and ``A``, ``(r, k)``, whose product is added to its weight.
        biases: name of each of these layers -> what is added to its bias.
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
        return factors + sum(bias.numel() for bias in self.biases.values()) + whole


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
        if matrix is not None and within.issuperset(names) and rank * sum(matrix.shape) < matrix.numel():
            up, down, error = _factors(matrix, rank)
            total = float(matrix.square().sum())
            if approximate or error <= _EXACT**2 * total:
                adapter.factors[place] = up, down
                if f"{place}.bias" in theirs:
                    adapter.biases[place] = theirs[f"{place}.bias"].detach() - ours[f"{place}.bias"].detach()
                energy, left = energy + total, left + error
                continue
        adapter.whole.append(place)
    if energy:
        adapter.kept = 1.0 - left / energy
    names = [name for name, _ in base.named_modules()]
    for place in (*adapter.factors, *adapter.whole):
        if other := next((n for n in names if n != place and n.endswith(place)), None) if place else None:
            raise MergeError([f"adapter: PEFT finds modules by the end of their names, and {place} also ends {other}"])
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
    replaced = {id(tensor): writable_copy(tensor) for _, tensor, _ in named_tensors(base)}
    copied = copy_module(base, replaced)
    for place in adapter.whole:  # which may have another shape
        copied.set_submodule(place, copy_module(model.get_submodule(place)))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that a base layer has no bias
        adapted = get_peft_model(copied, config)  # type: ignore[arg-type]
        layers = dict(adapted.base_model.model.named_modules())
        for place, (up, down) in adapter.factors.items():
            layer = layers[place]
            for factor, value in ((layer.lora_B["default"], up), (layer.lora_A["default"], down)):
                factor.weight.copy_(value.view(factor.weight.shape))
            if has_biases:
                layer.lora_B["default"].bias.copy_(adapter.biases.get(place, torch.zeros(())))
        adapted.save_pretrained(str(folder), save_embedding_layers=False)


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
    """``B`` and ``A`` of the nearest matrix of a rank, and the squared error. Both factors have the same size."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    roots = values[:rank].sqrt()
    return left[:, :rank] * roots, roots[:, None] * right[:rank], float(values[rank:].square().sum())
