"""A layer as a sweep meets it, and the forwards that meet there."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from com_lightning.core.layers import LayerType
from com_lightning.core.sweep.lockstep import Forward, PausedCall
from com_lightning.core.sweep.task import ForwardId
from com_lightning.core.tensors.tracked import Part


@dataclass(eq=False)
class CalibrationForward(Forward):
    """A calibration forward of one batch in one model."""

    id: ForwardId = field(kw_only=True)


def forward_id(call: PausedCall) -> ForwardId:
    """Which calibration forward has arrived."""
    assert isinstance(call.forward, CalibrationForward)
    return call.forward.id


@dataclass
class Layer:
    """A layer, be it a module or a function call, in the merged model and in every expert.

    Attributes:
        name: of the module, or of the parameter that the function uses.
        layer_type: how it is a regression.
        merged, experts: the layer in the merged model, and in each expert.
        parts: name of each of its parameters and buffers that is written -> the part of the model's tensor that it is.
        base: the layer in the model that the experts were fine-tuned from, for rules that need it.
        repairs_stream: whether its target also repairs the residual stream that its output is added to.
    """

    name: str
    layer_type: LayerType
    merged: nn.Module
    experts: list[nn.Module]
    parts: dict[str, Part]
    base: nn.Module | None = None
    repairs_stream: bool = False

    @cached_property
    def weights(self) -> list[Tensor]:
        """Weight of each expert, ``(g, o, k)``."""
        return [self.layer_type.to_matrix(expert, self.merged) for expert in self.experts]

    @property
    def multiplies_drift(self) -> bool:
        """Whether the drift is multiplied by the weight while it is gathered."""
        return self.repairs_stream or self.layer_type.multiplies_drift(self.weights[0])

    @property
    def key(self) -> Hashable:
        """Layers with one key may share the statistics of an input. ``None``: they are not shared."""
        return None if self.multiplies_drift else self.layer_type.key(self.merged)
