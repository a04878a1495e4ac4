"""Padding masks: which positions of a batch are data, and which layers a mask fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.sweep.task import LayerRecord, Padding, Task
from com_lightning.data.smaller_batches import IGNORED, USERS, tensors_in
from com_lightning.errors import MergeError

_WHERE = "give True (or 1) where data is, by calibration_mask(batch) of your module"


def padding_masks(batch: Any, expert: nn.Module, label: str) -> dict[str, Padding]:
    """Return the masks over a batch's positions, by the name of what they were made from.

    They are each ``attention_mask`` and ``decoder_attention_mask`` in the batch. Without the latter, a decoder's mask
    comes from ``labels``, where they leave out positions by -100. They may be labels of the input too, so this mask is
    not certain. What the module's ``calibration_mask(batch)`` gives replaces the masks that are no decoder's. If that
    is ``None``, there is no padding.

    Args:
        batch: a calibration batch.
        expert: the module that gets the batch.
        label: names task and batch in messages.

    Raises:
        MergeError: if a mask is not a tensor of booleans or of 0 and 1, or if it leaves out every position.
    """
    masks: dict[str, Padding] = {}
    if callable(calibration_mask := getattr(expert, "calibration_mask", None)):
        mask = calibration_mask(batch)
        if mask is None:
            return {}
        masks[USERS] = Padding(_checked(mask, "what calibration_mask returns", label))
    for path, value in tensors_in(batch):
        name, key = ".".join(path), path[-1] if path else ""
        is_mask = key == "decoder_attention_mask" or (key == "attention_mask" and USERS not in masks)
        if is_mask and value.dim() == 2:
            masks[name] = Padding(_checked(value, f"its {name}", label))
        elif key == "labels" and value.dim() == 2 and not value.is_floating_point():
            counts = value != IGNORED
            if bool(counts.any()) and not bool(counts.all()):
                masks[name] = Padding(counts, is_certain=False)
    decoders = {
        name.removesuffix("decoder_attention_mask") for name in masks if name.endswith("decoder_attention_mask")
    }
    return {name: padding for name, padding in masks.items() if name.removesuffix("labels") not in decoders}


def _checked(mask: Any, origin: str, label: str) -> Tensor:
    """A mask as a tensor of booleans."""
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


@dataclass
class PaddingCount:
    """How much padding the batches of a task have.

    Attributes:
        samples: number of samples in batches with masks.
        shape: of the first mask with padding; ``None``: there is no padding.
        is_certain: whether one of the masks with padding is certain to be about positions that layers see.
    """

    samples: int = 0
    shape: tuple[int, ...] | None = None
    is_certain: bool = False

    def add(self, other: PaddingCount) -> None:
        """Add other batches of the task."""
        self.samples += other.samples
        self.shape = self.shape or other.shape
        self.is_certain |= other.is_certain


def count_padding(tasks: Sequence[Task]) -> dict[str, PaddingCount]:
    """Return task -> the padding in its batches."""
    counts = {task.name: PaddingCount() for task in tasks}
    for task in tasks:
        for masks in map(task.masks, task.batches):
            samples = len(next(iter(masks.values())).mask) if masks else 0
            counts[task.name].add(PaddingCount(samples))
            for padding in masks.values():
                if not bool(padding.mask.all()):
                    counts[task.name].add(PaddingCount(0, tuple(padding.mask.shape), padding.is_certain))
    return counts


def describe_padding(
    counts: Sequence[Mapping[str, PaddingCount]], records: Sequence[LayerRecord], unplaced: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """Say in which layers padding was left out.

    Args:
        counts: what :func:`count_padding` gives in each process.
        records: of the merged layers, if there are any.
        unplaced: task -> why shapes alone tell where its masks belong.

    Returns:
        In which layers padding was left out, one line for all tasks for which it is the same. And warnings of tasks
        whose padding counts as data everywhere, or in most layers that take positions.
    """
    total: dict[str, PaddingCount] = {}
    for of_process in counts:
        for name, count in of_process.items():
            total.setdefault(name, PaddingCount()).add(count)
    lines, warnings = dict[str, list[str]](), list[str]()
    for name, count in total.items():
        of_task = [record for record in records if record.rows.get(name)]
        fitted = [record.name for record in of_task if name in record.masked]
        if count.shape is None or not of_task or not (count.is_certain or fitted):
            continue
        others = [record for record in of_task if record.name not in fitted]
        longer = [record.name for record in others if record.rows[name] > count.samples]
        single = [record.name for record in others if record.rows[name] == count.samples]
        parts = [f"left out in {_layers(fitted)}"]
        parts += [f"not in {_layers(longer)} with more rows than samples"] if longer else []
        parts += [f"{_layers(single)} with as many rows as samples"] if single else []
        if name in unplaced:
            parts.append(f"told by shapes alone, as a forward of a smaller batch failed ({unplaced[name]})")
        lines.setdefault("; ".join(parts), []).append(name)
        start = f"task '{name}': its padding mask, {count.shape}, fits the inputs of"
        if not fitted:
            warnings.append(
                f"{start} no layer, so that padding counts as data; give a mask over positions, (samples, positions), "
                "by calibration_mask(batch)"
            )
        elif len(fitted) < len(longer):
            warnings.append(
                f"{start} {len(fitted)} of {len(fitted) + len(longer)} layers that take positions, so that padding "
                f"counts as data in the others, {longer[0]} first; where the model adds positions (a class token), "
                "give a mask with them by calibration_mask(batch); where a decoder has padding of its own, put its "
                "decoder_attention_mask into the batch"
            )
    return [f"{', '.join(names)}: {line}" for line, names in lines.items()], warnings


def _layers(names: Sequence[str]) -> str:
    """How many layers, and the first and the last of them."""
    ends = f" ({' to '.join(dict.fromkeys((names[0], names[-1])))})" if names else ""
    return f"{len(names)} layer{'s' * (len(names) != 1)}{ends}"
