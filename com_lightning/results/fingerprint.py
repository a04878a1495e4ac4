"""What a merge depends on, as short texts to compare: the same ones give the same weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import named_tensors


def fingerprint_of_experts(tasks: Sequence[Task]) -> dict[str, str]:
    """For each task: all parameters and buffers of its expert, by name, and its class."""
    return {f"expert '{task.name}'": _digest(_state(task.expert)) for task in tasks}


def fingerprint_of_base(base: Mapping[str, Tensor] | None) -> dict[str, str]:
    """All that is shared, as it is in the base; nothing where the method needs no base."""
    return {} if base is None else {"base": _digest(sorted(base.items()))}


def fingerprint_of_data(tasks: Sequence[Task]) -> list[dict[int, str]]:
    """For each task: number of each calibration batch that this process has -> its content."""
    return [dict(zip(task.batch_numbers, map(_digest, task.batches))) for task in tasks]


def combined(tasks: Sequence[Task], parts: Sequence[Sequence[Mapping[int, str]]]) -> dict[str, str]:
    """The calibration data of all processes, task by task, whichever had which."""
    result = {}
    for number, task in enumerate(tasks):
        batches = {batch: digest for part in parts for batch, digest in part[number].items()}
        result[f"calibration data of '{task.name}'"] = _digest(sorted(batches.items()))
    return result


def readable(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as they are."""
    return {n: v if isinstance(v, str) else json.dumps(v, sort_keys=True, default=str) for n, v in settings.items()}


def _state(module: nn.Module) -> list[Any]:
    return [type(module).__qualname__, *((name, tensor) for name, tensor, _ in named_tensors(module))]


def _digest(value: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    _add(digest, value)
    return digest.hexdigest()


def _add(digest: Any, value: Any, within: tuple[int, ...] = ()) -> None:
    """Content rather than identity, for whatever a collate function may return."""
    if id(value) in within:
        return
    within = (*within, id(value))
    digest.update(f"<{type(value).__name__}>".encode())
    if isinstance(value, Tensor) and value.is_nested:
        _add(digest, value.unbind(), within)
    elif isinstance(value, Tensor):
        value = (value if value.layout is torch.strided else value.to_dense()).detach().cpu().contiguous()
        value = value.resolve_conj().resolve_neg()
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    elif isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        digest.update(f"{value.dtype}{value.shape}".encode())
        digest.update(numpy.ascontiguousarray(value).reshape(-1).view(numpy.uint8))
    elif value is None or isinstance(value, (str, bytes, int, float, complex)):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        digest.update(str(len(value)).encode())
        for key in value:
            _add(digest, key, within)
            _add(digest, value[key], within)
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for part in value:
            _add(digest, part, within)
    elif isinstance(value, (set, frozenset)):  # whose order differs from process to process
        digest.update("".join(sorted(map(_digest, value))).encode())
    elif isinstance(value, (type, FunctionType, BuiltinFunctionType)):
        digest.update(value.__qualname__.encode())
    else:
        try:
            # What pickle would take, but not its bytes, which hold addresses.
            reduced = value.__reduce_ex__(2)
        except Exception:  # cannot be told apart from others of its type
            return
        for part in reduced if isinstance(reduced, tuple) else (reduced,):
            _add(digest, list(part) if isinstance(part, Iterator) else part, within)
