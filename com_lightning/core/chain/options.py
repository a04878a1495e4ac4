"""The options of a chain of merges."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from com_lightning.core.sweep.task import Stream

Distance = Literal["probabilities", "numbers"]
"""How predictions are compared: as probabilities, if they are logits, or as numbers."""


@dataclass(frozen=True)
class ChainOptions:
    """What is solved at each layer.

    Args:
        inputs: the model that inputs ``x̂`` come from: the model merged so far (a chain), or the expert. With the
            expert, every layer is merged on its own (RegMean).
        target: ``"expert"`` (two-sided): the target is the expert's output on the expert's input. This also corrects
            the drift of the merged model's inputs. ``"merged"`` (one-sided): the target is the expert's weight times
            the merged model's input.
        normalize: count each row by its direction, not by its size (cosine normalisation), see
            :class:`~com_lightning.core.solve.statistics.InputSums`.
        ridge: strength of the pull towards the anchor, relative to the mean of the diagonal of the Gram matrix.
        anchor: the weight in directions that the data do not determine: the average of the experts, the base, or the
            weight that a rule gives. What no data reach at all is averaged, or is as the rule gives it.
        joint: solve a layer's bias together with its weight. Otherwise biases are averaged.
        residual: if a layer's output is added to a residual stream, also repair the drift of that stream (two-sided
            only), see :mod:`com_lightning.core.chain.find_residuals`.
        sensitivity: weight errors in a layer's outputs by their effect on the experts' predictions, see
            :mod:`~com_lightning.core.chain.sensitivity`. ``None``: all errors count alike.
        private_biases: give each task its own biases and normalisation parameters, see
            :mod:`~com_lightning.core.solve.task_biases`.
        task_rank: give each task a correction of this rank to the weight of every layer that has a matrix, and
            its own biases and normalisation parameters, see :mod:`~com_lightning.core.solve.task_adapters`. 0: none.
        task_share: give each task biases, normalisation parameters and corrections that have at most this share of the
            values of the shared parameters, with ranks by what they bring, see
            :mod:`~com_lightning.core.chain.ranks`. 0: the rank is ``task_rank`` in all layers.
        ranks: layer -> rank of its corrections, in place of ``task_rank``. Other layers have none.
        records_gains: record what each rank of a correction brings.
        keeps_shared: leave what tasks share as it is, and solve only what each task has for itself.
        refit_heads: fit the private layers of each task to the merged model, see
            :mod:`~com_lightning.core.chain.heads`.
        balance: give more importance, layer by layer, to tasks whose inputs have drifted more (two-sided only), see
            :func:`~com_lightning.core.chain.fit.balanced`.
        by_similarity: multiply the importance of tasks, layer by layer, by how similar their inputs are to each other,
            see :mod:`~com_lightning.core.solve.similarity`.
    """

    inputs: Stream = "merged"
    target: Stream = "expert"
    normalize: bool = True
    ridge: float = 0.01
    anchor: Literal["average", "base", "rule"] = "average"
    joint: bool = True
    residual: bool = False
    sensitivity: Distance | None = None
    private_biases: bool = False
    task_rank: int = 0
    task_share: float = 0.0
    ranks: Mapping[str, int] | None = None
    records_gains: bool = False
    keeps_shared: bool = False
    refit_heads: bool = False
    balance: bool = False
    by_similarity: bool = False

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The forwards that each batch needs."""
        if self.inputs == "expert":
            return ("expert",)
        return ("merged", "expert") if self.target == "expert" else ("merged",)

    def rank_of(self, layer: str) -> int:
        """The rank of the corrections of a layer."""
        return self.task_rank if self.ranks is None else self.ranks.get(layer, 0)

    @property
    def two_sided(self) -> bool:
        """Whether inputs of the merged model are compared with those of the experts."""
        return len(self.streams) == 2
