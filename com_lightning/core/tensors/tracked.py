"""Tracked parameters: they call back before a function uses them.

A hook finds a layer that is a module. But a function may use a weight without calling its module (torchvision's Swin,
Mamba), or the weight may belong to no layer (a position table, a layer scale, the stacked experts of a mixture). A
:class:`Tracked` parameter is a tensor subclass on the same storage. PyTorch passes it every function that it enters.
The views that a forward takes of it (a slice, a transpose) are tracked, too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.attention import multi_head_attention_forward

# Functions that select, repeat or rearrange the elements of their first argument.
_SELECTIONS = {
    *("__getitem__", "select", "narrow", "index_select", "unbind"),
    *("chunk", "split", "split_with_sizes", "tensor_split"),
    *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand", "broadcast_to", "repeat"),
    *("t", "T", "mT", "transpose", "swapaxes", "permute", "movedim", "contiguous", "clone", "detach", "data"),
    *("expand_as", "view_as", "reshape_as"),
}
_LIKE = {"expand_as": "expand", "view_as": "view", "reshape_as": "reshape"}
# Selections that may return an element several times.
_REPEATS = {"expand", "broadcast_to", "repeat", "index_select"}
# Functions that may change the precision or device of their first argument, and nothing else.
_CASTS = {"to", "type", "float", "double", "half", "bfloat16", "type_as", "cpu", "cuda"}
# Functions whose result does not depend on the values of a tensor.
_VALUE_INDEPENDENT = {
    *("type_as", "to", "expand_as", "view_as", "reshape_as", "requires_grad_", "register_hook", "is_floating_point"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "is_complex", "result_type", "can_cast"),
    *("__set__", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
}


Step = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None]
"""A function, its other arguments and, if it returns several tensors, the index of the one that was used."""


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a parameter that a forward has selected: the parameter's name, and the functions applied to it."""

    name: str
    steps: tuple[Step, ...] = ()

    @property
    def selects_once(self) -> bool:
        """Whether no element was selected twice or by data: there is no repetition and no lookup by indices."""
        return not any(_repeats(step) for step in self.steps)

    def split(self) -> tuple[Part, Part]:
        """The part that numbers select (``stack[3]``), and what was then selected of it (``[:length]``)."""
        prefix = max((n + 1 for n, step in enumerate(self.steps) if _selects_by_number(step)), default=0)
        if not Part(self.name, self.steps[:prefix]).selects_once:
            prefix = 0
        return Part(self.name, self.steps[:prefix]), Part(self.name, self.steps[prefix:])

    def of(self, parameter: Tensor, casts: bool = False) -> Tensor:
        """The same part of another tensor of the parameter's shape, in that tensor's precision or (``casts``) cast."""
        for function, args, kwargs, index in self.steps:
            if casts or name_of(function) not in _CASTS:
                result = function(parameter, *args, **kwargs)
                parameter = result if index is None else result[index]
        return parameter

    def positions(self, parameter: Tensor) -> Tensor:
        """For each element of the part, its position in the flattened parameter."""
        rows, row = len(parameter) if parameter.dim() else 1, parameter[:1].numel() if parameter.dim() else 1
        tail = parameter.shape[1:]
        # By row and column: a list of all elements would be long for the few that are looked up in a table.
        row_of = torch.arange(rows, device=parameter.device).view(-1, *[1] * len(tail)).expand(rows, *tail)
        column_of = torch.arange(row, device=parameter.device).view(1, *tail).expand(rows, *tail)
        if not tail:
            row_of, column_of = row_of.view(parameter.shape), column_of.view(parameter.shape)
        return self.of(row_of) * row + self.of(column_of)

    def extent(self, parameter: Tensor) -> tuple[int, int]:
        """Positions in the flattened parameter between which all elements of the part lie."""
        part = self.of(parameter)
        if not part.numel():
            return 0, parameter.numel() - 1
        if not _same_storage(part, parameter) or not parameter.is_contiguous():
            positions = self.positions(parameter)
            return int(positions.min()), int(positions.max())
        start = int(part.storage_offset() - parameter.storage_offset())
        return start, start + sum(int(size - 1) * int(stride) for size, stride in zip(part.shape, part.stride()))

    def write(self, parameter: Tensor, value: Tensor) -> None:
        """Write the values of this part into a parameter."""
        part = self.of(parameter)
        if _same_storage(part, parameter):
            part.copy_(value)
        else:
            indices = torch.unravel_index(self.positions(parameter).flatten(), parameter.shape)
            parameter[indices] = value.flatten().to(parameter)


