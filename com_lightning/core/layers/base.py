"""The base class of layer types, and functions that they share."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Size, Tensor, nn
from torch.nn.utils import parametrize

from com_lightning.core.solve.statistics import InputMeans, InputSums


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call of a layer."""

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
        """Return the same arguments, with floating-point tensors cast to ``dtype``."""

        def cast(value: Any) -> Any:
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Arguments(tuple(map(cast, self.args)), {name: cast(value) for name, value in self.kwargs.items()})


Layout = Literal["samples first", "positions first", "flat", "one row"]
"""How the positions of a mask lie in a tensor: ``(samples, positions, ...)``, ``(positions, samples, ...)``,
``(samples * positions, ...)``, or ``(positions, ...)`` once for all samples."""


@dataclass
class RowMask:
    """Tells which rows of a layer's input hold data and not padding.

    Attributes:
        choices: masks that may belong to the rows, ``(samples, positions)`` or ``(positions,)``, ``True`` at data, and
            how their positions lie in the input. ``None`` for the layout: shapes alone tell. The first that fits is
            used.
        is_uncertain: whether the masks may belong to other rows although they fit.
        has_applied: whether a mask has fitted. Set by :func:`rows_with_data`.
        was_doubtful: whether a mask has fitted that may belong to other rows. Set by :func:`rows_with_data`.
    """

    choices: Sequence[tuple[Tensor, Layout | None]]
    is_uncertain: bool = False
    has_applied: bool = False
    was_doubtful: bool = False


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in the merged model, and the call of the expert's layer on the same batch.

    Attributes:
        merged: the arguments in the merged model.
        expert: the arguments in the expert, if its inputs are used.
        weight: the expert's weight, ``(g, o, k)``.
        mask: tells which rows are data, for :func:`rows_with_data`. ``None``: there is no padding.
        stream_drift: drift of a residual stream, which is added to the target, in the form that
            :meth:`LayerType.offset` returns. It needs inputs of the same shape in both models, and sums that multiply
            the drift by the weight.
    """

    merged: Arguments
    expert: Arguments | None
    weight: Tensor
    mask: RowMask | None = None
    stream_drift: Tensor | None = None

    @property
    def is_paired(self) -> bool:
        """Whether the inputs of both models have the same shape, so that their rows can be compared."""
        return self.expert is not None and self.expert.input.shape == self.merged.input.shape


MAX_ROW_ELEMENTS = 2**24
"""Rows can take more memory than the input that they are made of. Such rows come in pieces of at most this many
numbers, 64 MiB in float32. While a piece is added to the statistics, some seven tensors of that size exist (less than
half a GiB), whatever the sizes of image, kernel and batch."""


class LayerType(ABC):
    """One type of layer as a regression of its output on its input."""

    name: str
    """The name in the report."""
    reaches_all_groups: bool = True
    """Whether each row has inputs for all groups, so that a Gram matrix of zeros means inputs of zeros."""
    can_have_correction: bool = False
    """Whether its weight is a matrix, which can have a correction of low rank for each task."""
    can_repair_stream: bool = False
    """Whether the layer can repair the drift of a residual stream that its output is added to, see :meth:`offset`."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether ``module`` is a layer of this type. No data has been seen yet."""

    @abstractmethod
    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        """Turn the arguments of one call into rows of the regression.

        Yields:
            Rows of shape ``(*lead, g, f)``, and whether a padding mask applies to their leading dimensions.
        """

    @abstractmethod
    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        """Turn the parameters of an expert's layer into a weight ``(g, o, k)``, with the bias in the last column.

        Args:
            layer: the expert's layer.
            like: the merged model's layer. The weight fits the rows of this layer, which may depend on its buffers.

        Returns:
            The weight.
        """

    @abstractmethod
    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        """Turn a weight into parameters, by name: the inverse of :meth:`to_matrix`."""

    def finish(
        self,
        module: nn.Module,
        weight: Tensor,
        experts: Sequence[nn.Module],
        means: Sequence[InputMeans] | None,
        importance: Sequence[float],
    ) -> dict[str, Tensor] | str:
        """Return the tensors to write into the merged model's layer.

        Args:
            module: the merged model's layer, as it was while the statistics were gathered.
            weight: the solution, ``(g, o, k)``.
            experts: the layer of each expert.
            means: statistics of each task. ``None``: the inputs came from the experts, so they have not drifted.
            importance: one weight per task, summing to one.

        Returns:
            The values, by names of :func:`stored_parameters` and :meth:`buffers`. If the layer cannot hold the
            solution, the reason.
        """
        return to_originals(module, self.from_matrix(module, weight))

    def buffers(self, layer: nn.Module) -> tuple[str, ...]:
        """Return the names, in the layer, of the buffers that :meth:`finish` writes."""
        return ()

    def has_bias(self, module: nn.Module) -> bool:
        """Whether rows get a trailing 1."""
        return getattr(module, "bias", None) is not None

    def key(self, module: nn.Module) -> Hashable:
        """Return a key. Layers with equal keys make the same rows of the same input: q, k and v share statistics."""
        return (type(self), self.has_bias(module))

    def multiplies_drift(self, weight: Tensor) -> bool:
        """Whether to multiply the drift by the weight ``(g, o, k)`` while gathering, see :class:`InputSums`."""
        return 2 * weight.shape[1] < weight.shape[2]

    def refuses(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return why this call cannot be solved as a regression; ``None`` if it can."""
        return None

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        """Add one call to the sums of a task.

        Args:
            module: the merged model's layer. Its parameters are not read.
            sums: the sums of the task at this layer.
            call: the call, in the merged model and in the expert.

        Returns:
            Whether the expert's rows were used. They are not used if their shape differs, for instance because the
            models route inputs differently.
        """
        expert = call.expert if call.is_paired else None
        expert_rows = iter(()) if expert is None else self.rows(module, expert.args, expert.kwargs)
        start = 0
        for rows, are_positions in self.rows(module, call.merged.args, call.merged.kwargs):
            paired_rows = next(expert_rows, (None, are_positions))[0]
            index = rows_with_data(call.mask, rows.shape[:-2]) if are_positions else None
            end = start + rows.shape[:-2].numel()  # pieces come in the order of the rows
            offset = None if call.stream_drift is None else _flat(call.stream_drift[start:end], index)
            sums.update(
                _flat(rows, index), None if paired_rows is None else _flat(paired_rows, index), call.weight, offset
            )
            start = end
        return expert is not None

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, drift: Tensor
    ) -> Tensor | None:
        """Reshape the drift of a residual stream to rows ``(n, g, o)``, in the order of :meth:`rows`.

        Args:
            module: the merged model's layer.
            args: arguments of the call.
            kwargs: keyword arguments of the call.
            weight: the layer's weight, ``(g, o, k)``.
            drift: the drift, in any shape, with its elements in the order of the output's elements.

        Returns:
            The rows. ``None`` if the output has another size, or the type cannot repair a stream.
        """
        return None


def first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a layer that was called with these arguments: the first of them."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value


def parameter_names(layer: nn.Module) -> set[str]:
    """Return the names of a layer's parameters, parametrised ones included."""
    return {*layer._parameters, *_parametrised(layer)}


def parameter_value(layer: nn.Module, name: str) -> Tensor:
    """Return a parameter as the layer uses it. Its parametrisations may compute it from other tensors."""
    value = getattr(layer, name)
    assert isinstance(value, Tensor)
    return value.detach()


def stored_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """Return name -> parameter for the tensors that the layer stores: the originals, if a parameter is parametrised.

    Example::

        >>> list(stored_parameters(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))))
        ['bias', 'parametrizations.weight.original0', 'parametrizations.weight.original1']
    """
    stored = dict(layer._parameters)
    for name, originals in _parametrised(layer).items():
        stored.update({f"parametrizations.{name}.{original}": p for original, p in originals._parameters.items()})
    return {name: parameter for name, parameter in stored.items() if parameter is not None}


def to_originals(layer: nn.Module, values: dict[str, Tensor]) -> dict[str, Tensor] | str:
    """Turn values of a layer's parameters into values of its :func:`stored_parameters`.

    A parametrised value goes through the ``right_inverse`` of its parametrisations. They must then reproduce the value,
    up to a relative error of 1e-4 or of the precision that it is stored in.

    Args:
        layer: the layer.
        values: name of a parameter -> value.

    Returns:
        Name of a stored parameter -> value. If the parametrisations cannot express a value, the reason.
    """
    stored = {}
    for name, value in values.items():
        originals = _parametrised(layer).get(name)
        if originals is None:
            stored[name] = value
            continue
        present = parameter_value(layer, name)
        value = value.to(present.dtype)
        if _same(present, value, 1e-5):  # different originals may give the same value: keep these
            continue
        classes = ", ".join(type(parametrisation).__name__.strip("_") for parametrisation in originals)
        inverse, checked = copy.deepcopy(originals), copy.deepcopy(originals)
        try:
            inverse.right_inverse(value)
        except (RuntimeError, ValueError) as error:
            return f"its {name} cannot be written through {classes}: {error}"
        # An inverse may also change buffers, which are not merged. So the check uses a copy with the old buffers.
        written = {original: p.detach() for original, p in inverse._parameters.items() if p is not None}
        checked.load_state_dict(written, strict=False)
        if not _same(checked(), value, 1e-4):
            return f"its {name} is parametrised ({classes}), and the parametrisation cannot express the solved value"
        stored.update({f"parametrizations.{name}.{original}": p for original, p in written.items()})
    return stored


def _parametrised(layer: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """Name of each parameter that ``torch.nn.utils.parametrize`` computes -> its parametrisations and originals."""
    if not parametrize.is_parametrized(layer):
        return {}
    lists = layer.parametrizations
    assert isinstance(lists, nn.ModuleDict)
    return {name: entry for name, entry in lists.items() if isinstance(entry, parametrize.ParametrizationList)}


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
    slice_size = rows.numel() // rows.shape[dim]
    for piece in torch.split(rows, max(MAX_ROW_ELEMENTS // slice_size, 1), dim):
        yield from pieces(piece, lead)


def with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Append a bias ``(g * o,)``, if there is one, to a weight ``(g, o, f)`` as its last column."""
    if bias is None:
        return weight
    return torch.cat([weight, bias.detach().reshape(*weight.shape[:2], 1)], dim=2)


def rows_with_data(mask: RowMask | None, lead: Size) -> Tensor | None:
    """Return an index of the rows that hold data and not padding.

    Args:
        mask: the masks that may apply. ``None``: there is no padding.
        lead: leading dimensions of the layer's input. A mask applies if it has this shape, flattened or not, or
            transposed (positions first). If shapes alone tell, and there are as many positions as samples, samples are
            taken to come first. In a single row of positions (position ids), each position counts once for each sample
            that has data there.

    Returns:
        An index of flattened rows. ``None`` if no mask applies; then all rows are used.

    Example::

        >>> mask = RowMask([(torch.tensor([[True, True, False], [True, False, False]]), None)])
        >>> rows_with_data(mask, Size([1, 3])), rows_with_data(mask, Size([2]))
        (tensor([0, 0, 1]), None)
    """
    if mask is None:
        return None
    fitting = [
        (data, fit)
        for data, layout in mask.choices
        for fit in _fitting(data, lead)
        if layout in (None, fit) or len(data) == 1  # then all layouts come to the same thing
    ]
    if not fitting:
        return None
    mask.has_applied = True
    may_be_samples = any(layout is None and lead == data.shape[:1] == data.shape[1:] for data, layout in mask.choices)
    mask.was_doubtful |= mask.is_uncertain or may_be_samples or len(fitting) > 1
    data, layout = fitting[0]
    if layout == "one row":
        return torch.arange(data.shape[1], device=data.device).repeat_interleave(data.sum(0))
    return (data.T if layout == "positions first" else data).flatten()


def _fitting(mask: Tensor, lead: Size) -> Iterator[Layout]:
    """The layouts in which a mask fits rows of a shape. Layouts that come to the same thing are one."""
    if lead == mask.shape:
        yield "samples first"
    elif lead == (mask.numel(),):
        yield "flat"
    if mask.dim() == 2 and len(mask) > 1:
        if lead == mask.T.shape:
            yield "positions first"
        if lead in {(1, mask.shape[1]), (mask.shape[1],)}:
            yield "one row"


def _flat(rows: Tensor, index: Tensor | None) -> Tensor:
    rows = rows.reshape(-1, *rows.shape[-2:])
    return rows if index is None else rows[index]
