"""What is solved at each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from com_lightning.core.sweep.task import Stream

Distance = Literal["probabilities", "numbers"]
"""What predictions are compared by: the probabilities that they stand for as logits, or their numbers."""

HELD_OUT: Literal["held_out"] = "held_out"
Ridge = float | Literal["held_out"]
"""A number, or one that is chosen at each layer."""

Balance = Literal["mean", "worst"]
"""What is to be raised by giving more importance to tasks that have suffered more."""


@dataclass(frozen=True)
class Rule:
    """What is solved at each layer.

    Args:
        inputs: where ``x̂`` comes from: the model merged so far (a chain), or the expert, so that every layer is
            merged on its own (RegMean).
        target: ``"expert"`` distils the expert's output on the expert's own input, which also corrects the drift of the
            merged model's inputs (two-sided); ``"merged"`` applies the expert's weight to the merged model's input.
        normalize: count each row by its direction, not its size (cosine normalisation), see
            :class:`~com_lightning.core.solve.statistics.InputStatistics`.
        ridge: pull towards the anchor, relative to the mean of the diagonal of the Gram matrix; ``"held_out"``: chosen
            at each layer, see :mod:`~com_lightning.core.solve.held_out`.
        anchor: what a layer is where data do not tell: the average of the experts, or the base.
        joint: solve a layer's bias together with its weight; otherwise biases are averaged.
        residual: where a layer's output is added to a residual stream, also make up for what that stream lacks (only
            if the rule is two-sided), see :mod:`com_lightning.core.chain.find_residuals`.
        sensitivity: count errors in a layer's outputs by what they do to the experts' predictions, as
            :mod:`~com_lightning.core.chain.sensitivity` has it; ``None``: all alike.
        private_biases: each task keeps biases and normalisation parameters for itself, see
            :mod:`~com_lightning.core.solve.task_biases`.
        refit_private: solve the layers of each task that are not shared for the merged model, see
            :mod:`~com_lightning.core.chain.heads`.
        perturbed_copies: of each calibration batch, to calibrate with besides, see
            :mod:`~com_lightning.data.augmentation`.
        balance: give more importance to tasks whose inputs have drifted more, layer by layer (only if the rule is
            two-sided), see :func:`~com_lightning.core.chain.fit.balanced`.
    """

    inputs: Stream = "merged"
    target: Stream = "expert"
    normalize: bool = True
    ridge: Ridge = 0.01
    anchor: Literal["average", "base"] = "average"
    joint: bool = True
    residual: bool = False
    sensitivity: Distance | None = None
    private_biases: bool = False
    refit_private: bool = False
    perturbed_copies: int = 0
    balance: Balance | None = None

    @property
    def streams(self) -> tuple[Stream, ...]:
        """The forwards that are needed for each batch."""
        if self.inputs == "expert":
            return ("expert",)
        return ("merged", "expert") if self.target == "expert" else ("merged",)
