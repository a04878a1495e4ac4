"""LOT Merging: each layer's task vector in closed form, on the experts' own features."""

from __future__ import annotations

from com_lightning.core.chain.options import ChainOptions
from com_lightning.methods.chain import ClosedForm


class LOT(ClosedForm):
    """LOT Merging: in each layer the task vector that drifts least from the experts' on the experts' features.

    Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector Fusion for Adaptive Knowledge
    Integration", arXiv 2505.23859; its abstract was at hand, not its full text, so the formulas are the idea
    as we understand it. With ``x`` the inputs of a layer in expert i, a matrix ``(outputs, inputs)`` becomes
    ``W = W_base + (Σ_i τ_i G_i) (Σ_i G_i)⁺``, where ``G_i = Σ_n x_n x_nᵀ``, of shape ``(inputs, inputs)``,
    and ``⁺`` is the pseudo-inverse; a scale ``γ_base + Σ_i x²τ_i / Σ_i x²``, element by element; and a bias
    ``b_base + mean_i τ_i``, which is the average.

    For matrices that is :class:`RegMean`'s least squares. What differs: directions that no calibration data reach stay
    as in the base (with RegMean's ridge, as in the average), the Gram matrices are not shrunk, and a bias has no say in
    its layer's weight. Identical experts come back as far as their data reach.

    We depart from this in four ways. A small ridge towards the base stands in for the pseudo-inverse, and leaves what
    few inputs show between the two. Sums over samples are means, so that tasks count by their importance rather than by
    their number of rows; with as many rows for each it is the same. Every layer that has a closed form is solved:
    convolutions and embedding tables as the matrices that they are. What no calibration data reach at all (a row of a
    table, a layer that is not called, a parameter without a closed form) is averaged, as with any rule here.

    Args:
        importance: task -> its weight, relative to the others; uniform by default.
        ridge: pull towards the base, relative to the mean of the diagonal of the Gram matrix.

    Raises:
        MergeError: in pre-flight, if the base is not what the experts seem to be fine-tuned from.
    """

    needs = frozenset({"data", "base"})

    def __init__(self, importance: dict[str, float] | None = None, ridge: float = 1e-4) -> None:
        super().__init__(importance)
        self.options = ChainOptions("expert", "merged", False, ridge, anchor="base", joint=False)
