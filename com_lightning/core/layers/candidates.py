"""Which modules are layers that have a closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from com_lightning.core.layers.base import LayerType, own_parameters
from com_lightning.core.layers.registry import layer_type
from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module


@dataclass(frozen=True)
class Candidate:
    """A layer that has a closed form.

    Attributes:
        layer_type: how it is a regression.
        module: the layer, of one expert.
        parameters: own name of each parameter -> its full name in the user's module.
        buffers: the same for the buffers that its type re-estimates.
    """

    layer_type: LayerType
    module: nn.Module
    parameters: dict[str, str]
    buffers: dict[str, str]

    def written(self, layer: str) -> dict[str, str]:
        """Own name of all that is written -> its name in a module where this is the layer of that name."""
        return {own: f"{layer}.{own}" if layer else own for own in (*self.parameters, *self.buffers)}


def candidates(module: nn.Module, shared: Collection[str]) -> dict[str, Candidate]:
    """Return name -> layer, for the layers of ``module`` that have a closed form and write shared tensors only.

    Layers of an ``nn.MultiheadAttention`` have the names that
    :func:`~com_lightning.core.tensors.attention.split_attention` gives them.
    """
    module = copy_module(module)
    parts = split_attention(module)
    found = {}
    for name, layer in module.named_modules():
        kind = layer_type(layer)
        if kind is None or "parametrizations" in name.split("."):  # what is called there has weights for inputs
            continue
        own = {p: f"{name}.{p}" if name else p for p in own_parameters(layer)}
        own = {p: parts[full][0] if full in parts else full for p, full in own.items()}
        buffers = {b: f"{name}.{b}" if name else b for b in kind.buffers(layer)}
        if all(full in shared for full in (*own.values(), *buffers.values())):
            found[name] = Candidate(kind, layer, own, buffers)
    return found
