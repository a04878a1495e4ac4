"""Small copies of calibration batches, with fewer samples and positions, for any format of a batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from com_lightning.core.sweep.task import Cut
from com_lightning.data.steps import Batch

USERS = "calibration_mask"
"""Name of the mask that the user's module gives."""
IGNORED = -100
"""Label of positions that do not count."""


def smaller_batches(batches: Sequence[Batch]) -> Iterator[tuple[Cut, Cut]]:
    """Give pairs of small copies of a batch, to show which layers have the positions of which mask.

    Tensors of a batch whose first two dimensions are those of a mask are shortened together, and all tensors with one
    entry for each sample. It is not known what a module takes, so there are several pairs: the labels may have
    positions of their own or those of the input, and positions or samples may have to stay as they are. The last pairs
    show less than the first.

    Args:
        batches: the calibration batches of a task.

    Yields:
        Two copies whose numbers of samples and positions differ, with as little padding as the batch allows.
    """
    batch = max(batches, key=_usefulness)
    has_labels = any(path and path[-1] == "labels" and tensor.dim() == 2 for path, tensor in tensors_in(batch.content))
    labels_are_own = [True, False] if has_labels else [False]
    done: list[Any] = []
    for samples, positions in ((True, True), (True, False), (False, True)):
        for own in labels_are_own:
            axes = _axes(batch, own)
            pair = _pair(batch, axes, samples, positions)
            if pair is not None and (sizes := [(cut.samples, cut.positions) for cut in pair]) not in done:
                done.append(sizes)
                yield pair


