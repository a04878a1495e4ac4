"""Second-order statistics of the inputs of one layer, gathered for one task.

They are sums, so they can be added up over batches in any order, and over processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from com_lightning.core.solve.similarity import similarity
from com_lightning.core.tensors.matmul import (
    add_product,
    aligned_length,
    fill_upper_triangle,
    is_faster_transposed,
    outputs,
)


@dataclass
class DriftNorms:
    """Size of the drift of a layer's inputs: how far the inputs ``x̂`` of the merged model are from the expert's ``x``.

    Attributes:
        distance, energy: sums over rows of ``||x̂ - x||²`` and ``||x||²``.
        cosine: sum over rows of the cosine between ``x̂`` and ``x``.
        rows: number of rows.
    """

    distance: Tensor | float = 0.0
    energy: Tensor | float = 0.0
    cosine: Tensor | float = 0.0
    rows: int = 0

    def update(self, merged: Tensor, expert: Tensor, drift: Tensor) -> None:
        """Add rows, given the lengths ``||x̂||``, ``||x||`` and ``||x - x̂||`` of each, ``(n,)``."""
        merged, expert, drift = merged.double(), expert.double(), drift.double()
        self.distance = self.distance + drift.square().sum()
        self.energy = self.energy + expert.square().sum()
        # The law of cosines, in a form that loses no digits when rows are nearly equal.
        product = merged * expert
        one_minus_cosine = (drift.square() - (merged - expert).square()) / (2.0 * product)
        self.cosine = self.cosine + torch.where(product > 0, 1.0 - one_minus_cosine, 0.0).sum()
        self.rows += len(merged)

    def add(self, other: DriftNorms) -> None:
        """Add the sums of other rows."""
        self.distance = self.distance + other.distance
        self.energy = self.energy + other.energy
        self.cosine = self.cosine + other.cosine
        self.rows += other.rows

    def cpu(self) -> DriftNorms:
        """Return the same sums as Python numbers."""
        return DriftNorms(float(self.distance), float(self.energy), float(self.cosine), self.rows)

    @property
    def relative_distance(self) -> float:
        """``||x̂ - x|| / ||x||`` over all rows."""
        return math.sqrt(float(self.distance) / max(float(self.energy), 1e-30))

    @property
    def mean_cosine(self) -> float:
        """Mean over rows of the cosine between ``x̂`` and ``x``."""
        return float(self.cosine) / max(self.rows, 1)


@dataclass
class Moments:
    """Count, sum and sum of squares of the values of each channel, ``(channels,)`` in float64.

    Example::

        >>> moments = Moments()
        >>> moments.update(torch.tensor([[1.0], [3.0]]))
        >>> moments.mean.item(), moments.variance.item()
        (2.0, 2.0)
    """

    count: int = 0
    total: Tensor | float = 0.0
    square: Tensor | float = 0.0

    def update(self, values: Tensor) -> None:
        """Add values, ``(n, channels)``."""
        values = values.to(torch.float64)
        self.count += len(values)
        self.total = self.total + values.sum(0)
        self.square = self.square + values.square().sum(0)

    def add(self, other: Moments) -> None:
        """Add the sums of other values."""
        self.count += other.count
        self.total = self.total + other.total
        self.square = self.square + other.square

    def to(self, device: torch.device | str) -> Moments:
        """Return the same sums on another device."""
        total, square = (torch.as_tensor(value).to(device) for value in (self.total, self.square))
        return Moments(self.count, total, square)

    @property
    def mean(self) -> Tensor:
        """The mean of each channel."""
        return torch.as_tensor(self.total) / max(self.count, 1)

    @property
    def variance(self) -> Tensor:
        """The unbiased variance of each channel, as in running statistics."""
        squares = torch.as_tensor(self.square) - self.count * self.mean.square()
        return squares.clamp_min(0.0) / max(self.count - 1, 1)


class Scratch:
    """Memory that all batches of a layer reuse.

    To allocate it anew for each batch takes longer than the computations in it (measured on a CPU).
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def empty(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return a tensor of a shape, with dtype and device of ``like``. The next call with this name overwrites it."""
        buffer, size = self._buffers.get(name), math.prod(shape)
        if buffer is None or buffer.dtype != like.dtype or buffer.device != like.device or len(buffer) < size:
            buffer = self._buffers[name] = like.new_empty(size)
        return buffer[:size].view(shape)

    def clear(self) -> None:
        """Free the memory."""
        self._buffers.clear()


@dataclass
class InputSums:
    """Gram matrix and drift of the inputs of a layer with ``g`` groups of ``f`` inputs, summed for one task.

    ``x̂`` is the input in the model merged so far, ``x`` the input in the expert. With a bias, rows get a trailing 1
    (``k = f + 1``, else ``k = f``). The row weight ``s`` is 1. With ``normalize``, it is one over the larger of
    ``||x̂||²`` and ``||x||²``, bias entry included. Without rows of the expert, ``x̂`` alone counts.

    Attributes:
        bias: whether the layer has a bias.
        normalize: whether rows are normalised.
        multiplies_drift: whether the drift is multiplied by the expert's weight while it is gathered. This costs less
            if a layer has far fewer outputs than inputs, but the sums cannot be shared with another layer.
        gram: ``(g, k, k)``, ``sum s x̂ x̂ᵀ``. If it is large, its upper triangle is not filled in before
            :meth:`complete`.
        drift: ``sum s (x - x̂) x̂ᵀ``, ``(g, f, k)``. If it is multiplied, ``(g, o, k)``, with the ``offset`` of
            :meth:`update`. ``None``: there were no rows of the expert.
        rows: number of rows.
        drift_norms: size of the drift.
        moments, expert_moments: moments of the layer's inputs ``x̂`` and ``x``, for batch normalisation. In a two-sided
            merge, they leave out calls without a counterpart in the expert.
        measures_similarity: whether :attr:`unit_gram` is summed. It takes as much time and memory as :attr:`gram`.
        unit_gram: Gram matrix of the rows ``x̂`` scaled to length one in each group, without bias, ``(g, f, f)``. It is
            not summed for groups of one input, whose cosines are all 1 or -1.
        unit_rows: number of these rows in each group, ``(g,)``. Rows of zeros have no direction and do not count.
        scratch: memory in which rows are prepared. Sums of several tasks may share it.

    Sums are in float32, or in float64 if the rows are. Autocast must be off.

    Complexity: for each row, ``g f k`` multiply-adds for each of the two sums, and ``2 g o f`` instead for a drift that
    is multiplied.

    Example::

        >>> sums = InputSums(bias=False, normalize=False)
        >>> sums.update(torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]))
        >>> sums.gram
        tensor([[[10.,  2.],
                 [ 2.,  4.]]])
    """

    bias: bool
    normalize: bool
    multiplies_drift: bool = False
    gram: Tensor | None = None
    drift: Tensor | None = None
    rows: int = 0
    drift_norms: DriftNorms = field(default_factory=DriftNorms)
    moments: Moments = field(default_factory=Moments)
    expert_moments: Moments = field(default_factory=Moments)
    measures_similarity: bool = False
    unit_gram: Tensor | None = None
    unit_rows: Tensor | None = None
    scratch: Scratch = field(default_factory=Scratch)

    def update(
        self,
        merged: Tensor,
        expert: Tensor | None = None,
        weight: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        """Add rows.

        Args:
            merged: ``x̂``, ``(n, g, f)``.
            expert: ``x`` for the same rows. ``None``: nothing is added to the drift.
            weight: the expert's weight, ``(g, o, k)``. It is needed if ``multiplies_drift`` is set.
            offset: drift of a residual stream, which is added to the target, ``(n, g, o)``. It is used only if
                ``multiplies_drift`` is set.
        """
        merged = merged.to(torch.promote_types(merged.dtype, torch.float32))
        expert = None if expert is None else expert.to(merged.dtype)
        features = merged.shape[2]
        root: Tensor | None = None
        length = torch.linalg.vector_norm(merged, dim=(1, 2))
        expert_length = length if expert is None else torch.linalg.vector_norm(expert, dim=(1, 2))
        if self.normalize:
            # Each row of the regression has at most unit length, bias entry included. A row of zeros has weight zero.
            # The larger length counts: a row that is small in the merged model alone has a large target, and would
            # dominate the fit.
            square = torch.maximum(length, expert_length).square()
            norm = (square + float(self.bias)).sqrt()
            # NaN marks squares that overflow or have lost their digits. Otherwise their rows would count as zeros.
            smallest = 1e-30 if merged.dtype == torch.float32 else 0.0
            is_inexact = ~norm.isfinite() | ((square > 0) & (norm.square() < smallest))
            root = torch.where(norm > 0, 1.0 / norm, 0.0).masked_fill(is_inexact, torch.nan)
        self.rows += len(merged)
        if features == 1:
            row_weights = None if root is None else root.square()
            self.gram = _add(self.gram, _gram_of_channels(merged, row_weights, self.bias))
        else:
            scaled = self._fast_layout("rows", self._scaled(merged, root))
            self.gram = add_product(self.gram, scaled, scaled, symmetric=True)
            if self.measures_similarity:
                self._add_unit_rows(merged)
        if expert is None:
            return
        drift = torch.sub(expert, merged, out=self.scratch.empty("drift", merged, *merged.shape))
        self.drift_norms.update(length, expert_length, torch.linalg.vector_norm(drift, dim=(1, 2)))
        if self.multiplies_drift:
            assert weight is not None
            weight = weight[..., :features].to(drift.dtype)
            drift = drift * weight[..., 0] if features == 1 else outputs(drift, weight)
            if offset is not None:
                drift += offset
        if features == 1:
            self.drift = _add(self.drift, _sums_of_channels(drift, merged, row_weights, self.bias))
        else:
            drift = drift if root is None else drift.mul_(root[:, None, None])
            drift = self._fast_layout("drift rows", drift)
            self.drift = add_product(self.drift, drift, scaled)

    def add(self, gram: Tensor, drift: Tensor | None, rows: int) -> None:
        """Add sums of other rows, in the shapes of :attr:`gram` and :attr:`drift`."""
        self.gram = _add(self.gram, gram)
        if drift is not None:
            self.drift = _add(self.drift, drift)
        self.rows += rows

    def add_units(self, unit_gram: Tensor | None, unit_rows: Tensor | None) -> None:
        """Add sums of other rows, in the shapes of :attr:`unit_gram` and :attr:`unit_rows`, if there are any."""
        if unit_gram is not None and unit_rows is not None:
            self.unit_gram, self.unit_rows = _add(self.unit_gram, unit_gram), _add(self.unit_rows, unit_rows)

    def join(self, other: InputSums) -> None:
        """Add all statistics of other rows of the same layer."""
        if other.gram is not None:
            self.add(other.gram, other.drift, other.rows)
        self.add_units(other.unit_gram, other.unit_rows)
        self.drift_norms.add(other.drift_norms)
        self.moments.add(other.moments)
        self.expert_moments.add(other.expert_moments)

    def complete(self) -> Tensor | None:
        """Return ``gram`` with its upper triangle, copied from the lower one in place. More rows can still be added."""
        return None if self.gram is None else fill_upper_triangle(self.gram)

    def to_means(self, weight: Tensor) -> InputMeans:
        """Divide the sums by the number of rows, in place, because second Gram matrices may not fit in memory.

        These sums are empty afterwards.

        Args:
            weight: the expert's weight, ``(g, o, k)``. It gives the shape if no row was added.

        Returns:
            The means.
        """
        gram = self.complete()
        if gram is None:
            gram = weight.new_zeros(weight.shape[0], weight.shape[2], weight.shape[2])
        drift, count, measured = self.drift, max(self.rows, 1), None
        if self.unit_gram is not None and self.unit_rows is not None:
            measured = similarity(fill_upper_triangle(self.unit_gram), self.unit_rows)
        self.gram = self.drift = self.unit_gram = self.unit_rows = None
        gram /= count
        if drift is not None:
            drift /= count
        return InputMeans(
            gram, drift, self.multiplies_drift, self.rows, self.drift_norms, self.moments, self.expert_moments, measured
        )

    def _add_unit_rows(self, rows: Tensor) -> None:
        """Add rows ``(n, g, f)`` to the Gram matrix of rows of length one."""
        length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        unit = torch.div(rows, torch.where(length > 0, length, 1.0), out=self.scratch.empty("unit", rows, *rows.shape))
        unit = self._fast_layout("unit rows", unit)
        self.unit_gram = add_product(self.unit_gram, unit, unit, symmetric=True)
        self.unit_rows = _add(self.unit_rows, (length[..., 0] > 0).sum(0, dtype=torch.float64))

    def _scaled(self, rows: Tensor, root: Tensor | None) -> Tensor:
        """``rows * root``, or ``[rows, 1] * root`` with a bias: ``(n, g, f)`` -> ``(n, g, k)``."""
        if root is None and not self.bias:
            return rows
        n, groups, features = rows.shape
        length = features + int(self.bias)
        scaled = self.scratch.empty("scaled", rows, n, groups, aligned_length(length))[..., :length]
        if root is None:
            scaled[..., :features], scaled[..., features:] = rows, 1.0
        else:
            torch.mul(rows, root[:, None, None], out=scaled[..., :features])
            scaled[..., features:] = root[:, None, None]
        return scaled

    def _fast_layout(self, name: str, rows: Tensor) -> Tensor:
        """Rows ``(n, g, k)`` in the memory layout with the fastest products, perhaps in scratch memory of that name."""
        if not is_faster_transposed(rows):
            return rows
        n, _, numbers = rows.shape
        return self.scratch.empty(name, rows, numbers, n).copy_(rows[:, 0].T).T[:, None]


@dataclass(frozen=True)
class InputMeans:
    """The sums of :class:`InputSums` divided by the number of rows.

    Attributes:
        gram: ``G_i``, ``(g, k, k)``.
        drift: ``(g, f, k)``, or already multiplied by the expert's weight, ``(g, o, k)``.
        is_multiplied: whether the drift is multiplied.
        rows: number of rows.
        drift_norms, moments, expert_moments: as in :class:`InputSums`.
        similarity: of the rows ``x̂``, see :mod:`~com_lightning.core.solve.similarity`. ``None``: it was not measured.
    """

    gram: Tensor
    drift: Tensor | None
    is_multiplied: bool
    rows: int
    drift_norms: DriftNorms
    moments: Moments
    expert_moments: Moments
    similarity: float | None = None

    def weighted_drift(self, weight: Tensor) -> Tensor | None:
        """``D_i``: the drift multiplied by the expert's weight, ``(g, o, k)``."""
        if self.drift is None or self.is_multiplied:
            return self.drift
        features = self.drift.shape[1]
        return torch.matmul(weight[..., :features].to(self.drift.dtype), self.drift)


def _add(total: Tensor | None, sums: Tensor) -> Tensor:
    return sums if total is None else total.add_(sums)


def _gram_of_channels(rows: Tensor, weight: Tensor | None, bias: bool) -> Tensor:
    """Return Gram matrices of groups with one input: rows ``(n, g, 1)``, row weights ``(n,)`` -> ``(g, k, k)``.

    Normalisations have such groups, and matrix products are slow for them.
    """
    sums = _sums_of_channels(rows, rows, weight, bias)
    if not bias:
        return sums
    count = rows.new_tensor(float(len(rows))) if weight is None else weight.sum()
    return torch.cat([sums, torch.stack([sums[..., 1], count.expand(sums.shape[:2])], -1)], 1)


def _sums_of_channels(left: Tensor, rows: Tensor, weight: Tensor | None, bias: bool) -> Tensor:
    """``sum weight left [rows, 1]ᵀ`` for groups with one input: ``(n, g, a)``, ``(n, g, 1)`` -> ``(g, a, k)``."""
    left = left if weight is None else left * weight[:, None, None]
    sums = (left * rows).sum(0)
    return torch.stack([sums, left.sum(0)], -1) if bias else sums[..., None]
