"""What a file describes is built only if it is about as large as what the file holds, and without memory if asked for.

Hyperparameters or a ``config.json`` may ask for a billion layers or columns, by mistake or on purpose. The module would
be built before its shapes are compared with those of the tensors, and would take all memory, or would never be built.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from com_lightning.core.tensors.modules import named_tensors
from com_lightning.core.tensors.private_torch import takes_device
from com_lightning.core.tensors.tracked import tensors_in
from com_lightning.errors import MergeError, MergeWarning, reason, some
from com_lightning.experts.files import LONGEST_JSON

Built = TypeVar("Built", bound=nn.Module)

_SOME_VALUES = 2**27
"""Values that are never too many: half a GiB in float32, for masks and tables that are not in the file."""
_SOME_TENSORS = 10_000
"""Tensors that are never too many: a few seconds to make."""
_MOST_PARTS = 10**6
"""Layers or labels that a configuration may ask for. Those of transformers make lists of this length."""


class TooLargeError(RuntimeError):
    """What is being built would be much larger than the file that describes it and than the model."""


class BoundedConstruction(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within it, no more tensors and values are made than a file and a model suggest. No memory is taken before.

    Args:
        path: file or folder that says what is built.
        model: what is to be built is of its kind. The file may hold a part of it only.

    Raises:
        TooLargeError: from the operator that would make too much.
    """

    def __init__(self, path: Path, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        files = path.iterdir() if path.is_dir() else [path]
        size = sum(file.stat().st_size for file in files if file.is_file())
        tensors = [tensor for _, tensor, _ in named_tensors(model)]
        known = sum(tensor.numel() for tensor in tensors)
        self.values = self.most_values = 2 * (size + known) + _SOME_VALUES
        self.tensors = self.most_tensors = 20 * len(tensors) + _SOME_TENSORS
        self._told = f"the file has {size:,} bytes, and your model {known:,} values in {len(tensors):,} tensors"

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if takes_device(func):
            self.values -= _values(func, args, kwargs)
            self.tensors -= 1
            if self.values < 0:
                raise TooLargeError(f"more than {self.most_values:,} values would be made, but {self._told}")
            if self.tensors < 0:
                raise TooLargeError(f"more than {self.most_tensors:,} tensors would be made, but {self._told}")
        return func(*args, **kwargs)


def _values(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """About how many values an operator is going to make, or at most how many."""
    if kwargs.get("layout") not in (None, torch.strided):  # a sparse tensor has less values than its shape says
        return 0
    for argument in args:
        if isinstance(argument, (list, tuple)) and all(isinstance(size, int) for size in argument):
            return math.prod(argument)
    if args and isinstance(args[0], Tensor):
        return args[0].numel()
    if func.overloadpacket is torch.ops.aten.scalar_tensor:
        return 1
    numbers = [abs(argument) for argument in args if isinstance(argument, (int, float))]
    largest = int(min(max(numbers, default=0), 2**63))  # arange, linspace and the like
    return largest**2 if func.overloadpacket is torch.ops.aten.eye else largest


def check_counts(config: Path) -> None:
    """Make sure that a ``config.json`` asks for no absurd number of layers or labels.

    Args:
        config: the file. One that is too long, or cannot be read, is told of elsewhere.

    Raises:
        TooLargeError: naming the number.
    """
    if config.stat().st_size > LONGEST_JSON:
        return
    try:
        pending = [("", json.loads(config.read_text(encoding="utf-8")))]
    except (OSError, ValueError, RecursionError):
        return
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += value.items()
        elif isinstance(value, list):
            pending += [(name, part) for part in value]
        elif isinstance(value, (int, float)) and value > _MOST_PARTS and ("layer" in name or "label" in name):
            raise TooLargeError(f"{config.name} asks for {name}={value:,}")


@contextmanager
def empty_parameters() -> Iterator[None]:
    """Within it, parameters of new modules are on the meta device, and take no memory. Buffers are computed as usual.

    A module that computes with its parameters while it is built (a copy of them, a number read from them) raises, or
    keeps tensors on the meta device.
    """
    register, empty = nn.Module.register_parameter, WeakIdKeyDictionary()

    def register_empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            if parameter not in empty:  # a parameter with several names stays one
                empty[parameter] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
            parameter = empty[parameter]
        register(module, name, parameter)

    nn.Module.register_parameter = register_empty  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def without_memory(build: Callable[[], Built], name: str) -> Built:
    """Build a model without memory for its parameters. If its class does not allow it, they get memory, with a warning.

    Args:
        build: builds the model.
        name: names it in the warning.

    Returns:
        The model.
    """
    try:
        with empty_parameters():
            model = build()
        parameters = {parameter for parameter, _ in model.named_parameters(remove_duplicate=False)}
        if not (without := [tensor for tensor in meta_tensors(model) if tensor not in parameters]):
            return model
        why = f"{some(without, most=3)} are computed from its parameters"
    except Exception as error:  # code of the class runs here, which may need the values
        why = reason(error)
    warnings.warn(f"offload: {name} is built with memory for its parameters ({why})", MergeWarning, stacklevel=2)
    return build()


def meta_tensors(module: nn.Module) -> list[str]:
    """Find what a module has no values for.

    Args:
        module: the module.

    Returns:
        Names of its parameters, buffers, and attributes that are tensors, lists or dictionaries of tensors, on the meta
        device.
    """
    found = [name for name, tensor, _ in named_tensors(module) if tensor.is_meta]
    for place, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in ("_parameters", "_buffers", "_modules"):
                inside = list(value.values()) if isinstance(value, dict) else value
                if any(tensor.is_meta for tensor in tensors_in(inside)):
                    found.append(f"{place}.{name}".lstrip("."))
    return found


def require_values(expert: nn.Module, model: nn.Module, label: str) -> None:
    """Make sure that an expert has values for all its tensors.

    Args:
        expert: the expert, which may have taken tensors from the model.
        model: a module of its class.
        label: names the expert in messages.

    Raises:
        MergeError: naming those without values.
    """
    if without := meta_tensors(expert):
        message = f"{label}: {some(without, most=3)} are not in its source, and your model has no values for them"
        told = f"{message}; build {type(model).__name__} in memory, not on the meta device or with --offload=layers"
        raise MergeError([told])