def tensors_in(content: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """Give the tensors in a batch, with the keys or numbers that lead to them."""
    if isinstance(content, Tensor):
        yield path, content
        return
    entries: Iterator[tuple[Any, Any]] = iter(())
    if isinstance(content, Mapping):
        entries = iter(content.items())
    elif isinstance(content, (list, tuple)):
        entries = iter(enumerate(content))
    elif dataclasses.is_dataclass(content):
        entries = ((field.name, getattr(content, field.name)) for field in dataclasses.fields(content))
    for key, value in entries:
        yield from tensors_in(value, (*path, str(key)))


@dataclasses.dataclass
class _Axis:
    """Positions that several tensors of a batch have in common.

    Attributes:
        size: how many.
        mask: ``(samples, positions)``, ``True`` at data; ``None``: it is not known.
        tensors: ``id`` of each tensor -> the dimension that holds the positions.
    """

    size: int
    mask: Tensor | None
    tensors: dict[int, int] = dataclasses.field(default_factory=dict)


def _axes(batch: Batch, labels_are_own: bool) -> dict[str, _Axis]:
    """Name of each mask -> its positions. Those of a decoder that has no mask are named after its inputs or labels."""
    axes = {
        name: _Axis(padding.mask.shape[1], padding.mask)
        for name, padding in batch.masks.items()
        if padding.mask.dim() == 2 and (labels_are_own or _key(name) != "labels")
    }
    found = [(".".join(path), tensor) for path, tensor in tensors_in(batch.content) if tensor.dim() > 1]
    for name, tensor in found:
        has_axis = any(_is_decoders(other, labels_are_own) and _shares(other, name) for other in axes)
        if _is_decoders(name, labels_are_own) and tensor.dim() == 2 and not has_axis:
            axes[name] = _Axis(tensor.shape[1], None)
    samples = _samples(batch)
    for name, tensor in found:
        fitting = [
            other
            for other, axis in axes.items()
            if _is_decoders(other, labels_are_own) == _is_decoders(name, labels_are_own)
            and {samples, axis.size} == set(tensor.shape[:2])
        ]
        shared = [other for other in fitting if _shares(other, name)]
        for other in shared or (fitting if len(fitting) == 1 else []):
            axes[other].tensors[id(tensor)] = 1 if tensor.shape[1] == axes[other].size else 0
    return axes


def _pair(batch: Batch, axes: Mapping[str, _Axis], cuts_samples: bool, cuts_positions: bool) -> tuple[Cut, Cut] | None:
    """Two small copies; ``None`` if neither samples nor positions can be cut."""
    samples = _samples(batch)
    everything = list(range(samples))
    masks = {
        name: torch.ones(samples, axis.size, dtype=torch.bool) if axis.mask is None else axis.mask.cpu()
        for name, axis in axes.items()
    }
    rows, columns = (everything, everything), dict[str, tuple[Tensor, Tensor]]()
    if cuts_samples and samples > 2:
        order = _shortest_first(list(masks.values()))
        choices = [([*order[:2], third], order[:2]) for third in order[2:]]
        # Two copies of other lengths, both without positions that are padding everywhere, are best: a model may cut
        # such positions off.
        rows = next((choice for choice in choices if _sizes(masks.values(), choice) is not None), choices[0])
    if cuts_positions:
        cut = [name for name, axis in axes.items() if axis.tensors and axis.size > 1]
        taken = {(len(rows[0]), len(rows[1]))}
        for name in cut:
            columns[name] = _columns(masks[name], rows, taken)
            taken.add((len(columns[name][0]), len(columns[name][1])))
    if not columns and len(rows[0]) == len(rows[1]):
        return None
    first, second = (
        Cut(
            _cut(batch, axes, torch.tensor(numbers), {name: pair[number] for name, pair in columns.items()}),
            len(numbers),
            {name: len(columns[name][number]) if name in columns else axis.size for name, axis in axes.items()},
        )
        for number, numbers in enumerate(rows)
    )
    return first, second


def _sizes(masks: Iterable[Tensor], rows: Sequence[Sequence[int]]) -> list[tuple[int, int]] | None:
    """The numbers of positions with data in each of two sets of samples; ``None`` if they cannot be told apart."""
    sizes = [(int(mask[rows[0]].any(0).sum()), int(mask[rows[1]].any(0).sum())) for mask in masks]
    pairs = [(len(rows[0]), len(rows[1])), *sizes]
    return sizes if len(set(pairs)) == len(pairs) and all(0 < two < one for one, two in pairs) else None


def _columns(mask: Tensor, rows: Sequence[Sequence[int]], taken: set[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The positions to keep in each copy: those with data, and one more or fewer until their numbers differ."""
    reached = [mask[list(numbers)].any(0) for numbers in rows]
    sizes = [max(int(entry.sum()), 1) for entry in reached]
    while sizes[0] == sizes[1] or (sizes[0], sizes[1]) in taken:
        if sizes[0] < mask.shape[1]:
            sizes[0] += 1
        elif sizes[1] > 1:
            sizes[1] -= 1
        else:
            break
    first, second = (
        torch.sort(torch.argsort((~entry).int(), stable=True)[:size])[0] for entry, size in zip(reached, sizes)
    )
    return first, second


def _cut(batch: Batch, axes: Mapping[str, _Axis], rows: Tensor, columns: Mapping[str, Tensor]) -> Batch:
    """A copy of a batch with these samples, and these positions of each mask."""
    samples = _samples(batch)

    def smaller(tensor: Tensor) -> Tensor:
        sample_dim = 0
        for name, axis in axes.items():
            if id(tensor) in axis.tensors:
                sample_dim = 1 - axis.tensors[id(tensor)]
                if name in columns:
                    return _select(_select(tensor, 1 - sample_dim, columns[name]), sample_dim, rows)
        return _select(tensor, sample_dim, rows) if tensor.dim() and tensor.shape[sample_dim] == samples else tensor

    return Batch(apply_to_collection(batch.content, Tensor, smaller), batch.dataloader_idx, {})


def _select(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    return tensor.index_select(dim, index.to(tensor.device))


def _shortest_first(masks: Sequence[Tensor]) -> list[int]:
    """The numbers of all samples. Those without data come last."""
    lengths = torch.stack([mask.sum(1) for mask in masks])
    has_data = (lengths > 0).all(0)
    order: list[int] = torch.argsort(lengths.sum(0) + (~has_data) * int(lengths.sum() + 1), stable=True).tolist()
    return order


def _usefulness(batch: Batch) -> tuple[int, int, int]:
    """A batch shows most if it has all masks, at least three samples, and samples of different lengths."""
    masks = [padding.mask for padding in batch.masks.values() if padding.mask.dim() == 2]
    return (
        len(masks),
        min(len(masks[0]), 3) if masks else 0,
        int(len(set(masks[0].sum(1).tolist())) > 1 if masks else 0),
    )


def _samples(batch: Batch) -> int:
    return next((len(padding.mask) for padding in batch.masks.values() if padding.mask.dim() == 2), 0)


def _key(name: str) -> str:
    return name.rpartition(".")[2]


def _shares(mask: str, name: str) -> bool:
    """Whether a tensor lies in the same dictionary as what a mask was made from, or in one within it."""
    return mask == USERS or name.startswith(mask[: len(mask) - len(_key(mask))])


def _is_decoders(name: str, labels_are_own: bool) -> bool:
    key = _key(name)
    return key.startswith("decoder_") or (key == "labels" and labels_are_own)
