"""Finds the layers of a model that have a closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from com_lightning.core.layers.base import LayerType, stored_parameters
from com_lightning.core.layers.registry import layer_type_of
from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module


@dataclass(frozen=True)
class Candidate:
    """A layer that has a closed form.

    Attributes:
        layer_type: its type.
        module: the layer in one of the experts.
        parameters: name of each parameter in the layer -> its full name in the user's module.
        buffers: the same for the buffers that the layer type re-estimates.
    """

    layer_type: LayerType
    module: nn.Module
    parameters: dict[str, str]
    buffers: dict[str, str]

    def written(self, layer: str) -> dict[str, str]:
        """Return the tensors that a merge writes: name in the layer -> full name, if ``layer`` names the layer."""
        return {name: f"{layer}.{name}" if layer else name for name in (*self.parameters, *self.buffers)}


def candidates(module: nn.Module, shared: Collection[str]) -> dict[str, Candidate]:
    """Return name -> layer for the layers of ``module`` that have a closed form and whose tensors are all shared.

    Layers of an ``nn.MultiheadAttention`` have the names that
    :func:`~com_lightning.core.tensors.attention.split_attention` gives them.
    """
    module = copy_module(module)
    parts = split_attention(module)
    result = {}
    for name, layer in module.named_modules():
        layer_type = layer_type_of(layer)
        if layer_type is None or "parametrizations" in name.split("."):  # the inputs of a parametrisation are weights
            continue
        names = {p: f"{name}.{p}" if name else p for p in stored_parameters(layer)}
        names = {p: parts[full][0] if full in parts else full for p, full in names.items()}
        buffers = {b: f"{name}.{b}" if name else b for b in layer_type.buffers(layer)}
        if all(full in shared for full in (*names.values(), *buffers.values())):
            result[name] = Candidate(layer_type, layer, names, buffers)
    return result
