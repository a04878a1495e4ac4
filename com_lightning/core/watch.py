"""Parameters that tell when a function uses them.

A layer that is a module is found by a hook on the module. But a weight may go into a function without its module being
called (torchvision's Swin, Mamba), or belong to no layer at all (a position table, a layer scale, the stacked experts
of a mixture). A :class:`Watched` parameter is a tensor subclass on the same storage: PyTorch hands it every function
that it enters, and so do the views of it that the forward takes (a slice, a transpose).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
# Functions that may change the precision or device of their first argument, and nothing else.
_CASTS = {"to", "type", "float", "double", "half", "bfloat16", "type_as", "cpu", "cuda"}
# Functions whose result does not depend on the values of a tensor.
_INDIFFERENT = {
    *("type_as", "to", "expand_as", "view_as", "reshape_as", "requires_grad_", "register_hook", "is_floating_point"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "new_tensor", "is_complex", "result_type", "can_cast"),
    *("__set__", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
}


@dataclass(frozen=True)
class Part:
    """What a forward has picked of a parameter: its name, and the functions that were applied to it.

    Args:
        name: of the parameter.
        steps: function, further arguments and, where it returned several tensors, which of them.
    """

    name: str
    steps: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], int | None], ...] = ()

    def of(self, whole: Tensor) -> Tensor:
        """The same part of another tensor of the parameter's shape."""
        return self._replayed(whole, casts=True)

    def positions(self, whole: Tensor) -> Tensor:
        """Which element of the flattened parameter each element of the part is."""
        return self._replayed(torch.arange(whole.numel(), device=whole.device).view(whole.shape), casts=False)

    def extent(self, whole: Tensor) -> tuple[int, int]:
        """First and last element of the flattened parameter that the part may hold."""
        part = self.of(whole)
        if not part.numel() or not _same_storage(part, whole):
            return 0, whole.numel() - 1
        start = int(part.storage_offset() - whole.storage_offset())
        return start, start + sum(int(size - 1) * int(stride) for size, stride in zip(part.shape, part.stride()))

    def write(self, whole: Tensor, value: Tensor) -> None:
        """Put the values of this part into a parameter."""
        part = self.of(whole)
        if _same_storage(part, whole):
            part.copy_(value)
        else:
            whole.view(-1)[self.positions(whole).flatten()] = value.flatten().to(whole.dtype)

    def _replayed(self, tensor: Tensor, casts: bool) -> Tensor:
        for function, args, kwargs, pick in self.steps:
            if casts or name_of(function) not in _CASTS:
                result = function(tensor, *args, **kwargs)
                tensor = result if pick is None else result[pick]
        return tensor


class Watched(Tensor):
    """A parameter, or a part of one, that calls ``watcher(function, args, kwargs)`` before a function uses its values.

    Attributes:
        part: what of which parameter it is.
        version: of the parameter (``Tensor._version``) when this was copied from it; ``None``: it is a view of it.
        watcher: called before the function is; it may pause the forward.
    """

    part: Part
    version: int | None
    watcher: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Callable[[Any], None] | None]

    @classmethod
    def of(cls, tensor: Tensor, part: Part, watcher: Any, version: int | None = None) -> Watched:
        """``tensor`` as a watched one, on the same storage."""
        watched: Watched = torch.Tensor._make_subclass(cls, tensor.detach())
        watched.part, watched.watcher, watched.version = part, watcher, version
        watched._is_param = not part.steps  # what isinstance(..., nn.Parameter) asks for
        return watched

    def refresh(self, whole: Tensor) -> None:
        """Copy anew from the parameter, if that has been written to since."""
        if self.version is not None and self.version != whole._version:
            plain(self).copy_(self.part.of(whole))
            self.version = whole._version

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, name_of(func)
        first = args[0] if args and isinstance(args[0], Watched) else None
        picks = first is not None and name in _SELECTIONS | _CASTS and next(watched_in(args[1:], kwargs), None) is None
        leaving = None
        if not picks and not name.startswith("__get ") and name not in _INDIFFERENT:
            watched = next(watched_in(args, kwargs), None)
            leaving = None if watched is None else watched.watcher(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        if picks and first is not None:
            return _picked(first, func, args[1:], kwargs, result)
        if leaving is not None:
            leaving(result)
        return result


def name_of(function: Any) -> str:
    """``"linear"`` for ``torch.nn.functional.linear``, ``"T"`` for the attribute, ``"__get shape"`` for a plain one."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        attribute: str = function.__self__.__name__
        return attribute if attribute in _SELECTIONS else f"__get {attribute}"
    return str(name)


def plain(value: Any) -> Any:
    """A watched tensor as an ordinary one; anything else as it is."""
    return value.as_subclass(Tensor) if isinstance(value, Watched) else value


def watched_in(*values: Any) -> Iterator[Watched]:
    """All watched tensors among arguments, also within lists, tuples and dictionaries."""
    for value in values:
        if isinstance(value, Watched):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from watched_in(*value)
        elif isinstance(value, dict):
            yield from watched_in(*value.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in a function's result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def _picked(first: Watched, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    """The result of a selection, watched on."""

    def watched(tensor: Tensor, pick: int | None) -> Watched:
        part = Part(first.part.name, (*first.part.steps, (func, args, kwargs, pick)))
        version = first.version
        if version is None and not _same_storage(tensor, plain(first)):
            version = first._version
        return Watched.of(tensor, part, first.watcher, version)

    if isinstance(result, Tensor):
        return watched(result, None)
    if isinstance(result, (tuple, list)):
        return type(result)(watched(tensor, pick) for pick, tensor in enumerate(result))
    return result


def _same_storage(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
