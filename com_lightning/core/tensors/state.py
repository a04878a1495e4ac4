"""The state of a module besides its parameters and buffers: what a copy of the module owns, and what it shares.

A forward may change whatever the module refers to: features that a hook keeps, a meter, a matrix of numpy, a generator
of random numbers. So a copy owns all of that. Three things are shared: data and what belongs to a training (loaders,
trainers, loggers, optimizers), which a forward does not change; tokenizers and configurations, which are large and not
changed either; and what cannot be copied, such as a lock or an open file, or is too large (:data:`LARGE`).

``copy.deepcopy`` copies no function. A hook that was defined within ``__init__`` may refer to the module by its
closure, and would work on the original. So functions of the user's get closures that refer to the copy.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.tensors import private_torch
from com_lightning.weak_cache import weak_cache

LARGE = 2**26
"""Bytes that tensors and arrays may have together, besides parameters and buffers. There is a copy for each forward,
and averaged weights or a bank of features may be as large as the network."""
_ATOMIC: tuple[type, ...] = (
    *(type(None), type(Ellipsis), bool, int, float, complex, str, bytes, torch.dtype, torch.device),
    *(type, ModuleType, BuiltinFunctionType, *weakref.ProxyTypes),
)
_SHARED_PACKAGES = {"lightning", "pytorch_lightning", "lightning_fabric", "datasets", "tokenizers", "sentencepiece"}
_SHARED_MODULES = (
    *("torch.utils.data", "torch.optim", "torch.amp", "torch.fx", "torch.cuda", "torch._dynamo"),
    *("torch.distributed", "torch._C._distributed_c10d"),
    *("transformers.configuration_utils", "transformers.generation.configuration_utils"),
    *("transformers.tokenization_", "transformers.processing_utils", "transformers.feature_extraction_"),
    *("transformers.image_processing_", "transformers.video_processing_"),
)
"""Objects of classes that are defined in these, or derived from such a class, are shared."""


@weak_cache
def _is_shared(cls: Any) -> bool:
    if issubclass(cls, (nn.Module, Tensor, dict, list, tuple, set, frozenset, deque)):
        return False
    origins = [base.__module__ for base in cls.__mro__]
    return "Tokenizer" in cls.__name__ or any(
        origin.partition(".")[0] in _SHARED_PACKAGES or origin.startswith(_SHARED_MODULES) for origin in origins
    )


class State:
    """Everything that a module refers to and that a copy of it has to deal with.

    Args:
        module: the module.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        owners = [(*part._parameters.values(), *part._buffers.values()) for part in module.modules()]
        self.own = {id(tensor): tensor for tensors in owners for tensor in tensors if tensor is not None}
        """``id`` of each parameter and buffer -> the tensor."""
        self.shared: list[Any] = []
        """Objects that a copy shares."""
        self.tensors: list[Tensor] = []
        """Tensors that are neither parameters nor buffers, and that a copy owns."""
        self.generators: list[torch.Generator] = []
        self.functions: set[int] = set()
        """``id`` of each function. ``copy.deepcopy`` copies none."""
        self.has_weak_references = False
        self._objects: list[Any] = []
        self._from: dict[int, tuple[Any, Any]] = {}
        """``id`` of an object -> the object that refers to it, and the name or the key by which it does."""
        self._walk(module)

    def _walk(self, module: nn.Module) -> None:
        seen, waiting = {id(module), *self.own}, [module]
        while waiting:
            owner = waiting.pop()
            for label, value in _parts(owner):
                cls: Any = type(value)
                key = id(value)
                if (cls in _COMMON and not value) or issubclass(cls, _ATOMIC) or key in seen:
                    continue
                seen.add(key)
                self._from[key] = owner, label
                if isinstance(value, Tensor):
                    # A computed tensor cannot be copied. The forward computes it anew (weight normalisation by a hook).
                    (self.tensors if value.is_leaf else self.shared).append(value)
                elif cls is torch.Generator:
                    self.generators.append(value)
                elif _is_shared(cls):
                    self.shared.append(value)
                elif cls is FunctionType:
                    if _has_state(value):
                        self.functions.add(key)
                        waiting.append(value)
                else:
                    self.has_weak_references |= cls is weakref.ref
                    self._objects.append(value)
                    waiting.append(value)

    def copied(self, tensors: Mapping[int, Any], shares: bool) -> nn.Module:
        """Return a copy of the module.

        Args:
            tensors: ``id`` of an object, such as a parameter -> what replaces it in the copy.
            shares: whether all other parameters and buffers are shared. If not, they are copied.
        """
        try:
            return self._copied({**self._memo(shares), **tensors})
        except Exception:  # whatever a class of the user's raises when an object is copied
            if not (uncopyable := self.uncopyable()):
                raise
        shared = {key: value for key, (value, _) in uncopyable.items()}
        return self._copied({**self._memo(shares), **shared, **tensors})

    def _copied(self, memo: dict[int, Any]) -> nn.Module:
        module = copy.deepcopy(self.module, memo)
        if self.functions or self.has_weak_references:
            Rebinder(self.functions, memo)(module)
        return module

    def _memo(self, shares: bool = True) -> dict[int, Any]:
        """A memo for ``copy.deepcopy``."""
        memo: dict[int, Any] = {id(value): value for value in self.shared}
        memo.update({id(generator): generator.clone_state() for generator in self.generators})
        return {**memo, **self.own, **self._large} if shares else memo

    @cached_property
    def _large(self) -> dict[int, Any]:
        """``id`` of each tensor and array, if all together are too large to be copied for each forward."""
        arrays = [value for value in self._objects if isinstance(getattr(value, "nbytes", None), int)]
        storages = {private_torch.address(t.untyped_storage()): t.untyped_storage() for t in self.tensors}
        size = sum(value.nbytes for value in arrays) + sum(storage.nbytes() for storage in storages.values())
        return {id(value): value for value in (*self.tensors, *arrays)} if size > LARGE else {}

    def complaints(self) -> list[str]:
        """Say what is not copied, so that all copies share it: the name, the class, and why."""
        large = [self._name(value) for value in self._large.values()]
        found = [f"{', '.join(large[:4])}: more than {LARGE / 2**20:.0f} MiB"] if large else []
        try:
            self._copied(self._memo())
        except Exception:  # whatever a class of the user's raises when an object is copied
            found += [why for _, why in self.uncopyable().values()]
        return found

    def uncopyable(self) -> dict[int, tuple[Any, str]]:
        """Find what cannot be copied.

        Returns:
            ``id`` of each such object -> the object, and a sentence that names it and says why.
        """
        memo, found = self._memo(), dict[int, tuple[Any, str]]()
        objects = [
            value for value in self._objects if not isinstance(value, (nn.Module, *_COMMON, MethodType, partial))
        ]
        # Those that refer to nothing come first. What refers to them can be copied then.
        for value in sorted(objects, key=lambda value: any(True for _ in _parts(value))):
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as error:  # whatever a class of the user's raises
                found[id(value)] = value, f"{self._name(value)} (a {type(value).__name__}): {error}"
                memo[id(value)] = value
        return found

    def _name(self, value: Any) -> str:
        labels: list[str] = []
        while value is not self.module:
            value, label = self._from[id(value)]
            if label not in ("_modules", "__self__"):
                labels.append(f"[{label[0]!r}]" if isinstance(label, tuple) else f".{label}")
        return "".join(reversed(labels)).lstrip(".")


