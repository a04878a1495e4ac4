"""FeatCal: another rule's result, calibrated layer by layer towards the experts' features."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.fit import Fit
from com_lightning.core.chain.inputs import LayerInputs
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers.embedding import Embedding
from com_lightning.core.layers.normalization import PerChannel
from com_lightning.core.solve.ridge import factorize, solve_or_average
from com_lightning.core.solve.statistics import InputMeans
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.errors import MergeError
from com_lightning.methods.base import MergeJob, MergingMethod
from com_lightning.methods.refitted import Refitted
from com_lightning.methods.task_vectors import TaskArithmetic


class FeatCal(MergingMethod):
    """FeatCal: the result of another rule, whose features are calibrated layer by layer in closed form.

    Gu et al., "FeatCal: Feature Calibration for Post-Merging Models", arXiv 2605.13030, section 4 and appendices F to
    H. We had the paper's abstract and the authors' code. ``x̂`` is the layer's input in the model calibrated so far,
    ``x`` its input in expert i, and ``x_T = α x + (1 − α) x̂``. With ``A_i = mean x̂ x̂ᵀ`` and ``s_i = 1 / ‖A_i‖_F``,

    - a matrix becomes ``W = argmin Σ_i s_i mean ‖W x̂ − W_i x_T‖² + λ ‖W − W_anchor‖²``,
    - a bias then ``b = (Σ_i s_i (b_i + W_i mean x_T − W mean x̂) + λ b_anchor) / (Σ_i s_i + λ)``,
    - scale and offset of a normalisation minimise ``Σ_i mean ‖γ ẑ + β − γ_i ẑ − β_i‖² + λ ‖(γ, β) − anchor‖²``, with
      ``ẑ`` the normalised input in the model calibrated so far.

    The anchor is ``θ_base + ρ (θ_merged − θ_base)``, where ``θ_merged`` is the other rule's result. Embedding tables,
    and what has no closed form or no data, stay as the other rule merges them.

    We depart from this in four ways. The authors take statistics once for each transformer block, so that layers within
    a block see inputs from before the block was calibrated. We know no blocks: each layer sees inputs from all earlier
    layers as they are calibrated. The authors calibrate linear layers and LayerNorm within blocks; we calibrate every
    layer of these kinds, convolutions, and other normalisations. The code for CLIP lets all tokens but the class token
    count 0.01 in most layers of the last block; we let all count alike. A task without data at a layer does not count.

    Args:
        method: the rule whose result is calibrated. It must not merge by layers. Its importance counts.
        ridge: ``λ``. It is absolute, since ``‖A_i‖_F`` is divided by; other rules' ridges are relative.
        expert_share: ``α``, between 0 (one-sided) and 1 (the expert's input as the target's, as in
            :class:`ChainOfMerges`). 0.25 in the authors' code, 0.3 in the paper.
        extrapolation: ``ρ``; 1 is the other rule's result itself. 2.2 in the authors' code, 2 in the paper.

    Raises:
        MergeError: if ``method`` is no rule.
    """

    needs = frozenset({"data", "base"})
    separable = False
    options: ChainOptions

    def __init__(
        self,
        method: MergingMethod | None = None,
        ridge: float = 0.05,
        expert_share: float = 0.25,
        extrapolation: float = 2.2,
    ) -> None:
        self.method = TaskArithmetic() if method is None else method
        if not isinstance(self.method, MergingMethod):
            raise MergeError([f"method: must be a rule, got {method!r}"])
        super().__init__(self.method.importance)
        self.ridge, self.expert_share, self.extrapolation = ridge, expert_share, extrapolation
        self.needs = type(self).needs | self.method.needs
        self.starts_from_average = self.method.starts_from_average
        self.options = ChainOptions("merged", "expert", normalize=False, ridge=ridge, anchor="rule")

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        records = self.method.merge(job)
        importance = self.weights([task.name for task in job.tasks])
        assert job.base is not None, "it is in `needs`"
        anchor = {name: self._anchor(tensor, job.base[name]) for name, tensor in job.merged.items()}
        return (
            merge_layers(job.tasks, job.merged, importance, self.options, job.context, anchor, solve=self.solve)
            + records
        )

    def solve(self, layer: Layer, inputs: LayerInputs, importance: Sequence[float]) -> Fit | str:
        """Solve a layer by the equations above.

        Args:
            layer: the layer. Its ``anchor`` is that above, and ``merged`` the result of the other rule.
            inputs: its statistics. The sums become means.
            importance: one weight per task, summing to one.

        Returns:
            The solution. For an embedding table, the reason why it stays as it is.
        """
        if isinstance(layer.layer_type, Embedding):
            return f"FeatCal leaves embedding tables as {type(self.method).__name__} merges them"
        assert layer.anchor is not None, "it is given to merge_layers"
        means, shares = inputs.means(layer.weights), [share * len(importance) for share in importance]
        anchor, before = (layer.layer_type.to_matrix(part, layer.merged) for part in (layer.anchor, layer.merged))
        is_norm, has_bias = isinstance(layer.layer_type, PerChannel), layer.layer_type.has_bias(layer.merged)
        size = anchor.shape[-1] - int(has_bias and not is_norm)
        grams = [entry.gram[..., :size, :size] for entry in means]
        if not is_norm:
            shares = [_divided(share, float(gram.double().norm())) for share, gram in zip(shares, grams)]
        diagonal = sum(share * gram.diagonal(dim1=-2, dim2=-1).double() for share, gram in zip(shares, grams))
        assert isinstance(diagonal, Tensor)
        scale = float(diagonal.mean())
        if inputs.factor is None:
            inputs.factor = factorize(grams, shares, _divided(self.ridge, scale))
        drifts = [None if is_norm else self._drift(entry, weight) for entry, weight in zip(means, layer.weights)]
        solution = solve_or_average(
            inputs.factor,
            grams,
            [None if drift is None else drift[..., :size] for drift in drifts],
            [weight[..., :size] for weight in layer.weights],
            shares,
            anchor[..., :size],
        )
        weight, reached = solution.weight, diagonal.sum(-1)
        if has_bias and not is_norm:
            weight = torch.cat([weight, self._bias(weight, means, drifts, layer.weights, shares, anchor)], -1)
        weight = torch.where((reached > 0)[:, None, None], weight, before.to(weight.dtype))
        return Fit(weight, solution.groups_kept_average, importance=importance, reached=reached, informed=reached)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        problems = [f"method: {problem}" for problem in self.method.problems(tasks)]
        if self.method.options or isinstance(self.method, Refitted):
            problems.append(
                f"method: {type(self.method).__name__} merges whole layers from data itself; give a rule that merges "
                "parameters, such as TaskArithmetic"
            )
        if not 0 < self.ridge < math.inf:
            problems.append(f"ridge: must be above 0, and finite, got {self.ridge}")
        if not 0 <= self.expert_share <= 1:
            problems.append(f"expert_share: must be between 0 and 1, got {self.expert_share}")
        if not math.isfinite(self.extrapolation):
            problems.append(f"extrapolation: must be finite, got {self.extrapolation}")
        return problems

    def _anchor(self, merged: Tensor, base: Tensor) -> Tensor:
        if not isinstance(merged, torch.nn.Parameter):  # an extrapolated variance might be negative
            return merged.detach().clone()
        return torch.lerp(base.detach().to(merged), merged.detach(), self.extrapolation)

    def _drift(self, means: InputMeans, weight: Tensor) -> Tensor | None:
        """``W_i mean (x_T − x̂) [x̂, 1]ᵀ``, ``(g, o, k)``."""
        drift = means.weighted_drift(weight)
        return None if drift is None else self.expert_share * drift

    def _bias(
        self,
        merged: Tensor,
        means: Sequence[InputMeans],
        drifts: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        shares: Sequence[float],
        anchor: Tensor,
    ) -> Tensor:
        """The bias for a solved matrix, ``(g, o, 1)``."""
        total = self.ridge * anchor[..., -1:].to(merged.dtype)
        for entry, drift, weight, share in zip(means, drifts, weights, shares):
            mean = entry.gram[..., -1:, :-1].to(merged.dtype).mT
            weight = weight.to(merged.dtype)
            total = total + share * (weight[..., -1:] + (weight[..., :-1] - merged) @ mean)
            if drift is not None:
                total = total + share * drift[..., -1:].to(merged.dtype)
        return total / (sum(shares) + self.ridge)


def _divided(number: float, by: float) -> float:
    """Their quotient; 0 where no inputs, or only zeros, make ``by`` zero."""
    return number / by if by > 0 else 0.0
