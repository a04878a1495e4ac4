"""The inputs of a layer: their statistics, and the tensors that they were computed from."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from com_lightning.core.solve.ridge import Factor
from com_lightning.core.solve.statistics import InputMeans, InputSums
from com_lightning.core.sweep.bad_batches import BadBatch
from com_lightning.core.sweep.layer import Layer, forward_id
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.task import BatchId, ForwardId
from com_lightning.core.tensors import private_torch


@dataclass
class LayerInputs:
    """Statistics of the inputs of a layer, which several layers in a row may share.

    Attributes:
        sums: the sums of each task. They are empty after :meth:`means`.
        unpaired: number of calls whose rows could not be compared with the expert's.
        permuted: how many of them have the same rows in another order.
        uncorrected: number of calls where the layer repairs a residual stream whose drift is not known.
        masked: names of tasks whose padding masks apply.
        doubtful: names of those whose masks may belong to other rows.
        bad: batches that were left out because their sums are not finite.
        factor: factor of the summed Gram matrices, once it has been computed.
    """

    sums: list[InputSums]
    unpaired: int = 0
    permuted: int = 0
    uncorrected: int = 0
    masked: set[str] = field(default_factory=set)
    doubtful: set[str] = field(default_factory=set)
    bad: list[BadBatch] = field(default_factory=list)
    factor: Factor | None = None
    _means: list[InputMeans] = field(default_factory=list)

    def means(self, weights: Sequence[Tensor]) -> list[InputMeans]:
        """Return the sums of each task divided by its number of rows, given the experts' weights ``(g, o, k)``."""
        if not self._means:
            self._means = [sums.to_means(weight) for sums, weight in zip(self.sums, weights)]
        return self._means


@dataclass
class SeenInputs:
    """The tensors that have arrived at a layer. They show whether the next layer has the same inputs.

    Attributes:
        layer: the first layer with these inputs.
        key: key of the layer, see :attr:`Layer.key <com_lightning.core.sweep.layer.Layer.key>`. Layers with these
            inputs and an equal key share statistics; with ``None``, they do not.
        tensors: each input, and its version.
        exact: whether batches had to be left out. Then all others are gathered in float64.
    """

    layer: str
    key: Hashable
    tensors: Mapping[ForwardId, tuple[weakref.ref[Tensor], int]]
    exact: bool = False

    @staticmethod
    def of(layer: Layer, calls: Sequence[PausedCall]) -> SeenInputs:
        """Return the inputs that wait at a layer."""
        return SeenInputs(layer.name, layer.key, _versions(calls))

    def are_seen_again(self, layer: Layer, calls: Sequence[PausedCall]) -> bool:
        """Whether all forwards arrive with the same tensor as before, unchanged, and the layer makes the same rows."""
        if self.key is None or self.key != layer.key:
            return False
        tensors = _versions(calls)
        return (
            len(tensors) == len(calls)
            and tensors.keys() == self.tensors.keys()
            and all(self.tensors[forward][0]() is tensor() for forward, (tensor, _) in tensors.items())
            and all(self.tensors[forward][1] == version for forward, (_, version) in tensors.items())
        )

    def forget(self, batches: Collection[BatchId]) -> None:
        """Remove batches that were left out, because they do not arrive again."""
        if batches:
            self.tensors = {forward: seen for forward, seen in self.tensors.items() if forward.batch not in batches}
            self.exact = True


def _versions(calls: Sequence[PausedCall]) -> dict[ForwardId, tuple[weakref.ref[Tensor], int]]:
    return {
        forward_id(call): (weakref.ref(call.input), private_torch.version(call.input))
        for call in calls
        if isinstance(call.input, Tensor) and not call.input.is_inference()
    }
