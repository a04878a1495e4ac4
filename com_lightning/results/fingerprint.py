"""Fingerprints of what a merge depends on: equal fingerprints mean that a repeated merge gives equal weights.

An unfinished merge may only go on if its experts, data and settings are still the same. Comparing them in full would
need a copy of everything, so that the journal stores a hash of each instead, see
:func:`~com_lightning.core.tensors.digest.digest`. Files are known by their size, their time and a few of their values:
to read all of them would take as long as to read all experts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.digest import digest
from com_lightning.core.tensors.modules import named_tensors


def fingerprint_of_experts(
    tasks: Sequence[Task], files: Mapping[str, Path] | None = None, exact: bool = False
) -> dict[str, str]:
    """One hash per task, of the class, hyperparameters, configurations, parameters and buffers of its expert.

    Args:
        tasks: the tasks.
        files: ``expert 'name'`` -> the file or folder that an expert was loaded from. Of these experts, a few values of
            each tensor count, and size and time of each file.
        exact: all values count, of files too, and no times.

    Returns:
        ``expert 'name'`` -> hash.
    """
    result = {}
    for label, expert in ((f"expert '{task.name}'", task.expert) for task in tasks):
        path = None if exact else (files or {}).get(label)
        content = _class_and_tensors(expert) if path is None else _class_and_tensors(expert, _few)
        result[label] = digest([*content, *(() if path is None else _stat(path))])
    return result


def sketch_of_experts(tasks: Sequence[Task]) -> dict[str, str]:
    """As :func:`fingerprint_of_experts`, but of a few values of each tensor, which is done in no time."""
    return {f"expert '{task.name}'": digest(_class_and_tensors(task.expert, _few)) for task in tasks}


def fingerprint_of_base(
    base: Mapping[str, Tensor] | None, files: Mapping[str, Path] | None = None, exact: bool = False
) -> dict[str, str]:
    """One hash of the shared tensors of the base, as :func:`fingerprint_of_experts`; none if there is no base."""
    if base is None:
        return {}
    path = None if exact else (files or {}).get("base")
    content: list[Any] = [(name, tensor if path is None else _few(tensor)) for name, tensor in sorted(base.items())]
    return {"base": digest([*content, *(() if path is None else _stat(path))])}


def fingerprint_of_data(tasks: Sequence[Task]) -> list[dict[int, str]]:
    """For each task: number of each calibration batch of this process -> its hash."""
    return [dict(zip(task.batch_numbers, map(digest, task.batches))) for task in tasks]


def combined(tasks: Sequence[Task], parts: Sequence[Sequence[Mapping[int, str]]]) -> dict[str, str]:
    """Combine the hashes of calibration data from all processes, however the batches were spread over them.

    Args:
        tasks: The tasks of the merge.
        parts: What :func:`fingerprint_of_data` returned in each process.

    Returns:
        One entry per task.
    """
    result = {}
    for number, task in enumerate(tasks):
        batches = {batch: content for part in parts for batch, content in part[number].items()}
        result[f"calibration data of '{task.name}'"] = digest(sorted(batches.items()))
    return result


def readable(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as text rather than as a hash, so that an error message can show what changed."""
    return {n: v if isinstance(v, str) else json.dumps(v, sort_keys=True, default=str) for n, v in settings.items()}


def _class_and_tensors(module: nn.Module, view: Callable[[Tensor], Any] = lambda tensor: tensor) -> list[Any]:
    """What a module computes with: its class, its tensors, and the settings that shape its outputs."""
    settings = [
        (name, {key: value for key, value in entry.items() if not isinstance(value, nn.Module)})
        for name, part in module.named_modules()
        for entry in (getattr(part, "_hparams", None), _configuration(part))
        if isinstance(entry, Mapping)
    ]
    tensors = [(name, view(tensor)) for name, tensor, _ in named_tensors(module)]
    return [type(module).__qualname__, readable({"settings": settings}), *tensors]


def _stat(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file of an expert."""
    files = sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _configuration(module: nn.Module) -> Any:
    """The configuration of a transformers model, without what depends on where it was loaded from."""
    to_dict = getattr(getattr(module, "config", None), "to_dict", None)
    if not callable(to_dict):
        return None
    return {key: value for key, value in to_dict().items() if not key.startswith("_") and "version" not in key}


def _few(tensor: Tensor) -> Any:
    """Shape, precision, and at most 64 values from all over a tensor."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return [tuple(tensor.shape), str(tensor.dtype)]
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    return [tuple(tensor.shape), flat[:: max(tensor.numel() // 64, 1)][:64].clone()]
