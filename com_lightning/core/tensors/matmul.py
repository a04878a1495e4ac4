"""Products of matrices, which are most of what a merge computes."""

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

WORTHWHILE = 2**25
"""Multiply-adds from which on a product is worth what oneDNN takes to prepare for one of a new shape, a millisecond."""


@contextmanager
def exact_products() -> Iterator[None]:
    """Statistics are sums of squares, for which TF32 or bfloat16 in place of float32 is not enough.

    Lightning advises ``torch.set_float32_matmul_precision("medium")`` or ``"high"`` on GPUs with tensor cores.
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


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``torch.nn.functional.linear`` up to rounding, computed by oneDNN where that is faster.

    Args:
        input: ``(*lead, f)``.
        weight: ``(o, f)``.
        bias: ``(o,)``.
    """
    if not _by_onednn(input, weight, bias):
        return F.linear(input, weight, bias)
    return private_torch.onednn_linear(input, weight, bias)


def outputs(rows: Tensor, weight: Tensor) -> Tensor:
    """What a layer makes of rows, without a bias: ``(n, g, f)``, ``(g, o, f)`` -> ``(n, g, o)``."""
    if len(weight) > 1:
        return torch.einsum("ngf,gof->ngo", rows, weight)
    return linear(rows, weight[0].contiguous() if _prefers_onednn() else weight[0])


def times(weight: Tensor, matrices: Tensor) -> Tensor:
    """Return ``(g, o, k)`` times ``(g, k, m)``.

    Fastest where matrices are stored by columns, as Cholesky factors are. Of symmetric ones stored by rows, give the
    transpose, which is the same matrix.
    """
    if matrices.shape[1] == 1:  # a batch of as many as a table has rows, for which PyTorch's own routines are slow
        return weight * matrices
    return torch.matmul(weight, matrices) if len(matrices) > 1 else linear(weight[0], matrices[0].T)[None]


def add_product(total: Tensor | None, left: Tensor, right: Tensor, symmetric: bool = False) -> Tensor:
    """Return ``total + leftᵀ right`` for each group, in place: ``(n, g, a)``, ``(n, g, b)`` -> ``(g, a, b)``.

    If it is ``symmetric``, what is above the blocks on the diagonal is left as it is, see :func:`completed`.
    """
    if total is None:
        length = right.shape[2] if _is_turned(right) else aligned(right.shape[2])
        total = left.new_zeros(left.shape[1], left.shape[2], length)[..., : right.shape[2]]
    if left.shape[1] > 1:
        return total.baddbmm_(left.permute(1, 2, 0), right.permute(1, 0, 2))
    for block in _blocks(left.shape[2]) if symmetric else [slice(0, right.shape[2])]:
        first = block.start if symmetric else 0
        part, transposed = total[0, first:, block], left[:, 0, first:].T
        if _is_turned(left) and _is_turned(right):
            part += linear(transposed, right[:, 0, block].T)
        else:
            part.addmm_(transposed, right[:, 0, block])
    return total


def completed(total: Tensor) -> Tensor:
    """Symmetric matrices ``(g, k, k)`` with what is above the diagonal as that below it, in place."""
    for block in _blocks(total.shape[-1]):
        total[:, block, block.stop :] = total[:, block.stop :, block].mT
    return total


def turns(rows: Tensor) -> bool:
    """Whether :func:`add_product` is faster with rows of one group, ``(n, 1, k)``, that lie in memory as ``(k, n)``."""
    n, groups, numbers = rows.shape
    return groups == 1 and _is_plain(rows) and n * numbers**2 >= WORTHWHILE and _prefers_onednn()


def aligned(length: int) -> int:
    """Return the distance of rows at which long rows begin at multiples of 64 bytes.

    The bias makes rows of 769 or 3073 numbers, with which products take a third longer than with 768 or 3072 (tried).
    """
    return length if length < 512 else math.ceil(length / 16) * 16


def _blocks(size: int) -> Iterator[slice]:
    """Return the columns of a symmetric matrix that are computed together, from the diagonal down.

    They are a quarter of a large matrix, and a twelfth of a very large one.

    That saves three eighths of the products, or eleven twenty-fourths. More and smaller blocks save more of them, but
    each takes longer (tried).
    """
    step = size if size < 512 else math.ceil(size / (64 if size < 2048 else 192)) * 16
    return (slice(start, min(start + step, size)) for start in range(0, size, step))


def _is_turned(rows: Tensor) -> bool:
    return rows.shape[1] == 1 and rows[:, 0].T.is_contiguous()


def _by_onednn(rows: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        rows.numel() * len(weight) >= WORTHWHILE
        and all(_is_plain(tensor) for tensor in (rows, weight, bias) if tensor is not None)
        and rows.dim() > 1
        and rows.shape[-1:] == weight.shape[1:]  # PyTorch tells what is wrong where they are not
        and (bias is None or bias.shape == weight.shape[:1])
        and weight.is_contiguous()  # oneDNN takes others, but takes a thousand times as long
        and not torch.is_autocast_enabled("cpu")
        and not private_torch.inside_transform()
        and not private_torch.inside_forward_differentiation()
        and _prefers_onednn()
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an ordinary one in float32 on a CPU, that nothing is differentiated by."""
    known = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    differentiated = tensor.requires_grad and torch.is_grad_enabled()
    return known and not differentiated and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _prefers_onednn() -> bool:
    return bool(torch.backends.mkldnn.enabled) and _onednn_is_faster()


@functools.cache
def _onednn_is_faster() -> bool:
    """Return whether oneDNN computes products in float32 faster than MKL, which PyTorch uses.

    It does on AMD's processors with AVX-512, by a factor of two (tried on an EPYC of the fifth generation, torch 2.15).
    """
    return (
        private_torch.has_onednn_linear()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and "AuthenticAMD" in _processor()
    )


def _processor() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:  # another system than Linux
        return platform.processor()
