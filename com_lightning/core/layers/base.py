"""What a layer type is, and what all of them use."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.nn.utils import parametrize

from com_lightning.core.solve.statistics import InputMeans, InputSums


@dataclass(frozen=True)
class Arguments:
    """What a layer was called with."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return first(self.args, self.kwargs)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the input, or float32 if that is lower."""
        return torch.promote_types(self.input.dtype, torch.float32)

    def to(self, dtype: torch.dtype) -> Arguments:
        """The same arguments, with floating-point tensors in that precision."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Arguments(tuple(map(cast, self.args)), {name: cast(value) for name, value in self.kwargs.items()})


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in the merged model, and the call of the expert on the same batch.

    Attributes:
        merged: arguments in the merged model.
        expert: arguments in the expert, if its inputs are used.
        weight: of the expert, ``(g, o, k)``.
        mask: boolean, over positions: ``True`` where data are. ``None``: everywhere.
        stream_drift: what the output is to have beyond the output of the expert, as :meth:`LayerType.offset` gives it.
            Only where the expert's input has the same shape and the drift is gathered already multiplied.
    """

    merged: Arguments
    expert: Arguments | None
    weight: Tensor
    mask: Tensor | None = None
    stream_drift: Tensor | None = None

    @property
    def is_paired(self) -> bool:
        """Whether the expert's input has the shape of the merged model's, so that their rows go together."""
        return self.expert is not None and self.expert.input.shape == self.merged.input.shape


MAX_ROW_ELEMENTS = 2**24
"""Rows that take more memory than the input they are made of come in pieces of at most this many numbers: 64 MiB in
float32. While one is added to the statistics, some seven tensors of that size exist (less than half a GiB), whatever
the sizes of image, kernel and batch."""


class LayerType(ABC):
    """One type of layer as a regression of its output on its input."""

    name: str
    """How the report calls it."""
    corrects: bool = False
    """Whether its output can be solved to make up for what something else lacks, see :meth:`offset`."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is of this type, judged before any data is seen."""

    @abstractmethod
    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        """The arguments of one call as regression rows.

        Yields:
            Rows of shape ``(*lead, g, f)``, and whether their leading dimensions are positions of a padding mask.
        """

    @abstractmethod
    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        """Parameters of an expert's ``layer`` -> weight ``(g, o, k)``, the bias last, for the rows of ``like``.

        ``like`` is the merged model's layer, whose rows may depend on buffers of its own.
        """

    @abstractmethod
    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`to_matrix`."""

    def finish(
        self,
        module: nn.Module,
        weight: Tensor,
        experts: Sequence[nn.Module],
        means: Sequence[InputMeans] | None,
        importance: Sequence[float],
    ) -> dict[str, Tensor] | str:
        """What to write into the merged model's layer, by names of :func:`own_parameters` and :meth:`buffers`.

        Args:
            module: the merged model's layer, as it was while the statistics were gathered.
            weight: the solution, ``(g, o, k)``.
            experts: the layer of each expert.
            means: statistics of each task. ``None``: the inputs came from the experts, so they have not drifted.
            importance: one weight per task, summing to one.

        Returns:
            The values, or why the layer cannot hold them.
        """
        return to_originals(module, self.from_matrix(module, weight))

    def buffers(self, layer: nn.Module) -> tuple[str, ...]:
        """Own names of the buffers that :meth:`finish` writes."""
        return ()

    def has_bias(self, module: nn.Module) -> bool:
        """Whether rows get a trailing 1."""
        return getattr(module, "bias", None) is not None

    def key(self, module: nn.Module) -> Hashable:
        """Two layers with one key make the same rows of the same input (q, k and v share their statistics)."""
        return (type(self), self.has_bias(module))

    def multiply(self, weight: Tensor) -> bool:
        """Whether to multiply the drift by the weight ``(g, o, k)`` while gathering, see :class:`InputSums`."""
        return 2 * weight.shape[1] < weight.shape[2]

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Why this call is no such regression after all; ``None`` if it is."""
        return None

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        """Add one call to the sums of a task.

        Args:
            module: the merged model's layer. Its parameters are not read.
            sums: of the task at this layer.
            call: the call, in the merged model and in the expert.

        Returns:
            Whether the expert's rows were used. They are not where their shape differs (inputs routed otherwise).
        """
        expert = call.expert if call.is_paired else None
        expert_rows = iter(()) if expert is None else self.rows(module, expert.args, expert.kwargs)
        start = 0
        for rows, are_positions in self.rows(module, call.merged.args, call.merged.kwargs):
            paired_rows = next(expert_rows, (None, are_positions))[0]
            index = rows_with_data(call.mask, rows.shape[:-2]) if are_positions else None
            end = start + rows.shape[:-2].numel()  # rows that come in pieces come in order
            offset = None if call.stream_drift is None else _flat(call.stream_drift[start:end], index)
            sums.update(
                _flat(rows, index), None if paired_rows is None else _flat(paired_rows, index), call.weight, offset
            )
            start = end
        return expert is not None

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, gap: Tensor
    ) -> Tensor | None:
        """Numbers that are to be added to the output of a call, as rows ``(n, g, o)`` that go with :meth:`rows`.

        Args:
            module: the merged model's layer.
            args: arguments of the call.
            kwargs: keyword arguments of the call.
            weight: ``(g, o, k)``.
            gap: with its elements in the order of the output's, in any shape.

        Returns:
            ``None`` if the output is not of that size, or the type knows no such thing.
        """
        return None


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The input of a layer that was called with these arguments."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def own_names(layer: nn.Module) -> set[str]:
    """What a layer has as parameters, whether or not they are parametrised."""
    return {*layer._parameters, *_parametrised(layer)}