@dataclass(eq=False)
class WriteCount:
    """How often a parameter has been written to. Autograd uses ``Tensor._version``, so that is left alone."""

    count: int = 0


@dataclass(frozen=True, eq=False)
class Target:
    """Device and precision that a stored tensor is moved to when a function uses its values.

    Attributes:
        device, dtype: where to, and in which precision.
        moved: the tensors that were moved, so that several forwards can use them, each after what it was moved from,
            whose address nothing else may have meanwhile. It may serve several targets, and is emptied by whoever made
            it.
    """

    device: torch.device
    dtype: torch.dtype
    moved: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def move(self, tensor: Tensor, writes: int = 0) -> Tensor:
        """Return a tensor there. It is the tensor itself if it is there already.

        Args:
            tensor: an ordinary tensor, or a view of one.
            writes: how often it has been written to.
        """
        if (tensor.device, tensor.dtype) == (self.device, self.dtype):
            return tensor
        view = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        key = (*view, self.device, self.dtype, writes, private_torch.version(tensor))
        if key not in self.moved:
            with private_torch.no_torch_dispatch():  # it belongs to no forward, so that no pager may move it
                self.moved[key] = tensor, tensor.to(self.device, self.dtype)
        return self.moved[key][1]


class Tracked(Tensor):
    """A parameter, or a part of one, that calls ``on_use(function, args, kwargs)`` before a function uses its values.

    Attributes:
        part: the parameter, and the part of it.
        writes: number of writes to the parameter.
        version: number of writes when this copy of the part was made. ``None``: it is a view of the parameter.
        target: device and precision that it reports, and that it is moved to when a function uses its values. ``None``:
            it is used as it is.
        on_use: called before the function. It may pause the forward. If it returns something, that is called with the
            function's result, and may replace it.
    """

    part: Part
    writes: WriteCount
    version: int | None
    target: Target | None
    on_use: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Callable[[Any], Any] | None]
    _own_version: int

    @classmethod
    def of(
        cls,
        tensor: Tensor,
        part: Part,
        on_use: Any,
        writes: WriteCount,
        version: int | None = None,
        target: Target | None = None,
    ) -> Tracked:
        """``tensor`` as a tracked tensor on the same storage."""
        tracked = private_torch.make_subclass(cls, tensor.detach())
        tracked.part, tracked.on_use, tracked.writes, tracked.version = part, on_use, writes, version
        tracked.target = target
        tracked._own_version = private_torch.version(tensor)
        tracked._is_param = not part.steps  # isinstance(..., nn.Parameter) reads it
        return tracked

    def refresh(self, parameter: Tensor) -> None:
        """Copy from the parameter again, if it has been written to since and this copy has not."""
        if self.version in (None, self.writes.count):
            return
        if self._own_version == private_torch.version(self):
            untracked(self).copy_(self.part.of(parameter, casts=True))
            self.version, self._own_version = self.writes.count, private_torch.version(self)

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
            return multi_head_attention_forward(*args, **kwargs)  # calls functions that are layers
        first = args[0] if args and isinstance(args[0], Tracked) else None
        selects = first is not None and name in _SELECTIONS | _CASTS
        selects = selects and next(tracked_in(args[1:], kwargs), None) is None
        on_result = None
        if not selects and not name.startswith("__get ") and name not in _VALUE_INDEPENDENT:
            tracked = next(tracked_in(args, kwargs), None)
            on_result = None if tracked is None else tracked.on_use(func, args, kwargs)
        if first is not None and first.target and name in _PLACEMENT_QUERIES:
            return _PLACEMENT_QUERIES[name](first.target.device, first.target.dtype)
        # A cast starts from the precision that the tensor reports: bfloat16 cast to float32 has bfloat16's digits.
        casts = selects and name in _CASTS
        if casts or (not selects and not name.startswith(("__get ", "__set", "requires_grad_", "register_hook"))):
            args, kwargs = materialized(args), materialized(kwargs)
        with private_torch.no_subclass_torch_function():
            result = func(*args, **kwargs)
        if selects and first is not None:
            return _track_selection(first, func, args[1:], kwargs, result, None if casts else first.target)
        replaced = None if on_result is None else on_result(result)
        return result if replaced is None else replaced


