"""LOT Merging: each layer's task vector in closed form, on the experts' features."""

from __future__ import annotations

from com_lightning.core.chain.options import ChainOptions
from com_lightning.methods.chain import ClosedForm


class LOT(ClosedForm):
    """LOT Merging: in each layer the task vector that drifts least from the experts' on the experts' features.

    Sun et al., "Towards Minimizing Feature Drift in Model Merging: Layer-wise Task Vector Fusion for Adaptive Knowledge
    Integration", arXiv 2505.23859. We had its abstract, but not its full text, so the formulas are the idea as we
    understand it. Let ``x`` be the inputs of a layer in expert i, and ``G_i = Σ_n x_n x_nᵀ`` of shape
    ``(inputs, inputs)``.

    - A matrix ``(outputs, inputs)`` becomes ``W = W_base + (Σ_i τ_i G_i) (Σ_i G_i)⁺``, with the pseudo-inverse ``⁺``.
    - A scale becomes ``γ_base + Σ_i x²τ_i / Σ_i x²``, element by element.
    - A bias becomes ``b_base + mean_i τ_i``, which is the average.

    For matrices this is the least-squares problem of :class:`RegMean`, with three differences. Directions that no
    calibration data reach stay as in the base; with RegMean's ridge they are averaged. The Gram matrices are not
    shrunk. A bias does not influence its layer's weight. Identical experts come back where their data reach.

    We depart from this in four ways. A small ridge towards the base replaces the pseudo-inverse; directions that few
    inputs show end up between base and solution. Sums over samples are means, so that tasks count by their importance
    and not by their number of rows. Every layer that has a closed form is solved: convolutions and embedding tables are
    matrices, too. What no calibration data reach at all is averaged, as with any rule here: a row of a table, a layer
    that is not called, a parameter without a closed form.

    Args:
        importance: task -> its weight, relative to the others. The default is uniform.
        ridge: pull towards the base, relative to the mean of the diagonal of the Gram matrix.

    Raises:
        MergeError: before the merge, if the experts do not seem to be fine-tuned from the base.
    """

    needs = frozenset({"data", "base"})

    def __init__(self, importance: dict[str, float] | None = None, ridge: float = 1e-4) -> None:
        super().__init__(importance)
        self.options = ChainOptions("expert", "merged", False, ridge, anchor="base", joint=False)
