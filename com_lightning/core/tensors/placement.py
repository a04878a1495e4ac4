"""Copies of stored modules on the device and in the precision that their forwards run in."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module, named_tensors
from com_lightning.core.tensors.tracked import Target

Move = Callable[[nn.Module], nn.Module]
"""Moves a module to a device, converts it to a precision, or both, in place."""

Offload = Literal["experts", "layers"] | None
"""Which models stay where they are stored, and have each weight moved only while a forward uses it: the experts, or the
merged model too, so that one layer at a time is on the device. ``None``: neither."""


class Placement:
    """Makes copies of a stored module that can run. Tensors that need no conversion are shared, not copied.

    ``move`` is applied once, to a copy of the module with empty tensors. It shows the device and the precision of each
    tensor. Its other effects (metrics move their states, a LightningModule sets its device) are in every copy.

    Args:
        module: the module as it is stored: in a mapped file, on another device, in another precision. It is not
            changed.
        move: moves or converts a module so that it can run.

    Example::

        >>> placement = Placement(nn.Linear(2, 2), lambda module: module.to(torch.bfloat16))
        >>> placement.module().weight.dtype
        torch.bfloat16
    """

    def __init__(self, module: nn.Module, move: Move = lambda module: module) -> None:
        self.stored = {name: tensor for name, tensor, _ in named_tensors(module)}
        self._skeleton = move(copy_module(module, {id(t): _empty(t) for t in self.stored.values()}))
        self._slots = {name: tensor for name, tensor, _ in named_tensors(self._skeleton)}
        self._placed: dict[int, Tensor] = {}

    def place(self, name: str, tensor: Tensor | None = None) -> Tensor:
        """Return a parameter or buffer, or ``tensor`` in its place, as a forward uses it.

        If nothing has to be converted, this is the tensor itself. Otherwise it is a copy, which is made once.
        """
        tensor = self.stored[name] if tensor is None else tensor
        if id(tensor) not in self._placed:
            slot = self._slots[name]
            placed = tensor
            if (tensor.device, tensor.dtype) != (slot.device, slot.dtype):
                placed = tensor.detach().to(slot.device, slot.dtype)
                if isinstance(tensor, nn.Parameter):
                    placed = nn.Parameter(placed, requires_grad=tensor.requires_grad)
            self._placed[id(tensor)] = placed
        return self._placed[id(tensor)]

    def target(self, name: str) -> tuple[torch.device, torch.dtype]:
        """Device and precision of the tensor of that name in a forward."""
        return self._slots[name].device, self._slots[name].dtype

    def module(self, tensors: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A copy that can run. ``tensors`` (by name) replace its own. Ties are kept."""
        given = tensors or {}
        values = {name: given[name] if name in given else self.place(name) for name in self.stored}
        return copy_module(self._skeleton, {id(self._slots[name]): value for name, value in values.items()})


def _empty(tensor: Tensor) -> Tensor:
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty


@dataclass
class RunningModel:
    """A model that forwards run in. Its attention is split into linear layers.

    Attributes:
        module: the model.
        tensors: its parameters and buffers, by name.
        targets: name of an offloaded parameter -> where it is moved to when it is used.
    """

    module: nn.Module
    tensors: dict[str, Tensor]
    targets: dict[str, Target]

    @staticmethod
    def of(
        placement: Placement,
        stream: str,
        merged: Mapping[str, Tensor],
        offload: Offload,
        converted: dict[int, Tensor],
        moved: dict[Hashable, tuple[Tensor, Tensor]],
    ) -> RunningModel:
        """Return the merged model of a task, or its expert.

        Args:
            placement: placement of the expert.
            stream: ``"merged"`` or ``"expert"``.
            merged: name -> merged tensor.
            offload: which models' shared parameters stay where they are stored.
            converted: ``id`` of each merged tensor -> the tensor that it is converted to, for all tasks.
            moved: see :class:`~com_lightning.core.tensors.tracked.Target`.
        """
        shared = {name: tensor for name, tensor in merged.items() if name in placement.stored}
        values = dict(shared) if stream == "merged" else {name: placement.stored[name] for name in shared}
        stays = offload == "layers" or (offload == "experts" and stream == "expert")
        tensors: dict[str, Tensor] = {
            name: tensor
            for name, tensor in values.items()
            if stays and isinstance(tensor, nn.Parameter) and is_trackable(name, tensor)
        }
        targets = {name: Target(*placement.target(name), moved) for name in tensors}
        for name, tensor in shared.items() if stream == "merged" else ():
            if name not in tensors:
                if id(tensor) not in converted:
                    converted[id(tensor)] = placement.place(name, tensor)
                tensors[name] = converted[id(tensor)]
        module = placement.module(tensors)
        for name, (packed, _) in split_attention(module).items():
            if packed in targets:
                targets[name] = targets[packed]
        running = {name: tensor for name, tensor, _ in named_tensors(module)}
        return RunningModel(module, running, {name: target for name, target in targets.items() if name in running})


def is_trackable(name: str, tensor: Tensor) -> bool:
    """Whether a tensor can be tracked. The tensors of a parametrisation cannot: the layer that has them is solved."""
    return type(tensor) in (Tensor, nn.Parameter) and "parametrizations" not in name.split(".") and tensor.numel() > 0
