"""Everything of PyTorch that is private and that this library calls.

Nothing else in the library calls it. ``tests/unit/core/tensors/test_private_torch.py`` checks of each function that it
still exists and still means the same. A new version of PyTorch that changes one of them fails there, by name.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, UntypedStorage
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.distributed.checkpoint import filesystem, metadata
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import DataLoader

T = TypeVar("T", bound=Tensor)
Loader = TypeVar("Loader", bound=DataLoader[Any])


# Version counters: how often a tensor has been written to.


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to in place. Inference tensors have no count."""
    return tensor._version


def unversioned_write(tensor: Tensor) -> AbstractContextManager[None]:
    """What is written to a tensor in this context does not count as a new version of it."""
    return _unsafe_preserve_version_counter(tensor)


# Tensor subclasses, and modes that see each call.


def make_subclass(cls: type[T], tensor: Tensor) -> T:
    """A tensor of a subclass on the same storage."""
    made: T = Tensor._make_subclass(cls, tensor)
    return made


def no_torch_function() -> AbstractContextManager[None]:
    """No ``__torch_function__`` is called in this context, neither that of a subclass nor that of a mode."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return context


def no_subclass_torch_function() -> AbstractContextManager[None]:
    """No ``__torch_function__`` of a tensor subclass is called in this context. Modes still see every call."""
    context: AbstractContextManager[None] = torch._C.DisableTorchFunctionSubclass()
    return context


def no_torch_dispatch() -> AbstractContextManager[None]:
    """No dispatch mode sees what is computed in this context."""
    context: AbstractContextManager[None] = torch._C._DisableTorchDispatch()
    return context


def function_modes() -> tuple[Any, ...]:
    """The modes that see each function call now, the innermost last."""
    return tuple(torch.overrides._get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def set_function_modes(modes: Sequence[Any]) -> None:
    """Replace the modes that see each function call."""
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def dispatch_modes() -> tuple[Any, ...]:
    """The modes that see each operator call now, the innermost last."""
    return tuple(_get_current_dispatch_mode_stack())


def set_dispatch_modes(modes: Sequence[Any]) -> None:
    """Replace the modes that see each operator call."""
    while torch._C._len_torch_dispatch_stack():
        torch._C._pop_torch_dispatch_stack(None)
    for mode in modes:
        torch._C._push_on_torch_dispatch_stack(mode)


def is_operator(function: Any) -> bool:
    """Whether what a dispatch mode is shown is an operator of ATen or a library, whose schema is known."""
    return isinstance(function, torch._ops.OpOverload)


def is_mutable(operator: Any) -> bool:
    """Whether an operator writes to one of its arguments."""
    return bool(operator._schema.is_mutable)


def written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments of an operator that it writes to."""
    places = [(n, a.name) for n, a in enumerate(operator._schema.arguments) if a.alias_info and a.alias_info.is_write]
    values = [args[number] if number < len(args) else kwargs.get(name) for number, name in places]
    tensors = [part for value in values for part in (value if isinstance(value, (list, tuple)) else [value])]
    return [tensor for tensor in tensors if isinstance(tensor, Tensor)]


@functools.cache
def takes_device(operator: Any) -> bool:
    """Whether an operator can be told on which device its result is to be: it makes a new tensor."""
    return any(argument.name == "device" for argument in operator._schema.arguments)


def inside_transform() -> bool:
    """Whether a transform such as ``torch.func.vmap`` or ``grad`` is running, in which nothing can pause."""
    return torch._C._functorch.peek_interpreter_stack() is not None


# Storages.


def address(storage: UntypedStorage) -> int:
    """What identifies a storage, for as long as anything, also a :class:`WeakStorage`, refers to it."""
    identity: int = storage._cdata
    return identity


class WeakStorage:
    """A reference to a storage that does not keep its memory."""

    __slots__ = ("_reference",)

    def __init__(self, storage: UntypedStorage) -> None:
        self._reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def get(self) -> UntypedStorage | None:
        """The storage; ``None`` if nobody else refers to it any more."""
        storage: UntypedStorage | None = UntypedStorage._new_with_weak_ptr(self._reference.cdata)
        return storage


def inner_tensors(tensor: Tensor) -> list[Tensor] | None:
    """The tensors that a wrapper subclass (DTensor, for instance) consists of. ``None``: it is no such wrapper."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return None
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def sparse_parts(tensor: Tensor) -> list[Tensor]:
    """Indices and values of a sparse COO tensor as they are stored, coalesced or not."""
    with no_torch_dispatch():
        return [tensor._indices(), tensor._values()]


# Products.


def has_onednn_linear() -> bool:
    """Whether PyTorch was built with MKL and oneDNN, and exposes a linear layer by oneDNN."""
    built = torch._C.has_mkl and torch._C._has_mkldnn
    return bool(built and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def onednn_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` by oneDNN. ``torch.compile`` uses it for the same purpose."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return result


# Processes.


def default_store() -> Any:
    """The key-value store by which the processes of the default group have met."""
    return dist.distributed_c10d._get_default_store()


# Data loaders.


def loader_copy(loader: Loader, **changes: Any) -> Loader:
    """Return a copy of a DataLoader that has workers of its own while it is iterated.

    Args:
        loader: the loader; a subclass keeps all of its attributes.
        changes: attributes with other values. DataLoader lets nobody set them.
    """
    copied = copy.copy(loader)
    vars(copied).update({"_iterator": None, "persistent_workers": False, **changes})
    return copied


# Sharded checkpoints.


def index_class(module: str, name: str) -> Any:
    """What the index of a sharded checkpoint may name in a module; ``None`` for all that no index needs."""
    allowed: dict[str, Mapping[str, Any]] = {
        metadata.__name__: {
            "ChunkStorageMetadata": metadata.ChunkStorageMetadata,
            "_MEM_FORMAT_ENCODING": metadata._MEM_FORMAT_ENCODING,
            "TensorProperties": metadata.TensorProperties,
            "TensorStorageMetadata": metadata.TensorStorageMetadata,
            "BytesStorageMetadata": metadata.BytesStorageMetadata,
            "StorageMeta": metadata.StorageMeta,
            "Metadata": metadata.Metadata,
            "MetadataIndex": metadata.MetadataIndex,
        },
        filesystem.__name__: {"_StorageInfo": filesystem._StorageInfo},
        "torch": {"Size": torch.Size, **{n: v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}},
        "torch.serialization": {"_get_layout": torch.serialization._get_layout},
    }
    return allowed.get(module, {}).get(name)
