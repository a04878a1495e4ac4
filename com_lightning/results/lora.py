"""Writes the difference of two models as an adapter that PEFT loads on the first of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.modules import copy_on_same_storage, named_tensors, tied_names
from com_lightning.errors import MergeError
from com_lightning.experts.state_dicts import some
from com_lightning.extras import check_installed
from com_lightning.results.model_card import adapter_card
from com_lightning.results.tables import percent

_EXACT = 1e-4
"""Relative error of a weight's difference up to which it counts as one of low rank: rounding in float32."""


@dataclass
class Adapter:
    """What an adapter consists of.

    Attributes:
        factors: name of each layer -> ``B``, ``(o, r)``, and ``A``, ``(r, k)``, whose product is added to its weight.
            ``r`` may differ from layer to layer.
        biases: name of each of these layers -> what is added to its bias; a single zero if nothing is.
        whole: names of the modules that are replaced: normalisations, heads, and layers of other types.
        left_out: names of the modules that stay those of the base, though the models differ in them. Only an
            approximation leaves some out.
        kept: share of the squared difference of all parameters and buffers that the adapter has, from 0 to 1.
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kept: float = 1.0

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(len(down) for _, down in self.factors.values())

    def numel(self, model: nn.Module) -> int:
        """The number of values, in a model that the adapter was made for."""
        factors = sum(part.numel() for parts in self.factors.values() for part in parts)
        whole = sum(t.numel() for name in self.whole for _, t, _ in named_tensors(model.get_submodule(name)))
        return factors + sum(bias.numel() for bias in self.biases.values() if bias.dim()) + whole

    def notes(self) -> list[str]:
        """What it has, and what it has not, in words."""
        biases = sum(bool(bias.dim()) for bias in self.biases.values())
        has = [f"factors of up to rank {self.rank} at {len(self.factors)} layers"]
        has += [f"biases at {biases} of them"] * bool(biases)
        notes = [f"It has {', '.join(has)}." + f" It replaces {grouped(self.whole)}." * bool(self.whole)]
        if self.left_out or self.kept < 1 - _EXACT:
            notes.append(
                f"It approximates the model: it has {percent(self.kept)} of the squared difference from the base."
                + f" These layers stay as in the base: {grouped(self.left_out)}." * bool(self.left_out)
            )
        return notes


def adapter_between(
    base: nn.Module,
    model: nn.Module,
    rank: int,
    approximate: bool = False,
    lora_only: bool = False,
    missing: Collection[str] = (),
) -> Adapter:
    """Find the adapter of a rank that turns one model into another.

    Args:
        base: the model that the adapter is for.
        model: the model that it makes, with the same modules. Shapes may differ (heads with other numbers of classes).
        rank: the largest rank of the difference of a weight. A difference of a lower rank gets that.
        approximate: whether a weight whose difference has a higher rank gets the nearest difference of this rank. If
            not, its layer is replaced as a whole. Embedding tables and tied weights are never replaced by an
            approximation: they are as large as many adapters.
        lora_only: leave out biases and modules that would be replaced as a whole, which engines do not load.
        missing: names of parameters that the base's files lack, so that each loading gives them other values.

    Returns:
        The adapter.

    Raises:
        MergeError: if the models have other modules, or PEFT cannot hold a difference.
    """
    ours = {name: tensor for name, tensor, _ in named_tensors(base)}
    theirs = {name: tensor for name, tensor, _ in named_tensors(model)}
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise MergeError([f"adapter: the models have other parameters: {some(odd)}"])
    ties = tied_names(model)
    tied = {name for name, first in ties.items() if name != first} | {f for name, f in ties.items() if name != f}
    changed = [name for name, tensor in theirs.items() if not _equal(tensor, ours[name])]
    if not changed:
        raise MergeError(["adapter: the model is equal to its base, so there is nothing to write"])
    adapter = Adapter()
    energy: dict[str, tuple[float, float]] = {}
    """Module -> the squared difference of its tensors, and that of what the adapter makes of them."""
    for place in dict.fromkeys(name.rpartition(".")[0] for name in changed):
        layer, weight = base.get_submodule(place), f"{place}.weight"
        names = [name for name in changed if name.rpartition(".")[0] == place]
        squares = {
            name: _squared(theirs[name], ours[name]) for name in names if ties[name] == name and name not in missing
        }
        within = {weight, f"{place}.bias"}.issuperset(names) and not (approximate and weight in tied)
        within = within and weight not in missing
        matrix = _matrix(layer, theirs[weight], ours[weight]) if within and _is_adaptable(layer) else None
        if matrix is not None:
            rounding = _rounding(theirs[weight], ours[weight])
            up, down, error = _factors(matrix, rank, _EXACT**2 * squares.get(weight, 0.0) + rounding)
            is_smaller = len(down) * sum(matrix.shape) < matrix.numel()
            if (approximate and is_smaller) or error <= _EXACT**2 * squares.get(weight, 0.0) + rounding:
                has_bias = f"{place}.bias" in names and not lora_only
                difference = (theirs[f"{place}.bias"] - ours[f"{place}.bias"]).detach() if has_bias else torch.zeros(())
                adapter.factors[place], adapter.biases[place] = (up, down), difference
                left = error + (squares.get(f"{place}.bias", 0.0) if lora_only else 0.0)
                energy[place] = sum(squares.values()), left
                continue
        is_table = approximate and (weight in tied or isinstance(layer, nn.Embedding))
        (adapter.left_out if lora_only or is_table else adapter.whole).append(place)
        energy[place] = sum(squares.values()), sum(squares.values()) if lora_only or is_table else 0.0
    if any(bool(bias.any()) for bias in adapter.biases.values()):  # PEFT has none beside factors of a table
        for place in [place for place in adapter.factors if isinstance(base.get_submodule(place), nn.Embedding)]:
            del adapter.factors[place], adapter.biases[place]
            (adapter.left_out if approximate else adapter.whole).append(place)
            energy[place] = energy[place][0], energy[place][0] if approximate else 0.0
    adapter.whole = [place for place in adapter.whole if not _is_inside(place, adapter.whole)]
    for place in [place for place in adapter.factors if _is_inside(place, adapter.whole)]:
        del adapter.factors[place], adapter.biases[place]
        energy[place] = energy[place][0], 0.0
    if total := sum(whole for whole, _ in energy.values()):
        adapter.kept = 1.0 - sum(left for _, left in energy.values()) / total
    _check(adapter, base, rank)
    return adapter


def _check(adapter: Adapter, base: nn.Module, rank: int) -> None:
    """Make sure that PEFT can hold an adapter."""
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


def write_adapter(adapter: Adapter, base: nn.Module, model: nn.Module, folder: Path, base_name: str = "") -> None:
    """Write an adapter as ``PeftModel.from_pretrained`` loads it on ``base``.

    Args:
        adapter: as :func:`adapter_between` finds it.
        base: the model that it is for. It is not changed.
        model: the model that it makes.
        folder: where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
        base_name: the base's folder, or its name on the Hub, for ``base_model_name_or_path``. What PEFT would write is
            where the base's configuration came from, which is another model if the base was merged.

    Raises:
        MergeError: if peft is missing.
    """
    check_installed("peft", "adapters")
    from peft import LoraConfig, get_peft_model

    has_biases = any(bool(bias.any()) for bias in adapter.biases.values())
    ranks = {place: len(down) for place, (_, down) in adapter.factors.items() if len(down) != adapter.rank}
    config = LoraConfig(  # alpha is the rank everywhere, so that the product is added as it is
        r=adapter.rank,
        lora_alpha=adapter.rank,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
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
        adapted: Any = get_peft_model(copied, config, autocast_adapter_dtype=False)
        layers = dict(adapted.base_model.model.named_modules())
        for place, (up, down) in adapter.factors.items():
            layer = layers[place]
            if isinstance(base.get_submodule(place), nn.Embedding):
                layer.lora_embedding_A["default"].copy_(down)
                layer.lora_embedding_B["default"].copy_(up)
                continue
            for factor, value in ((layer.lora_B["default"], up), (layer.lora_A["default"], down)):
                factor.weight.copy_(value.view(factor.weight.shape))
            if has_biases:
                layer.lora_B["default"].bias.copy_(adapter.biases[place])
        adapted.peft_config["default"].base_model_name_or_path = base_name or None
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    card = adapter_card(folder.name, type(base).__name__, base_name or "base", adapter.notes())
    (folder / "README.md").write_text(card, encoding="utf-8")  # PEFT's names where the configuration came from


def grouped(names: Sequence[str]) -> str:
    """Names of layers in words, with a ``*`` in place of numbers, so that the blocks of a model share one.

    Returns:
        The text.

    Example::

        >>> grouped(["layer.0.norm", "layer.1.norm", "head"])
        'layer.*.norm, head'
    """
    return some([*dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names)])


def _is_inside(place: str, places: Collection[str]) -> bool:
    return any(place.startswith(f"{outer}.") for outer in places)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))


def _is_adaptable(layer: nn.Module) -> bool:
    """Whether PEFT has a LoRA layer for it, in which a correction of its weight can be written."""
    if isinstance(layer, nn.Conv2d):
        return layer.groups == 1 and layer.padding_mode == "zeros"
    if type(layer) is nn.Embedding:
        return layer.max_norm is None  # which changes the table
    return type(layer) is nn.Linear or _is_transposed(layer)


def _is_transposed(layer: nn.Module) -> bool:
    is_conv1d = type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")
    return is_conv1d or isinstance(layer, nn.Embedding)


def _matrix(layer: nn.Module, new: Tensor, old: Tensor) -> Tensor | None:
    """The difference of two weights as a matrix ``(o, k)``, in float64; ``None`` if their shapes differ."""
    if new.shape != old.shape:
        return None
    difference = new.detach().double() - old.detach().double()
    return difference.T if _is_transposed(layer) else difference.flatten(1)


def _squared(new: Tensor, old: Tensor) -> float:
    """The squared difference of two tensors; 0 if their shapes differ."""
    return float((new.detach().double() - old.detach().double()).square().sum()) if new.shape == old.shape else 0.0


def _rounding(new: Tensor, old: Tensor) -> float:
    """The squared error of a difference of two weights that are stored in 16 bits, by rounding alone."""
    eps = torch.finfo(new.dtype).eps
    return 0.0 if eps < _EXACT else (eps / 2) ** 2 * float(new.detach().double().square().sum() * 2)


def _factors(matrix: Tensor, rank: int, tolerance: float) -> tuple[Tensor, Tensor, float]:
    """Find the nearest matrix of a rank.

    Singular vectors come from a random projection: all of a large matrix take minutes, and few of them are needed.

    Args:
        matrix: ``(o, k)``.
        rank: the largest.
        tolerance: a squared error. The first rank with at most this error is enough.

    Returns:
        ``B``, ``(o, r)``, and ``A``, ``(r, k)``, of the same size, and the squared error of their product.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        left, values, right = torch.svd_lowrank(matrix, min(rank + 8, *matrix.shape), niter=6)
    errors = float(matrix.square().sum()) - values[:rank].square().cumsum(0)
    count = next((n for n, error in enumerate(errors.tolist(), 1) if error <= tolerance), min(rank, len(values)))
    roots = values[:count].sqrt()
    up, down = left[:, :count] * roots, roots[:, None] * right.T[:count]
    return up, down, float((matrix - up @ down).square().sum())
