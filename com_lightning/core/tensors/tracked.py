"""Parameters that tell when a function uses them.

A layer that is a module is found by a hook on the module. But a weight may go into a function without its module being
called (torchvision's Swin, Mamba), or belong to no layer at all (a position table, a layer scale, the stacked experts
of a mixture). A :class:`Tracked` parameter is a tensor subclass on the same storage: PyTorch hands it every function
that it enters, and so do the views of it that the forward takes (a slice, a transpose).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.attention import multi_head_attention_forward

# Functions that pick, repeat or rearrange the elements of their first argument.
_SELECTIONS = {
    *(
        "__getitem__",
        "select",
        "narrow",
        "index_select",
        "chunk",
        "split",
        "split_with_sizes",
        "tensor_split",
        "unbind",
    ),
    *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand", "broadcast_to", "repeat"),
    *("t", "T", "mT", "transpose", "swapaxes", "permute", "movedim", "contiguous", "clone", "detach", "data"),
    *("expand_as", "view_as", "reshape_as"),
}
_LIKE = {"expand_as": "expand", "view_as": "view", "reshape_as": "reshape"}
# Those that may give an element several times.
_REPEATS = {"expand", "broadcast_to", "repeat", "index_select"}
# Functions that may change the precision or device of their first argument, and nothing else.
_CASTS = {"to", "type", "float", "double", "half", "bfloat16", "type_as", "cpu", "cuda"}
# Functions whose result does not depend on the values of a tensor.
_INDIFFERENT = {
    *("type_as", "to", "expand_as", "view_as", "reshape_as", "requires_grad_", "register_hook", "is_floating_point"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "is_complex", "result_type", "can_cast"),
    *("__set__", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
}


Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None]
"""A function, its further arguments and, where it returns several tensors, which of them."""


@dataclass(frozen=True, eq=False)
class Part:
    """What a forward has picked of a parameter: its name, and the functions that were applied to it."""

    name: str
    steps: tuple[Step, ...] = ()

    @property
    def selects_once(self) -> bool:
        """Whether no element was picked twice, or by data: no repetition, and no lookup by indices."""
        return not any(_repeats(step) for step in self.steps)

    def split(self) -> tuple[Part, Part]:
        """A part that is picked by numbers alone (``stack[3]``), and what was then picked of it (``[:length]``)."""
        stem = max((n + 1 for n, step in enumerate(self.steps) if _numbered(step)), default=0)
        if not Part(self.name, self.steps[:stem]).selects_once:
            stem = 0
        return Part(self.name, self.steps[:stem]), Part(self.name, self.steps[stem:])

    def of(self, whole: Tensor, casts: bool = False) -> Tensor:
        """The same part of another tensor of the parameter's shape, in that one's precision or as it was cast."""
        return self._replayed(whole, casts)

    def positions(self, whole: Tensor) -> Tensor:
        """Which element of the flattened parameter each element of the part is."""
        rows, row = len(whole) if whole.dim() else 1, whole[:1].numel() if whole.dim() else 1
        tail = whole.shape[1:]
        # By row and column, so that no list of all elements is made for the few that are looked up in a table.
        row_of = torch.arange(rows, device=whole.device).view(-1, *[1] * len(tail)).expand(rows, *tail)
        column_of = torch.arange(row, device=whole.device).view(1, *tail).expand(rows, *tail)
        if not tail:
            row_of, column_of = row_of.view(whole.shape), column_of.view(whole.shape)
        first, second = self._replayed(row_of, casts=False), self._replayed(column_of, casts=False)
        return first * row + second

    def extent(self, whole: Tensor) -> tuple[int, int]:
        """First and last element of the flattened parameter that the part may hold."""
        part = self.of(whole)
        if not part.numel():
            return 0, whole.numel() - 1
        if not _same_storage(part, whole) or not whole.is_contiguous():
            positions = self.positions(whole)
            return int(positions.min()), int(positions.max())
        start = int(part.storage_offset() - whole.storage_offset())
        return start, start + sum(int(size - 1) * int(stride) for size, stride in zip(part.shape, part.stride()))

    def write(self, whole: Tensor, value: Tensor) -> None:
        """Put the values of this part into a parameter."""
        part = self.of(whole)
        if _same_storage(part, whole):
            part.copy_(value)
        else:
            at = torch.unravel_index(self.positions(whole).flatten(), whole.shape)
            whole[at] = value.flatten().to(whole.dtype)

    def _replayed(self, tensor: Tensor, casts: bool) -> Tensor:
        for function, args, kwargs, pick in self.steps:
            if casts or name_of(function) not in _CASTS:
                result = function(tensor, *args, **kwargs)
                tensor = result if pick is None else result[pick]
        return tensor


@dataclass(eq=False)
class WriteCount:
    """How often a parameter has been written to. (Not ``Tensor._version``, which autograd goes by.)"""

    count: int = 0


class Tracked(Tensor):
    """A parameter, or a part of one, that calls ``on_use(function, args, kwargs)`` before a function uses its values.

    Attributes:
        part: what of which parameter it is.
        writes: of the parameter.
        version: number of writes when this was copied from it; ``None``: it is a view of it.
        target: device and precision that it is brought to whenever a function uses its values, and that it claims to
            be in; ``None``: those that it is in.
        on_use: called before the function is; it may pause the forward.
    """

    part: Part
    writes: WriteCount
    version: int | None
    target: tuple[torch.device, torch.dtype] | None
    on_use: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Callable[[Any], Any] | None]
    _own: int

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        part: Part,
        on_use: Any,
        writes: WriteCount,
        version: int | None = None,
        target: tuple[torch.device, torch.dtype] | None = None,
    ) -> Tracked:
        """``tensor`` as a watched one, on the same storage."""
        watched = private_torch.make_subclass(cls, tensor.detach())
        watched.part, watched.on_use, watched.writes, watched.version = part, on_use, writes, version
        watched.target = target
        watched._own = private_torch.version(tensor)
        watched._is_param = not part.steps  # what isinstance(..., nn.Parameter) asks for
        return watched

    def refresh(self, whole: Tensor) -> None:
        """Copy anew from the parameter, if that has been written to since, and this copy has not."""
        if self.version is not None and self.version != self.writes.count and self._own == private_torch.version(self):
            untracked(self).copy_(self.part.of(whole, casts=True))
            self.version, self._own = self.writes.count, private_torch.version(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = untracked(self).clone()
        memo[id(self)] = copied = nn.Parameter(copied, requires_grad=False) if self._is_param else copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return untracked(self).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        if func is F.multi_head_attention_forward and not (
            args[13] if len(args) > 13 else kwargs.get("training", True)
        ):
            return multi_head_attention_forward(*args, **kwargs)  # made of functions that are layers
        first = args[0] if args and isinstance(args[0], Tracked) else None
        picks = first is not None and name in _SELECTIONS | _CASTS and next(tracked_in(args[1:], kwargs), None) is None
        leaving = None
        if not picks and not name.startswith("__get ") and name not in _INDIFFERENT:
            watched = next(tracked_in(args, kwargs), None)
            leaving = None if watched is None else watched.on_use(func, args, kwargs)
        if first is not None and first.target and name in _PLACES:
            return _PLACES[name](*first.target)
        # What is cast has the precision that it claims to be in: float32 of bfloat16 has its digits.
        casts = picks and name in _CASTS
        if casts or (not picks and not name.startswith(("__get ", "__set", "requires_grad_", "register_hook"))):
            args, kwargs = materialized(args), materialized(kwargs)
        with private_torch.no_subclass_torch_function():
            result = func(*args, **kwargs)
        if picks and first is not None:
            return _picked(first, func, args[1:], kwargs, result, None if casts else first.target)
        replaced = None if leaving is None else leaving(result)
        return result if replaced is None else replaced


_PLACES: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "__get device": lambda device, dtype: device,
    "__get dtype": lambda device, dtype: dtype,
    "__get is_cuda": lambda device, dtype: device.type == "cuda",
    "__get is_cpu": lambda device, dtype: device.type == "cpu",
    "get_device": lambda device, dtype: -1 if device.type == "cpu" else device.index,
}


def materialized(value: Any) -> Any:
    """Arguments of a function with watched tensors where they claim to be."""
    if isinstance(value, Tracked):
        return untracked(value) if value.target is None else untracked(value).to(*value.target)
    if isinstance(value, (list, tuple)) and any(True for _ in tracked_in(value)):
        parts = [materialized(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: materialized(part) for name, part in value.items()}
    return value


def name_of(function: Any) -> str:
    """``"linear"`` for ``torch.nn.functional.linear``, ``"T"`` for the attribute, ``"__get shape"`` for a plain one."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        attribute: str = function.__self__.__name__
        return attribute if attribute in _SELECTIONS else f"__get {attribute}"
    return str(name)


