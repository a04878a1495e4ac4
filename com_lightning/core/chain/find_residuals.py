"""Finds the layers that write to a residual stream, and the tensors that the stream consists of, with one forward.

A layer is a *writer* if its output is added to something. To find writers, the additions of one forward are followed.
Each tensor may have an origin: it is the input or output of a layer, or a sum of inputs and outputs. A tensor keeps its
origin through functions that do not change its values (dropout in eval mode, a reshape, the transpose of the first two
dimensions). Other functions, for instance a layer scale, end it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from com_lightning.core.chain.residual_stream import Source
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import LayerRecord, Task, batch_ids
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.tracked import Tracked, name_of, untracked

Term = tuple[Literal["input", "output"], str]
Terms = Mapping[Term, bool]
"""The terms of a sum, and for each whether the sum has its first two dimensions in the other order."""

_NO_TERMS: Terms = {}

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}
# Functions that keep the order of elements, if the last dimension keeps its size.
_RESHAPES = {
    *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view_as", "reshape_as"),
    *("contiguous", "clone", "detach", "to", "type", "float", "double", "half", "bfloat16", "type_as"),
}
_TRANSPOSES = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT"}
_FOLLOWED_FUNCTIONS = _ADDITIONS | _PRODUCTS | _RESHAPES | _TRANSPOSES


def find_residuals(
    tasks: Sequence[Task], merged: Mapping[str, Tensor], context: Context, models: Models | None = None
) -> dict[str, list[Source]]:
    """Find the layers whose output is added to a residual stream.

    If the forward fails for every task, this is a warning, also in ``context.warnings`` for the report, and no stream
    is repaired. The merge itself raises an error if there is a problem with the data or the model.

    Args:
        tasks: as for :func:`~com_lightning.core.chain.chain.merge_layers`. One expert runs forward, on its
            first batch.
        merged: the tensors that are merged. They are not written.
        context: has the processes. All use the result of the first process that has one.
        models: the models of these tasks, in which the experts run. ``None``: they are made here.

    Returns:
        Layer -> the tensors that its output is added to and that are known before the layer is solved.
    """
    first_batches = {batch.task: batch for batch in reversed(list(batch_ids(tasks)))}
    sources: dict[str, list[Source]] | None = None
    problem = ""
    for batch in sorted(first_batches.values()):
        search = ResidualSearch()
        try:
            models = models or Models(tasks, merged, ("expert",))
            Sweep(tasks, models, search, batches=[batch]).run()
        except Exception as error:  # the user's model raises it, perhaps because of a bad batch
            problem = problem or f"task '{tasks[batch.task].name}': {type(error).__name__}: {error}"
            continue
        sources = search.additions.writers()
        break
    results = context.peers.exchange((sources, problem))
    for writers, _ in results:
        if writers is not None:
            return writers
    for _, reason in results:
        if reason:
            message = (
                "residual: the forward that looks for residual streams failed for every task, so they are not "
                f"repaired ({reason}). If that is what you want, set residual=False"
            )
            context.warnings.append(message)
            if context.peers.rank == 0:
                warnings.warn(message, stacklevel=2)
            break
    return {}


class ResidualSearch(Visitor):
    """Follows the additions of one forward of an expert."""

    watches_outputs = True

    def __init__(self) -> None:
        self.additions = _AdditionTracker()

    def on_forward(self, forward: CalibrationForward) -> None:
        call = forward.call

        def call_and_track() -> None:
            with self.additions:
                call()

        forward.call = call_and_track

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        layer = sweep.layer(name)
        if refusal := sweep.refusal(layer, calls):
            return LayerRecord(name, layer.layer_type.name, note=refusal)
        self.additions.enter(name, calls[0].input, layer.layer_type.can_repair_stream)
        sweep.mark_solved(sweep.extents(layer))  # as in a merge, so that the forward visits the same layers
        return LayerRecord(name, layer.layer_type.name)

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> None:
        self.additions.leave(layer, output)


@dataclass(frozen=True)
class _Origin:
    """Origin of a tensor. It is valid while nothing writes to the tensor.

    Attributes:
        terms: the inputs and outputs of layers that the tensor is the sum of.
        version: the tensor's version counter.
        is_exact: whether the tensor object itself is the input or output of a layer.
    """

    terms: Terms
    version: int
    is_exact: bool = False


class _AdditionTracker(TorchFunctionMode):
    """Follows the inputs and outputs of layers through the functions of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self._origins = WeakTensorKeyDictionary()
        self._order: dict[Term, int] = {}
        self._shapes: dict[Term, torch.Size] = {}
        self._sums: dict[str, dict[Term, bool]] = {}
        """Layers that can repair a stream -> the terms of the sum that their output was added to."""

    def enter(self, layer: str, value: Tensor, corrects: bool) -> None:
        """Name the input of a layer, before the layer is called."""
        if corrects:
            self._sums[layer] = {}
        origin = self._origins.get(value)  # type: ignore[no-untyped-call]
        seen = origin is not None and origin.is_exact and origin.version == private_torch.version(value)
        if not seen or next(iter(origin.terms))[0] == "output":  # if several layers have one input, the first names it
            self._set_own_name(("input", layer), value)
        self._order["input", layer] = len(self._order)

    def leave(self, layer: str, value: Any) -> None:
        """Name the output of a layer."""
        if isinstance(value, Tensor):
            self._set_own_name(("output", layer), untracked(value))
            self._order["output", layer] = len(self._order)

    def writers(self) -> dict[str, list[Source]]:
        """The layers whose output is added to tensors that are known before, and these tensors."""
        sources = {}
        for layer, terms in self._sums.items():
            own: Term = ("output", layer)
            before = [term for term in terms if self._order[term] <= self._order["input", layer]]
            if before:
                sources[layer] = [Source(*term, swapped=terms[term] != terms[own]) for term in before]
        return sources

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, terms = name_of(func), _NO_TERMS
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        before = [(tensor, self._terms(tensor)) for tensor in tensors if name in _FOLLOWED_FUNCTIONS]
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not any(terms for _, terms in before):
            return result
        if name in _ADDITIONS and kwargs.get("alpha", 1) == 1:
            terms = self._sum_terms(before, result)
        elif name in _PRODUCTS:
            terms = before[0][1] if any(isinstance(a, (int, float)) and a == 1 for a in args) else _NO_TERMS
        elif name in _TRANSPOSES:
            terms = self._transpose_terms(before[0], func, args, kwargs)
        elif name in _RESHAPES and result.shape[-1:] == before[0][0].shape[-1:] and result.is_floating_point():
            terms = before[0][1]
        if terms and not self._terms(result):  # the output of a layer within the function has an origin already
            self._set_origin(result, terms)
        return result

    def _sum_terms(self, addends: Sequence[tuple[Tensor, Terms]], result: Tensor) -> Terms:
        total: dict[Term, bool] = {}
        for tensor, terms in addends:
            if tensor.shape != result.shape or isinstance(tensor, (Tracked, torch.nn.Parameter)):
                continue
            if total.keys() & terms:  # the sum would have a term twice
                return {}
            total.update(terms)
        # If the order of dimensions differs, all terms must have the shape of the sum. Otherwise they were reshaped.
        if any(total.values()):
            total = {term: swapped for term, swapped in total.items() if self._shape(term, swapped) == result.shape}
        for role, layer in total:
            own = self._sums.get(layer) if role == "output" else None
            if own is not None and own.keys() <= total.keys():  # the first sum, and sums that it is added to
                own.update(total)
        return total

    def _transpose_terms(self, source: tuple[Tensor, Terms], func: Any, args: Any, kwargs: Any) -> Terms:
        tensor, terms = source
        probe = torch.empty(tensor.shape, device="meta")
        args = [probe if arg is tensor else arg for arg in args]
        moved = func(*args, **{name: probe if arg is tensor else arg for name, arg in kwargs.items()})
        if moved.stride() == probe.stride():
            return terms
        if tensor.dim() < 3 or moved.stride() != probe.transpose(0, 1).stride():
            return {}
        # If a term was reshaped before, these are not its first two dimensions.
        return {term: not swapped for term, swapped in terms.items() if self._shape(term, swapped) == tensor.shape}

    def _shape(self, term: Term, swapped: bool) -> torch.Size:
        shape = self._shapes[term]
        return torch.Size((shape[1], shape[0], *shape[2:])) if swapped else shape

    def _set_own_name(self, term: Term, tensor: Tensor) -> None:
        self._shapes[term] = tensor.shape
        self._set_origin(tensor, {term: False}, is_exact=True)

    def _set_origin(self, tensor: Tensor, terms: Terms, is_exact: bool = False) -> None:
        if not tensor.is_inference():
            self._origins[tensor] = _Origin(terms, private_torch.version(tensor), is_exact)

    def _terms(self, tensor: Tensor) -> Terms:
        origin = self._origins.get(tensor)  # type: ignore[no-untyped-call]
        return origin.terms if origin is not None and origin.version == private_torch.version(tensor) else _NO_TERMS