_PLACEMENT_QUERIES: dict[str, Callable[[torch.device, torch.dtype], Any]] = {
    "__get device": lambda device, dtype: device,
    "__get dtype": lambda device, dtype: dtype,
    "__get is_cuda": lambda device, dtype: device.type == "cuda",
    "__get is_cpu": lambda device, dtype: device.type == "cpu",
    "get_device": lambda device, dtype: -1 if device.type == "cpu" else device.index,
}


def materialized(value: Any) -> Any:
    """The arguments of a function, with tracked tensors moved to the device and precision that they report."""
    if isinstance(value, Tracked):
        plain: Tensor = untracked(value)
        return plain if value.target is None else value.target.move(plain, value.writes.count)
    if isinstance(value, (list, tuple)) and any(True for _ in tracked_in(value)):
        parts = [materialized(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {name: materialized(part) for name, part in value.items()}
    return value


def name_of(function: Any) -> str:
    """``"linear"`` for ``torch.nn.functional.linear``, ``"T"`` for that attribute, ``"__get shape"`` for others."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        attribute: str = function.__self__.__name__
        return attribute if attribute in _SELECTIONS else f"__get {attribute}"
    return str(name)


def untracked(value: Any) -> Any:
    """An ordinary tensor in place of a tracked one. Other values are returned as they are."""
    if not isinstance(value, Tracked):
        return value
    with private_torch.no_subclass_torch_function():
        return torch.ops.aten.alias.default(value)


def tracked_in(*values: Any) -> Iterator[Tracked]:
    """All tracked tensors among arguments, and in lists, tuples and dictionaries among them."""
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


def _track_selection(
    first: Tracked,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: Any,
    target: Target | None,
) -> Any:
    """The result of a selection, as tracked tensors."""
    name = name_of(func)
    if name in _LIKE:  # keep the shape of the other tensor, not the tensor
        func, args, kwargs = getattr(Tensor, _LIKE[name]), (tuple(result.shape),), {}

    def tracked(tensor: Tensor, index: int | None) -> Tracked:
        part = Part(first.part.name, (*first.part.steps, (func, args, kwargs, index)))
        version = first.version
        if version is None and not _same_storage(tensor, untracked(first)):
            version = first.writes.count
        return Tracked.of(tensor, part, first.on_use, first.writes, version, target)

    if isinstance(result, Tensor):
        return tracked(result, None)
    if isinstance(result, (tuple, list)):
        return type(result)(tracked(tensor, index) for index, tensor in enumerate(result))
    return result


def _repeats(step: Step) -> bool:
    function, args, _, _ = step
    name = name_of(function)
    if name == "__getitem__":
        keys = args[0] if isinstance(args[0], tuple) else (args[0],)
        return any(not isinstance(key, (int, slice, type(None), type(Ellipsis))) for key in keys)
    return name in _REPEATS


def _selects_by_number(step: Step) -> bool:
    function, args, _, index = step
    if name_of(function) == "__getitem__":
        keys = args[0] if isinstance(args[0], tuple) else (args[0],)
        return any(isinstance(key, int) for key in keys)
    return index is not None or name_of(function) == "select"


def _same_storage(part: Tensor, parameter: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
