"""What is solved at each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from com_lightning.core.sweep.task import Stream

Distance = Literal["probabilities", "numbers"]
"""How predictions are compared: as probabilities, for which they are the logits, or as the numbers that they are."""


@dataclass(frozen=True)
class ChainOptions:
    """What is solved at each layer.

    Args:
        inputs: which model ``x̂`` comes from: the model merged so far (a chain), or the expert. With the expert every
            layer is merged alone (RegMean).
        target: ``"expert"`` (two-sided): distil the expert's output on the expert's own input. This also corrects the
            drift of the merged model's inputs. ``"merged"`` (one-sided): apply the expert's weight to the merged
            model's input.
        normalize: count each row by its direction, not by its size (cosine normalisation), see
            :class:`~com_lightning.core.solve.statistics.InputSums`.
        ridge: pull towards the anchor, relative to the mean of the diagonal of the Gram matrix.
        anchor: what a layer becomes where the data say nothing: the average of the experts, or the base.
        joint: solve a layer's bias together with its weight. Otherwise biases are averaged.
        residual: where a layer's output is added to a residual stream, also repair the drift of that stream (two-sided
            only), see :mod:`com_lightning.core.chain.find_residuals`.
        sensitivity: weight errors in a layer's outputs by their effect on the experts' predictions, see
            :mod:`~com_lightning.core.chain.sensitivity`. ``None``: all errors count alike.
        private_biases: each task gets biases and normalisation parameters of its own, see
            :mod:`~com_lightning.core.solve.task_biases`.
        refit_heads: solve the private layers of each task for the merged model, see
            :mod:`~com_lightning.core.chain.heads`.
        balance: give more importance, layer by layer, to tasks whose inputs have drifted more (two-sided only), see
            :func:`~com_lightning.core.chain.fit.balanced`.
    """

    inputs: Stream = "merged"
    target: Stream = "expert"
    normalize: bool = True
    ridge: float = 0.01
    anchor: Literal["average", "base"] = "average"
    joint: bool = True
    residual: bool = False
    sensitivity: Distance | None = None
    private_biases: bool = False
    refit_heads: bool = False
    balance: bool = False

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The forwards that each batch needs."""
        if self.inputs == "expert":
            return ("expert",)
        return ("merged", "expert") if self.target == "expert" else ("merged",)

    @property
    def two_sided(self) -> bool:
        """Whether inputs of the merged model are compared with those of the experts."""
        return len(self.streams) == 2
