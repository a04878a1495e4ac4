"""ESM: the directions in which each task shifts a layer's outputs, made orthogonal to those of the other tasks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.fit import Fit
from com_lightning.core.chain.inputs import LayerInputs
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import average
from com_lightning.methods.base import MergeJob, MergingMethod
from com_lightning.methods.parameterwise import scale_problems

EVENNESS = 0.15
"""Directions count by this power of their eigenvalues."""


class ESM(MergingMethod):
    """ESM: leading directions of each task's output shift, made orthogonal to those of the others, and put together.

    Li et al., "Essential Subspace Merging for Multi-Task Learning", arXiv 2606.19164, section III, and "Model Merging
    in the Essential Subspace", arXiv 2602.20208. We had the abstracts and the authors' code. In expert i, with inputs
    ``X`` and task matrix ``τ_i`` of shape ``(o, f)``, the outputs have shifted by ``X τ_iᵀ``. The ``o / T`` leading
    eigenvectors ``U_i`` of ``τ_i XᵀX τ_iᵀ`` span the essential subspace, and ``V_i = U_iᵀ τ_i``. Both are multiplied
    by ``(λ / mean λ)^0.15`` for eigenvalues ``λ``, divided by the mean of these factors. All ``U_i`` and all ``V_i``
    are put side by side. With the singular value decomposition ``U = P S Qᵀ``, ``U' = mean(S) P Qᵀ``, and ``V'``
    likewise. The merged task matrix is ``U' V'``.

    With ``polarize``, what is large is made larger. ``V_i`` is multiplied by ``(‖τ_i‖ / mean_j ‖τ_j‖)²``, and each
    column of all ``V_i`` by the square of its relative norm. Each merged task matrix is multiplied by the square of its
    norm, relative to matrices of the same shape whose names differ in numbers alone. The authors' code for ViT does
    all of this, and that for RoBERTa only the last.

    As in the paper, a single expert or identical experts do not come back unchanged, and what is no matrix is averaged.
    We depart from the code in four ways. Attention's q, k and v are three matrices; its output is treated like others
    (the code for ViT merges it as :class:`~com_lightning.TSVM` does). Convolutions without groups are matrices, too.
    Directions in which a task shifts no output are left out; the code fills them in arbitrarily. The code for ViT
    doubles merged task matrices before a common factor of all is chosen on validation data; for us, that is ``scale``.

    32 unlabelled samples of each task are enough in the paper: ``MergeDataModule(..., num_samples=32)``.

    Args:
        scale: factor of the merged task vector, also of what is averaged. The paper chooses it on held-out data.
        polarize: make large tasks, columns and layers larger.
        importance: task -> its weight, relative to the others. The default is uniform. It multiplies ``V_i``.
    """

    needs = frozenset({"data", "base"})
    separable = False
    options: ChainOptions

    def __init__(self, scale: float = 1.0, polarize: bool = True, importance: dict[str, float] | None = None) -> None:
        super().__init__(importance)
        self.scale, self.polarize = scale, polarize
        self.options = ChainOptions("expert", "merged", normalize=False, anchor="base", joint=False)

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        importance = self.weights([task.name for task in job.tasks])
        records = merge_layers(job.tasks, job.merged, importance, self.options, job.context, job.base, solve=self.solve)
        assert job.base is not None, "it is in `needs`"
        solved = {name for record in records for name in record.parameters}
        rescale(job.merged, job.base, self.scale, solved if self.polarize else set())
        return records

    def solve(self, layer: Layer, inputs: LayerInputs, importance: Sequence[float]) -> Fit | str:
        """Solve a layer by the equations above, but for the factors of whole layers.

        Args:
            layer: the layer. Its ``anchor`` is the base.
            inputs: its statistics in the experts. The sums become means.
            importance: one weight per task, summing to one.

        Returns:
            The solution. If the layer is no matrix, the reason why it is averaged.
        """
        assert layer.anchor is not None, "it is in `needs`"
        means, base = inputs.means(layer.weights), layer.layer_type.to_matrix(layer.anchor, layer.merged)
        groups, outputs, size = base.shape[0], base.shape[1], base.shape[2] - layer.layer_type.has_bias(layer.merged)
        counted = [number for number, share in enumerate(importance) if share > 0]
        if groups > 1 or outputs < len(counted):
            return "ESM averages " + (
                "what is not one matrix" if groups > 1 else "matrices with fewer outputs than there are tasks"
            )
        grams = [means[number].gram[0, :size, :size] for number in counted]
        vectors = [(layer.weights[n] - base)[0, :, :size].to(gram.dtype) for n, gram in zip(counted, grams)]
        shares = [importance[number] * len(counted) for number in counted]
        vector = merged_vector(vectors, grams, shares, self.polarize)
        weight = average(layer.weights, importance).double()
        weight[0, :, :size] = base[0, :, :size].double() + vector.double()
        reached = torch.stack([gram.trace() for gram in grams]).sum()[None]
        return Fit(weight, 0, importance=importance, reached=reached, informed=reached)

    def problems(self, tasks: Sequence[str]) -> list[str]:
        return super().problems(tasks) + scale_problems(self.scale)


def merged_vector(
    vectors: Sequence[Tensor], grams: Sequence[Tensor], shares: Sequence[float], polarize: bool = True
) -> Tensor:
    """Merge the task matrices of one layer.

    Args:
        vectors: of each task, ``(o, f)``.
        grams: mean of ``x xᵀ`` over the inputs of each expert, ``(f, f)``.
        shares: importance of each task, 1 where all count alike.
        polarize: make large tasks and columns larger.

    Returns:
        The merged task matrix, ``(o, f)``. It is 0 if no task shifts an output.

    Example: two tasks that shift different outputs.

        >>> vectors = [torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 2.0]])]
        >>> merged_vector(vectors, [torch.eye(2)] * 2, [1.0, 1.0]).round(decimals=4)
        tensor([[2., 0.],
                [0., 2.]])
    """
    sizes = torch.stack([vector.norm() for vector in vectors])
    lefts, rights = [], []
    for vector, gram, share, size in zip(vectors, grams, shares, sizes):
        values, directions = torch.linalg.eigh(vector @ gram @ vector.T)
        values, directions = values.flip(0)[: len(vector) // len(vectors)], directions.flip(1)
        values = values[values > torch.finfo(values.dtype).eps * len(vector) * values[:1]]
        if not len(values):
            continue
        factors = (values / values.mean()) ** EVENNESS
        factors /= factors.mean()
        left = directions[:, : len(values)]
        lefts.append(left * factors)
        rights.append((left.T @ vector) * factors[:, None] * share * ((size / sizes.mean()) ** 2 if polarize else 1.0))
    if not lefts:
        return torch.zeros_like(vectors[0])
    right = torch.cat(rights)
    if polarize:
        columns = right.norm(dim=0)
        right = right * (columns / columns.mean()) ** 2
    return _evened(torch.cat(lefts, 1)) @ _evened(right)


def _evened(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values replaced by their mean."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left @ right) * values.mean()  # type: ignore[no-any-return]


@torch.no_grad()
def rescale(merged: Mapping[str, Tensor], base: Mapping[str, Tensor], scale: float, polarized: set[str]) -> None:
    """Multiply merged task vectors, in place.

    Args:
        merged: name of each shared parameter or buffer -> its merged value. Buffers stay as they are.
        base: the same names -> value in the base.
        scale: factor of all.
        polarized: names of parameters of which the matrices are multiplied by the square of their relative norm, too.
    """
    parameters = {
        id(tensor): name for name, tensor in reversed(list(merged.items())) if isinstance(tensor, nn.Parameter)
    }
    matrices = {id(merged[name]) for name in polarized if merged[name].dim() > 1}

    def vector(name: str) -> Tensor:
        return merged[name].double() - base[name].to(merged[name].device).double()

    alike: dict[tuple[str, torch.Size], dict[str, float]] = defaultdict(dict)
    for key, name in parameters.items():
        if key in matrices:
            role = re.sub(r"(?<![^.])\d+(?![^.])", "#", name)
            alike[role, merged[name].shape][name] = float(vector(name).norm())
    factors = dict.fromkeys(parameters.values(), scale)
    for norms in alike.values():
        mean = sum(norms.values()) / len(norms)
        for name, norm in norms.items():
            factors[name] *= (norm / mean) ** 2 if mean else 1.0
    for name, factor in factors.items():
        if factor != 1.0:
            merged[name].add_((factor - 1.0) * vector(name))