def own_parameter(layer: nn.Module, name: str) -> Tensor:
    """A parameter as the layer uses it, which its parametrisations may compute from others."""
    value = getattr(layer, name)
    assert isinstance(value, Tensor)
    return value.detach()


def own_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter, for what is stored in the layer itself: the originals, if it is parametrised.

    Example::

        >>> list(own_parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))))
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    stored = dict(layer._parameters)
    for name, originals in _parametrised(layer).items():
        stored.update({f"parametrizations.{name}.{own}": p for own, p in originals._parameters.items()})
    return {name: parameter for name, parameter in stored.items() if parameter is not None}


def to_originals(layer: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor] | str:
    """Return values of a layer's parameters as values of its :func:`own_parameters`, or why that is not possible.

    A parametrised value goes through the ``right_inverse`` of its parametrisations. They must give the value back
    (relative error 1e-4, or the precision it is stored in).
    """
    stored = {}
    for name, value in values.items():
        originals = _parametrised(layer).get(name)
        if originals is None:
            stored[name] = value
            continue
        now = own_parameter(layer, name)
        value = value.to(now.dtype)
        if _same(now, value, 1e-5):  # many originals may make one value: these are as good as any
            continue
        kinds = ", ".join(type(parametrisation).__name__.strip("_") for parametrisation in originals)
        inverse, checked = copy.deepcopy(originals), copy.deepcopy(originals)
        try:
            inverse.right_inverse(value)
        except (RuntimeError, ValueError) as error:
            return f"its {name} cannot be written through {kinds}: {error}"
        # In another copy, because an inverse may change buffers too, which would not be merged.
        written = {own: p.detach() for own, p in inverse._parameters.items() if p is not None}
        checked.load_state_dict(written, strict=False)
        if not _same(checked(), value, 1e-4):
            return f"its {name} is parametrised ({kinds}), and the solved one is none that this can express"
        stored.update({f"parametrizations.{name}.{own}": value for own, value in written.items()})
    return stored


def _parametrised(layer: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Names of parameters that ``torch.nn.utils.parametrize`` computes -> their parametrisations and originals."""
    if not parametrize.is_parametrized(layer):
        return {}
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return {name: part for name, part in lists.items() if isinstance(part, parametrize.ParametrizationList)}


def _same(actual: Tensor, expected: Tensor, tolerance: float) -> bool:
    tolerance = max(tolerance, 4 * torch.finfo(expected.dtype).eps)
    return bool((actual - expected).double().norm() <= tolerance * expected.double().norm())


def pieces(rows: Tensor, lead: int) -> Iterator[Tensor]:
    """Split a view along its ``lead`` leading dimensions until no piece has more than :data:`MAX_ROW_ELEMENTS` numbers.

    Yields:
        The pieces, in order.

    Example::

        >>> sum(1 for _ in pieces(torch.zeros(1, 4, 1).expand(3, 4, 2**24), lead=2))
        12
    """
    dim = next((d for d in range(lead) if rows.shape[d] > 1), None)
    if rows.numel() <= MAX_ROW_ELEMENTS or dim is None:
        yield rows
        return
    each = rows.numel() // rows.shape[dim]
    for part in torch.split(rows, max(MAX_ROW_ELEMENTS // each, 1), dim):
        yield from pieces(part, lead)


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """``(g, o, f)`` and ``(g * o,)`` -> ``(g, o, f + 1)``."""
    if bias is None:
        return weight
    return torch.cat([weight, bias.detach().reshape(*weight.shape[:2], 1)], dim=2)


def rows_with_data(mask: Tensor | None, lead: Size) -> Tensor | None:
    """Index of the rows that hold data, where a padding mask applies to the leading dimensions of a layer's input.

    Args:
        mask: ``(samples, positions)`` or ``(positions,)``, ``True`` where data are. ``None``: everywhere.
        lead: leading dimensions of the input. The mask applies if it has this shape, flattened or not, or transposed
            (positions first). If there are as many positions as samples, samples are taken to come first. A single row
            of positions (position ids) counts as often as samples have data there.

    Returns:
        An index of flattened rows. ``None`` if the mask does not apply, and all rows are used.

    Example::

        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> rows_with_data(mask, Size([1, 3])), rows_with_data(mask, Size([2]))
        (tensor([0, 0, 1]), None)
    """
    if mask is None:
        return None
    if lead == mask.shape or lead == (mask.numel(),):
        return mask.flatten()
    if mask.dim() == 2 and lead == mask.T.shape:
        return mask.T.flatten()
    if mask.dim() == 2 and lead in {(1, mask.shape[1]), (mask.shape[1],)}:
        return torch.arange(mask.shape[1], device=mask.device).repeat_interleave(mask.sum(0))
    return None


def _flat(rows: Tensor, index: Tensor | None) -> Tensor:
    rows = rows.reshape(-1, *rows.shape[-2:])
    return rows if index is None else rows[index]
