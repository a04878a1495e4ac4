"""What has arrived at a layer: which tensors, and the statistics of them."""

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
        sums: for each task. They are empty once they have become :attr:`means`.
        unpaired: calls whose rows could not be matched with those of the expert.
        uncorrected: calls where the drift of the residual stream is to be repaired and is not known.
        masked: names of tasks whose padding masks apply.
        bad: batches that are not in the statistics because they cannot be counted.
        factor: of the sum of the Gram matrices, once it is known.
    """

    sums: list[InputSums]
    unpaired: int = 0
    uncorrected: int = 0
    masked: set[str] = field(default_factory=set)
    bad: list[BadBatch] = field(default_factory=list)
    factor: Factor | None = None
    _means: list[InputMeans] = field(default_factory=list)

    def means(self, weights: Sequence[Tensor]) -> list[InputMeans]:
        """Return the sums of each task divided by its number of rows.

        Args:
            weights: of each expert, ``(g, o, k)``.
        """
        if not self._means:
            self._means = [sums.to_means(weight) for sums, weight in zip(self.sums, weights)]
        return self._means


@dataclass
class SeenInputs:
    """Which tensors have arrived at a layer, so that another layer with the very same ones is noticed.

    Attributes:
        layer: the first layer with these inputs.
        key: what the types of two layers must agree on. ``None``: they cannot share statistics.
        tensors: each input, and its version.
        exact: whether batches had to be left out, so that each of the others is gathered in float64.
    """

    layer: str
    key: Hashable
    tensors: Mapping[ForwardId, tuple[weakref.ref[Tensor], int]]
    exact: bool = False

    @staticmethod
    def of(layer: Layer, calls: Sequence[PausedCall]) -> SeenInputs:
        """The inputs that wait at a layer."""
        return SeenInputs(layer.name, layer.key, _versions(calls))

    def are_seen_again(self, layer: Layer, calls: Sequence[PausedCall]) -> bool:
        """Whether all forwards arrive with the same tensor as before, unchanged, and the layer makes the same rows."""
        if self.key is None or self.key != layer.key:
            return False
        now = _versions(calls)
        return (
            len(now) == len(calls)
            and now.keys() == self.tensors.keys()
            and all(self.tensors[key][0]() is tensor() for key, (tensor, _) in now.items())
            and all(self.tensors[key][1] == version for key, (_, version) in now.items())
        )

    def forget(self, batches: Collection[BatchId]) -> None:
        """Batches that were left out do not arrive again."""
        if batches:
            self.tensors = {key: seen for key, seen in self.tensors.items() if key.batch not in batches}
            self.exact = True


def _versions(calls: Sequence[PausedCall]) -> dict[ForwardId, tuple[weakref.ref[Tensor], int]]:
    return {
        forward_id(call): (weakref.ref(call.input), private_torch.version(call.input))
        for call in calls
        if isinstance(call.input, Tensor) and not call.input.is_inference()
    }
