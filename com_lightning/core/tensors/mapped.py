"""Tensors in mapped files: the system writes their pages to the disk and drops them when it needs room."""

from __future__ import annotations

import os
import tempfile

import torch
from torch import Tensor


def mapped_copy(tensor: Tensor, folder: str | None = None) -> Tensor:
    """Return a copy in a mapped file, which is written to the disk as the system sees fit. Writing to it is possible.

    The file has no name, so it is gone when the last tensor on it is, even if the process is killed. (Windows keeps the
    name until the system cleans its temporary folder.)

    Args:
        tensor: the values, on any device. The copy is on the CPU.
        folder: where the file is; by default the system's temporary folder, which ``TMPDIR`` names.

    Returns:
        The copy. A tensor without elements is copied to memory.

    Raises:
        OSError: if the disk has no room for it.

    Example::

        >>> copy = mapped_copy(torch.ones(2, 3))
        >>> copy += 1
        >>> copy.tolist(), copy.is_shared()
        ([[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]], True)
    """
    tensor = tensor.detach()
    size = tensor.numel() * tensor.element_size()
    if not size:
        return tensor.cpu().clone()
    file, path = tempfile.mkstemp(prefix="com_lightning-", dir=folder)
    try:
        try:
            # Without this, a full disk would end the process with a signal when a page is written.
            os.posix_fallocate(file, 0, size) if hasattr(os, "posix_fallocate") else os.truncate(file, size)
        except OSError as error:
            error.add_note(
                f"while making room for {size / 2**20:,.0f} MiB of the merged model in {os.path.dirname(path)}; the "
                "environment variable TMPDIR can name another folder"
            )
            raise
        mapped = torch.from_file(path, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    finally:
        os.close(file)
        if os.name == "posix":
            os.unlink(path)
    return mapped.view(tensor.shape).copy_(tensor)
