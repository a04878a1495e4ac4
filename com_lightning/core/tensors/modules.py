"""The tensors of a module, and copies of a module with other tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from types import EllipsisType
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.state import State

M = TypeVar("M", bound=nn.Module)

SLICE_ELEMENTS = 2**17
"""Elements in one of :func:`row_slices`: 1 MiB in float64."""


def copy_module(module: nn.Module, tensors: Mapping[int, Tensor] | None = None) -> nn.Module:
    """Return a copy of ``module`` with its own submodules, state and hooks, but with the same parameters and buffers.

    :mod:`com_lightning.core.tensors.state` says what belongs to its state.

    Args:
        module: the module to copy. Ties between parameters are kept.
        tensors: ``id`` of a parameter or buffer of ``module`` -> the tensor that replaces it in the copy. All others
            are the tensors of ``module``.

    Example::

        >>> net, weight = nn.Linear(2, 2), nn.Parameter(torch.zeros(2, 2))
        >>> twin = copy_module(net, {id(net.weight): weight})
        >>> twin.weight is weight, twin.bias is net.bias
        (True, True)
    """
    return State(module).copied(tensors or {}, shares=True)


def copy_with_tensors(module: M, instead: Mapping[int, nn.Module] | None = None) -> M:
    """Return a copy of ``module`` that shares no parameter or buffer with it.

    Args:
        module: the module to copy.
        instead: ``id`` of a submodule -> the module that takes its place.
    """
    return cast(M, State(module).copied(instead or {}, shares=False))


def copy_on_same_storage(module: nn.Module) -> nn.Module:
    """Return a copy with its own parameters and buffers on the same storage.

    Moving or converting the copy does not change ``module``.
    """
    tensors = {}
    for _, tensor, is_parameter in named_tensors(module):
        tensors[id(tensor)] = nn.Parameter(tensor.detach(), tensor.requires_grad) if is_parameter else tensor.detach()
    return copy_module(module, tensors)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter or buffer in another precision. If it has that precision already, it is returned itself."""
    if tensor.dtype == dtype:
        return tensor
    value = tensor.detach().to(dtype)
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, tensor, whether it is a parameter) for each name of each parameter and buffer."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        yield name, parameter, True
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield name, buffer, False


def alike_in_all(modules: Sequence[nn.Module], names: Collection[str]) -> set[str]:
    """Find the tensors that are the same in all modules, in submodules of which all wanted tensors are.

    Args:
        modules: the modules. They may have other submodules, and tensors of other shapes.
        names: the tensors that are wanted, as the first module has them.

    Returns:
        Their names.
    """
    first, *others = ({name: tensor for name, tensor, _ in named_tensors(module)} for module in modules)
    same = {
        name
        for name in names
        if all(name in each and each[name].shape == first[name].shape for each in others)
        and all(torch.equal(first[name], each[name].to(first[name])) for each in others)
    }
    differing = {name.rpartition(".")[0] for name in names if name not in same}
    return {name for name in same if name.rpartition(".")[0] not in differing}


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The number of bytes of all tensors. A tensor that occurs twice counts once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def tied_names(module: nn.Module) -> dict[str, str]:
    """Return a dictionary: name of each parameter or buffer -> first name of the same tensor (itself, if not tied).

    Example::

        >>> net = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
        >>> net["head"].weight = net["embed"].weight
        >>> tied_names(net)
        {'embed.weight': 'embed.weight', 'head.weight': 'embed.weight'}
    """
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor, _ in named_tensors(module)}


def matches_any(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a parameter's name matches one of the patterns.

    A pattern is a shell pattern (``"head.*"``, ``"*.classifier.weight"``) or the name of a module or parameter.

    Example::

        >>> matches_any("head.weight", ["head"]), matches_any("header.weight", ["head"])
        (True, False)
    """
    return any(fnmatchcase(name, p) or name == p or name.startswith(p + ".") for p in patterns)


def all_finite(tensor: Tensor) -> bool:
    """Return whether a floating-point tensor holds neither NaN nor infinity, without copying it.

    Example::

        >>> all_finite(torch.ones(2)), all_finite(torch.tensor([1.0, torch.nan])), all_finite(torch.empty(0))
        (True, False, True)
    """
    # If there is NaN, both the minimum and the maximum are NaN.
    return not tensor.numel() or all(bool(end.isfinite()) for end in torch.aminmax(tensor.detach()))


def average(tensors: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Return the (weighted) average in the first tensor's dtype and on its device. It is summed in a wider precision.

    Args:
        tensors: tensors of one shape.
        weights: one weight per tensor. They are normalised to a sum of one. ``None``: uniform.

    Example::

        >>> average([torch.zeros(2), torch.ones(2)], [1, 3])
        tensor([0.7500, 0.7500])
    """
    weights = [1.0] * len(tensors) if weights is None else weights
    result = torch.empty_like(tensors[0], requires_grad=False)
    wide = (
        torch.float32 if all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors) else torch.float64
    )
    for part in row_slices(result):  # wide copies of a few rows at a time, not of the whole tensor
        total = torch.zeros_like(result[part], dtype=wide)
        for tensor, weight in zip(tensors, weights):
            total.add_(tensor.detach()[part].to(total.device, wide), alpha=weight)
        result[part] = total / sum(weights)
    return result


def row_slices(tensor: Tensor) -> Iterator[slice | EllipsisType]:
    """Yield slices of a few rows each that cover a tensor. So few numbers fit a processor's caches."""
    rows = len(tensor) if tensor.dim() else 0
    size = max(SLICE_ELEMENTS * rows // max(tensor.numel(), 1), 1)
    yield from (slice(start, start + size) for start in range(0, rows, size)) if tensor.dim() else [...]


def writable_copy(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Return a copy on new storage, on another device if one is given. The copy of a parameter is a parameter.

    Example::

        >>> isinstance(writable_copy(nn.Parameter(torch.ones(2)), torch.device("meta")), nn.Parameter)
        True
    """
    value = tensor.detach().to(device, copy=True)
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
