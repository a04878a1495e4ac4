"""A layer of a sweep, and calibration forwards."""

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
    """A calibration forward of one batch in one model. ``id`` identifies both."""

    id: ForwardId = field(kw_only=True)


def forward_id(call: PausedCall) -> ForwardId:
    """The ``id`` of the calibration forward of a paused call."""
    assert isinstance(call.forward, CalibrationForward)
    return call.forward.id


@dataclass
class Layer:
    """A layer in the merged model and in every expert. It is a module or a function call.

    Attributes:
        name: name of the module, or of the parameter that the function uses.
        layer_type: defines the layer's regression.
        merged, experts: the layer in the merged model, and in each expert.
        parts: name of each parameter and buffer that is written -> the corresponding part of the model's tensor.
        anchor: the layer in the model that solutions are pulled towards, for rules that need it.
        repairs_stream: whether its target also repairs the residual stream that its output is added to.
    """

    name: str
    layer_type: LayerType
    merged: nn.Module
    experts: list[nn.Module]
    parts: dict[str, Part]
    anchor: nn.Module | None = None
    repairs_stream: bool = False

    @cached_property
    def weights(self) -> list[Tensor]:
        """The weight of each expert, ``(g, o, k)``."""
        return [self.layer_type.to_matrix(expert, self.merged) for expert in self.experts]

    @property
    def multiplies_drift(self) -> bool:
        """Whether the drift is multiplied by the weight when statistics are gathered."""
        return self.repairs_stream or self.layer_type.multiplies_drift(self.weights[0])

    @property
    def key(self) -> Hashable:
        """Layers with the same key may share the statistics of an input. ``None``: this layer shares none."""
        return None if self.multiplies_drift else self.layer_type.key(self.merged)