_COMMON = (dict, OrderedDict, list, tuple, set, frozenset, deque)


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What an object refers to, with the name of the attribute, or the key as a tuple."""
    if isinstance(value, nn.Module):
        for name, part in vars(value).items():
            if name == "_modules":
                yield from part.items()
            elif name != "_compiled_call_impl":
                yield name, part
        return
    if isinstance(value, dict):
        yield from (((key,), part) for key, part in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from (((number,), part) for number, part in enumerate(value))
    elif isinstance(value, MethodType):
        yield from (("__self__", value.__self__), ("__func__", value.__func__))
        return
    elif isinstance(value, FunctionType):
        yield from ((name, _content(c)) for name, c in zip(value.__code__.co_freevars, value.__closure__ or ()))
        yield from (("__defaults__", value.__defaults__), ("__kwdefaults__", value.__kwdefaults__))
    elif isinstance(value, partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    attributes = getattr(value, "__dict__", None)
    if type(attributes) is dict:
        yield from attributes.items()


class Rebinder:
    """Makes the functions and weak references of a copy refer to the copy, in place.

    Args:
        functions: ``id`` of the original's functions.
        memo: the memo of the ``copy.deepcopy`` that has made the copy.
    """

    def __init__(self, functions: set[int], memo: dict[int, Any]) -> None:
        self._originals, self._memo = functions, memo
        self._copies: set[int] = set()
        self._seen: set[int] = set()
        self._functions: dict[int, FunctionType] = {}
        self._cells: dict[int, CellType] = {}
        self._note_copies()

    def __call__(self, value: Any) -> Any:
        """Return what replaces a value. Everything within it is replaced, too."""
        if issubclass(type(value), (*_ATOMIC, Tensor)):
            return value
        if isinstance(value, FunctionType):
            return self._function(value) if id(value) in self._originals else value
        if type(value) is weakref.ref:
            target = value()
            return weakref.ref(self._memo[id(target)]) if id(target) in self._memo else value
        if isinstance(value, MethodType):
            return MethodType(self(value.__func__), self(value.__self__))
        if isinstance(value, partial):
            made = partial(self(value.func), *map(self, value.args), **{k: self(v) for k, v in value.keywords.items()})
            vars(made).update(vars(value))
            return made
        if isinstance(value, tuple):
            parts = [self(part) for part in value]
            if all(part is before for part, before in zip(parts, value)):
                return value
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if id(value) in self._copies and id(value) not in self._seen:
            self._seen.add(id(value))
            self._replace_parts(value)
        return value

    def _replace_parts(self, value: Any) -> None:
        if isinstance(value, (list, deque)):
            for number, part in enumerate(value):
                value[number] = self(part)
        elif isinstance(value, set):
            parts = [self(part) for part in value]
            value.clear()
            value.update(parts)
        for places in (value, getattr(value, "__dict__", None)):
            if isinstance(places, dict):
                for key, part in places.items():
                    places[key] = self(part)

    def _function(self, function: FunctionType) -> FunctionType:
        if id(function) not in self._functions:
            cells = [self._cells.setdefault(id(cell), CellType()) for cell in function.__closure__ or ()]
            made = FunctionType(
                function.__code__, function.__globals__, function.__name__, closure=tuple(cells) or None
            )
            self._functions[id(function)] = made  # before the contents, because a function may refer to itself
            for name in ("__qualname__", "__module__", "__doc__", "__annotations__"):
                setattr(made, name, getattr(function, name))
            made.__defaults__ = self._copied(function.__defaults__)
            made.__kwdefaults__ = self._copied(function.__kwdefaults__)
            vars(made).update(self._copied(vars(function)))
            for cell, original in zip(cells, function.__closure__ or ()):
                if _content(cell) is _EMPTY and _content(original) is not _EMPTY:
                    cell.cell_contents = self._copied(original.cell_contents)
        return self._functions[id(function)]

    def _copied(self, value: Any) -> Any:
        before = len(self._memo)
        copied = copy.deepcopy(value, self._memo)
        if len(self._memo) > before:
            self._note_copies()
        return self(copied)

    def _note_copies(self) -> None:
        self._copies = {id(made) for original, made in self._memo.items() if id(made) != original}


_EMPTY = type("Empty", (), {})


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing has been assigned to the variable yet
        return _EMPTY


def _has_state(function: FunctionType) -> bool:
    """Whether a function may hold what a forward changes. Those of PyTorch and Lightning hold nothing of that kind."""
    package = str(function.__globals__.get("__name__")).partition(".")[0]
    holds = function.__closure__ or function.__defaults__ or function.__kwdefaults__ or vars(function)
    return bool(holds) and package not in ("torch", "torchmetrics", "lightning", "functools")