def untracked(value: Any) -> Any:
    """A watched tensor as an ordinary one; anything else as it is."""
    if not isinstance(value, Tracked):
        return value
    with private_torch.no_subclass_torch_function():
        return torch.ops.aten.alias.default(value)


def tracked_in(*values: Any) -> Iterator[Tracked]:
    """All watched tensors among arguments, also within lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Tracked):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tracked_in(*value)
        elif isinstance(value, dict):
            yield from tracked_in(*value.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a function's result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def _picked(
    first: Tracked,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    target: tuple[torch.device, torch.dtype] | None,
) -> Any:
    """The result of a selection, watched on."""
    name = name_of(func)
    if name in _LIKE:  # the shape of another tensor, which is not to be kept alive for it
        func, args, kwargs = getattr(Tensor, _LIKE[name]), (tuple(result.shape),), {}

    def watched(tensor: Tensor, pick: int | None) -> Tracked:
        part = Part(first.part.name, (*first.part.steps, (func, args, kwargs, pick)))
        version = first.version
        if version is None and not _same_storage(tensor, untracked(first)):
            version = first.writes.count
        return Tracked.of(tensor, part, first.on_use, first.writes, version, target)

    if isinstance(result, Tensor):
        return watched(result, None)
    if isinstance(result, (tuple, list)):
        return type(result)(watched(tensor, pick) for pick, tensor in enumerate(result))
    return result


def _repeats(step: Step) -> bool:
    function, args, _, _ = step
    name = name_of(function)
    if name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return any(not isinstance(part, (int, slice, type(None), type(Ellipsis))) for part in index)
    return name in _REPEATS


def _numbered(step: Step) -> bool:
    function, args, _, pick = step
    if name_of(function) == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return any(isinstance(part, int) for part in index)
    return pick is not None or name_of(function) == "select"


def _same_storage(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
