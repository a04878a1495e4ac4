"""Products of matrices. A merge spends most of its own computations on them."""

from __future__ import annotations

import functools
import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.tensors import private_torch

ONEDNN_MIN_SIZE = 2**25
"""Multiply-adds from which oneDNN is worth its preparations, which take a millisecond for each new shape."""


@contextmanager
def exact_products() -> Iterator[None]:
    """In this context, products are computed in full float32. TF32 and bfloat16 are too inexact for sums of squares.

    Users often allow them: on GPUs with tensor cores, Lightning advises
    ``torch.set_float32_matmul_precision("medium")``.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch before 2.9
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    settings: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before):
            setting.fp32_precision = precision


def linear(rows: Tensor, weight: Tensor) -> Tensor:
    """Return ``rows @ weight.T``, by oneDNN where that is faster. The results differ by rounding alone.

    It serves products of a merge, where autocast is off and nothing is differentiated. Forwards of the user's module
    do not use it.

    Args:
        rows: ``(*lead, f)``.
        weight: ``(o, f)``.
    """
    if _is_faster_with_onednn(rows, weight):
        return private_torch.onednn_linear(rows, weight, None)
    return F.linear(rows, weight)


def outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """The outputs of a layer without its bias: ``(n, g, f)``, ``(g, o, f)`` -> ``(n, g, o)``."""
    if len(weight) > 1:
        return torch.einsum("ngf,gof->ngo", rows, weight)
    return linear(rows, weight[0].contiguous() if _prefers_onednn() else weight[0])


def times(weight: Tensor, matrices: Tensor) -> Tensor:
    """Return ``(g, o, k)`` times ``(g, k, m)``.

    It is fastest where matrices are stored by columns, as Cholesky factors are. For symmetric matrices stored by rows,
    pass the transpose, which is the same matrix.
    """
    if matrices.shape[1] == 1:  # PyTorch's batched product is slow for the many small matrices of a table
        return weight * matrices
    return torch.matmul(weight, matrices) if len(matrices) > 1 else linear(weight[0], matrices[0].T)[None]


def add_product(total: Tensor | None, left: Tensor, right: Tensor, symmetric: bool = False) -> Tensor:
    """Return ``total + leftᵀ right`` for each group, in place: ``(n, g, a)``, ``(n, g, b)`` -> ``(g, a, b)``.

    If ``symmetric``, the part above the blocks on the diagonal is not computed, see :func:`fill_upper_triangle`.
    """
    if total is None:
        length = right.shape[2] if _is_transposed(right) else aligned_length(right.shape[2])
        total = left.new_zeros(left.shape[1], left.shape[2], length)[..., : right.shape[2]]
    if left.shape[1] > 1:
        return total.baddbmm_(left.permute(1, 2, 0), right.permute(1, 0, 2))
    for block in _blocks(left.shape[2]) if symmetric else [slice(0, right.shape[2])]:
        first = block.start if symmetric else 0
        part, transposed = total[0, first:, block], left[:, 0, first:].T
        if _is_transposed(left) and _is_transposed(right):
            part += linear(transposed, right[:, 0, block].T)
        else:
            part.addmm_(transposed, right[:, 0, block])
    return total


def fill_upper_triangle(total: Tensor) -> Tensor:
    """Copy the part of symmetric matrices ``(g, k, k)`` below the diagonal to the part above it, in place."""
    for block in _blocks(total.shape[-1]):
        total[:, block, block.stop :] = total[:, block.stop :, block].mT
    return total


def is_faster_transposed(rows: Tensor) -> bool:
    """Whether :func:`add_product` is faster if rows of one group, ``(n, 1, k)``, lie in memory as ``(k, n)``."""
    n, groups, features = rows.shape
    return groups == 1 and _is_dense_float32(rows) and n * features**2 >= ONEDNN_MIN_SIZE and _prefers_onednn()


def aligned_length(length: int) -> int:
    """Return the row stride for rows of this length. Long rows then begin at multiples of 64 bytes.

    With a bias, rows have 769 or 3073 numbers. Without alignment, their products take a third longer (measured).
    """
    return length if length < 512 else math.ceil(length / 16) * 16


def _blocks(size: int) -> Iterator[slice]:
    """Return blocks of columns of a symmetric matrix. Each block is computed from the diagonal down.

    A block is a quarter of a large matrix, and a twelfth of a very large one. That saves three eighths or eleven
    twenty-fourths of the multiplications. Smaller blocks save more of them, but take longer (measured).
    """
    step = size if size < 512 else math.ceil(size / (64 if size < 2048 else 192)) * 16
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _is_transposed(rows: Tensor) -> bool:
    return rows.shape[1] == 1 and rows[:, 0].T.is_contiguous()


def _is_faster_with_onednn(rows: Tensor, weight: Tensor) -> bool:
    return (
        rows.numel() * len(weight) >= ONEDNN_MIN_SIZE
        and _is_dense_float32(rows)
        and _is_dense_float32(weight)
        and rows.dim() > 1
        and weight.is_contiguous()  # with other weights, oneDNN takes a thousand times as long
        and _prefers_onednn()
    )


def _is_dense_float32(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary, dense tensor in float32 on a CPU."""
    is_ordinary = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return is_ordinary and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _prefers_onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    """Return whether oneDNN computes products in float32 faster than MKL, which PyTorch uses by default.

    On AMD's processors with AVX-512 it is twice as fast (measured on a fifth-generation EPYC with torch 2.15).
    """
    return (
        private_torch.has_onednn_linear()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor()
