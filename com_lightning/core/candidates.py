"""Which modules are layers that have a closed form."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from com_lightning.core.attention import split_attention
from com_lightning.core.layers import LayerType, layer_type
from com_lightning.core.sharing import copy_module


@dataclass(frozen=True)
class Candidate:
    """A layer that has a closed form.

    Attributes:
        kind: its type.
        module: the layer, of one expert.
        parameters: own name of each parameter -> its full name in the user's module.
    """

    kind: LayerType
    module: nn.Module
    parameters: dict[str, str]


def candidates(module: nn.Module, shared: Collection[str]) -> dict[str, Candidate]:
    """Name of each layer of ``module`` that has a closed form and whose parameters are all shared.

    Layers of an ``nn.MultiheadAttention`` are named as :func:`~com_lightning.core.attention.split_attention` does.
    """
    module = copy_module(module)
    parts = split_attention(module)
    found = {}
    for name, layer in module.named_modules():
        own = {p: f"{name}.{p}" if name else p for p, value in layer._parameters.items() if value is not None}
        own = {p: parts[full][0] if full in parts else full for p, full in own.items()}
        if own and all(full in shared for full in own.values()):
            kind = layer_type(layer)
            if kind is not None:
                found[name] = Candidate(kind, layer, own)
    return found
