"""Padding masks: which positions of a batch are data, and which layers a mask fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.errors import MergeError

_WHERE = "give True (or 1) where data is, by calibration_mask(batch) of your module"


def padding_mask(batch: Any, expert: nn.Module, label: str) -> Tensor | None:
    """Return the boolean mask over a batch's positions, ``True`` where data is; ``None`` if there is none.

    It is what the module's ``calibration_mask(batch)`` gives, or else the batch's ``attention_mask``.

    Args:
        batch: a calibration batch.
        expert: the module that gets the batch.
        label: names task and batch in messages.

    Raises:
        MergeError: if the mask is not a tensor of booleans or of 0 and 1, or if it leaves out every position.
    """
    origin = "its attention_mask"
    if callable(calibration_mask := getattr(expert, "calibration_mask", None)):
        origin, mask = "what calibration_mask returns", calibration_mask(batch)
        if mask is None:
            return None
    elif isinstance(batch, Mapping) and isinstance(batch.get("attention_mask"), Tensor):
        mask = batch["attention_mask"]
        if mask.dim() != 2:
            return None
    else:
        return None
    if not isinstance(mask, Tensor):
        raise MergeError([f"{label}: {origin} is a {type(mask).__name__}, not a tensor; {_WHERE}"])
    start = f"{label}: {origin}, {tuple(mask.shape)} of {mask.dtype},"
    if mask.is_floating_point() or mask.is_complex():
        raise MergeError([f"{start} may be one to be added to scores, in which 0 is data; {_WHERE}"])
    if mask.dtype != torch.bool and mask.numel() and not bool(((mask == 0) | (mask == 1)).all()):
        raise MergeError([f"{start} holds other numbers than 0 and 1; {_WHERE}"])
    if not bool(mask.any()):
        raise MergeError([f"{start} leaves out every position; {_WHERE}"])
    return mask.bool()


def unmasked(tasks: Sequence[Task], records: Sequence[LayerRecord]) -> list[str]:
    """Warn of tasks with padding that is counted as data everywhere, or in most layers that take positions."""
    warnings = []
    for task in tasks:
        masks = [mask for mask in map(task.mask, task.batches) if mask is not None and not mask.all()]
        if not masks or not records:
            continue
        start = f"task '{task.name}': its padding mask, {tuple(masks[0].shape)}, fits the inputs of"
        samples = sum(len(mask) for mask in map(task.mask, task.batches) if mask is not None)
        fitted = [record for record in records if task.name in record.masked]
        over_positions = [r for r in records if r in fitted or r.rows.get(task.name, 0) > samples]
        if not fitted:
            warnings.append(
                f"{start} no layer, so that padding counts as data; give a mask over positions, (samples, positions), "
                "by calibration_mask(batch)"
            )
        elif 2 * len(fitted) < len(over_positions):
            other = next(record.name for record in over_positions if record not in fitted)
            warnings.append(
                f"{start} {len(fitted)} of {len(over_positions)} layers that take positions, so that padding counts as "
                f"data in the others, {other} first; where the model adds positions (a class token), give a mask with "
                "them by calibration_mask(batch)"
            )
    return warnings
