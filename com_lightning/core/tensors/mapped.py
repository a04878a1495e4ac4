"""Tensors in mapped files: the system writes their pages to the disk and drops them when it needs room."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor


def mapped_copy(tensor: Tensor, folder: str | None = None) -> Tensor:
    """Return a copy of a tensor in a mapped file.

    Args:
        tensor: the values, on any device. The copy is on the CPU.
        folder: as for :func:`mapped_empty`.

    Returns:
        The copy, which is no parameter.

    Raises:
        OSError: if the disk has no room for it.

    Example::

        >>> copy = mapped_copy(torch.ones(2, 3))
        >>> copy += 1
        >>> copy.tolist(), copy.is_shared()
        ([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]], True)
    """
    return mapped_empty(tensor.shape, tensor.dtype, folder).copy_(tensor.detach())


def mapped_empty(shape: Sequence[int], dtype: torch.dtype, folder: str | None = None) -> Tensor:
    """Return a tensor in a mapped file, to be written to. The system writes it to the disk as it sees fit.

    The file has no name, so it is gone when the last tensor on it is, even if the process is killed. (Windows keeps the
    name until the system cleans its temporary folder.)

    Args:
        shape: of the tensor.
        dtype: its precision.
        folder: where the file is; by default the system's temporary folder, which ``TMPDIR`` names.

    Returns:
        The tensor, on the CPU. One without elements has no file.

    Raises:
        OSError: if the disk has no room for it.
    """
    count = math.prod(shape)
    if not count:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    file, path = tempfile.mkstemp(prefix="com_lightning-", dir=folder)
    try:
        size = count * dtype.itemsize
        try:
            # Without this, a full disk would end the process with a signal when a page is written.
            os.posix_fallocate(file, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(file, size)
        except OSError as error:
            error.add_note(
                f"while making room for {size / 2**20:,.0f} MiB in {os.path.dirname(path)}; the environment variable "
                "TMPDIR can name another folder"
            )
            raise
        mapped = torch.from_file(path, shared=True, size=count, dtype=dtype)
    finally:
        os.close(file)
        if os.name == "posix":
            os.unlink(path)
    return mapped.view(tuple(shape))
