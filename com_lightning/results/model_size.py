"""How much the merged models hold, against the experts as full models: what tasks share, and what each adds."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.modules import named_tensors, tied_names
from com_lightning.experts.settings import computed_buffers


@dataclass
class Amount:
    """Parameters and saved buffers.

    Attributes:
        values: how many.
        bytes: in the precision that they are stored in, without what formats of files add.
    """

    values: int = 0
    bytes: int = 0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.values + other.values, self.bytes + other.bytes)

    def __str__(self) -> str:
        return megabytes(self.bytes)


@dataclass
class ModelSize:
    """What a merge gives, and what it was made from.

    Attributes:
        shared: what all tasks have in common.
        tasks: task -> what it has beside: heads, biases, norms, corrections of low rank.
        experts: all experts, each as a full model.
    """

    shared: Amount = field(default_factory=Amount)
    tasks: dict[str, Amount] = field(default_factory=dict)
    experts: Amount = field(default_factory=Amount)

    @property
    def merged(self) -> Amount:
        """All of the merge."""
        return sum(self.tasks.values(), self.shared)

    @property
    def share(self) -> float | None:
        """The bytes of the merge, as a share of those of the experts."""
        return self.merged.bytes / self.experts.bytes if self.experts.bytes else None


def measure_size(
    experts: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
    precision: Mapping[str, Mapping[str, torch.dtype]],
    left_out: Collection[str] = (),
    corrected: Collection[str] = (),
    corrections: int = 0,
) -> ModelSize:
    """Count what the merged modules hold. Tied parameters count once.

    Args:
        experts: task -> its module.
        modules: task -> its merged module. Tensors that are the same object in all of them are shared.
        precision: task -> name -> dtype of tensors that are stored in another precision than the module has.
        left_out: names that do not count, such as those of adapters that were merged into their layers.
        corrected: names of the weights that have a correction of low rank for each task. What is shared is one weight.
        corrections: number of values of the corrections of one task. They are stored as the corrected weights are.

    Returns:
        The sizes.
    """
    size = ModelSize()
    held = {task: dict(_saved(module, left_out)) for task, module in modules.items()}
    first, *others = held.values()
    shared = {name for name, tensor in first.items() if all(other.get(name) is tensor for other in others)}
    for number, (task, tensors) in enumerate(held.items()):
        size.tasks[task] = Amount()
        for name, tensor in tensors.items():
            amount = _amount(tensor, precision.get(task, {}).get(name))
            if name not in shared and name not in corrected:
                size.tasks[task] += amount
            elif not number:
                size.shared += amount
        if corrections:
            weight = next(iter(corrected))
            width = _amount(tensors[weight], precision.get(task, {}).get(weight)).bytes // tensors[weight].numel()
            size.tasks[task] += Amount(corrections, corrections * width)
    for task, expert in experts.items():
        for name, tensor in _saved(expert, left_out):
            size.experts += _amount(tensor, precision.get(task, {}).get(name))
    return size


def size_rows(size: ModelSize) -> list[list[str]]:
    """A head, and rows for what is shared, what each task has, the whole, and the experts."""
    rows = [["what is stored", "values", "size", "of the experts"]]
    tasks = [*size.tasks.values()]
    least, most = (min(tasks, key=lambda t: t.bytes), max(tasks, key=lambda t: t.bytes)) if tasks else (Amount(),) * 2
    count = len(tasks)
    each = [f"{least.values:,}", str(least)]
    if least != most:
        each = [f"{least.values:,} to {most.values:,}", f"{least} to {most}"]
    whole = f"{100 * size.share:.1f} %" if size.share is not None else "-"
    return [
        *rows,
        ["shared by all tasks", f"{size.shared.values:,}", str(size.shared), ""],
        ["for each task", *each, ""],
        [f"merged, {count} tasks", f"{size.merged.values:,}", str(size.merged), whole],
        [f"{count} experts as full models", f"{size.experts.values:,}", str(size.experts), "100.0 %"],
    ]


def size_sentence(size: ModelSize) -> str:
    """The same in one line."""
    _, shared, each, merged, experts = size_rows(size)
    return (
        f"Size: {shared[2]} shared and {each[2]} for each task, in all {merged[2]}, {merged[3]} of {experts[2]} of "
        f"{len(size.tasks)} experts."
    )


def megabytes(count: float) -> str:
    """A number of bytes in megabytes, ``10**6``, with three digits; less than 0.1 MB in kB.

    Returns:
        The text.

    Example::

        >>> megabytes(1234567), megabytes(56_700), megabytes(2_345_600_000)
        ('1.23 MB', '56.7 kB', '2,346 MB')
    """
    number, unit = (count / 1e6, "MB") if count >= 1e5 else (count / 1e3, "kB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _saved(module: nn.Module, left_out: Collection[str]) -> Iterator[tuple[str, Tensor]]:
    ties, computed = tied_names(module), computed_buffers(module)
    for name, tensor, _ in named_tensors(module):
        if ties[name] == name and name not in computed and name not in left_out:
            yield name, tensor


def _amount(tensor: Tensor, dtype: torch.dtype | None) -> Amount:
    return Amount(tensor.numel(), tensor.numel() * (dtype or tensor.dtype).itemsize)
