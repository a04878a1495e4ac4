"""A hash of a value's content: an object's identity and its pickle both change from process to process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy
import torch
from torch import Tensor


def digest(value: Any) -> str:
    """Hash a value by its content.

    Args:
        value: Anything that a collate function may return: tensors, arrays, containers, objects.

    Returns:
        32 hexadecimal digits, equal for equal content in every process.
    """
    content = hashlib.blake2b(digest_size=16)
    _add(content, value)
    return content.hexdigest()


def _add(content: Any, value: Any, ancestors: tuple[int, ...] = ()) -> None:
    """Add a value to a hash. Values that contain themselves are added once."""
    if id(value) in ancestors:
        return
    ancestors = (*ancestors, id(value))
    content.update(f"<{type(value).__name__}>".encode())
    if isinstance(value, Tensor) and value.is_nested:
        _add(content, value.unbind(), ancestors)
    elif isinstance(value, Tensor):
        value = (value if value.layout is torch.strided else value.to_dense()).detach().cpu().contiguous()
        value = value.resolve_conj().resolve_neg()
        content.update(f"{value.dtype}{tuple(value.shape)}".encode())
        content.update(value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        content.update(f"{value.dtype}{value.shape}".encode())
        content.update(numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8))
    elif value is None or isinstance(value, (str, bytes, int, float, complex)):
        content.update(repr(value).encode())
    elif isinstance(value, Mapping):
        content.update(str(len(value)).encode())
        for key in value:
            _add(content, key, ancestors)
            _add(content, value[key], ancestors)
    elif isinstance(value, (list, tuple)):
        content.update(str(len(value)).encode())
        for entry in value:
            _add(content, entry, ancestors)
    elif isinstance(value, (set, frozenset)):  # their order differs from process to process
        content.update("".join(sorted(map(digest, value))).encode())
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        content.update(value.__qualname__.encode())
    else:
        try:
            # What pickle would store, but not its bytes, which depend on addresses.
            reduced = value.__reduce_ex__(2)
        except Exception:  # an object that cannot be pickled counts by its type alone
            return
        for entry in reduced if isinstance(reduced, tuple) else (reduced,):
            _add(content, list(entry) if isinstance(entry, Iterator) else entry, ancestors)
