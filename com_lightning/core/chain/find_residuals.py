"""Which layers write to a residual stream, and which tensors that stream consists of: found by one forward.

A layer is a *writer* if its output is added to something. This is seen by tensor: the additions of one forward are
watched, and each tensor has an origin, the input or output of a layer that it is, or the sum of such. A tensor keeps
its origin through whatever leaves values as they are (dropout in eval mode, a reshape, the transpose of the first two
dimensions). It loses it in anything else, for instance a layer scale.
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
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import LayerRecord, Task, batch_ids
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.tracked import Tracked, name_of, untracked

Term = tuple[Literal["input", "output"], str]
Terms = Mapping[Term, bool]
"""What a tensor is the sum of, and whether the first two dimensions of each are in the other order in it."""

_NOTHING: Terms = {}

_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_PRODUCTS = {"mul", "multiply", "__mul__", "__rmul__"}
# Functions that leave the elements in their order, if the last dimension stays the same.
_RESHAPES = {
    *("view", "reshape", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "view_as", "reshape_as"),
    *("contiguous", "clone", "detach", "to", "type", "float", "double", "half", "bfloat16", "type_as"),
}
_TRANSPOSES = {"transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "t", "T", "mT"}
_FOLLOWED = _ADDITIONS | _PRODUCTS | _RESHAPES | _TRANSPOSES


def find_residuals(tasks: Sequence[Task], merged: Mapping[str, Tensor], run: Run) -> dict[str, list[Source]]:
    """Find the layers whose output is added to a residual stream.

    If the forward fails for every task, a warning says so, ``run.warnings`` keeps it for the report, and no stream is
    repaired. What is wrong with the data or the model is then raised by the merge itself.

    Args:
        tasks: as for :func:`~com_lightning.core.chain.chain.merge_layers`. One expert runs forward, on its
            first batch.
        merged: the tensors that are merged. None is written.
        run: gives the processes. They agree on what the first of them that has a batch has found.

    Returns:
        Layer -> the tensors that its output is added to and that are known before the layer is solved.
    """
    first_batches = {batch.task: batch for batch in reversed(list(batch_ids(tasks)))}
    found: dict[str, list[Source]] | None = None
    problem = ""
    for batch in sorted(first_batches.values()):
        search = ResidualSearch()
        try:
            Sweep(tasks, Models(tasks, merged, ("expert",)), search, batches=[batch]).run()
        except Exception as error:  # of the user's model, perhaps because this batch is a bad one
            problem = problem or f"task '{tasks[batch.task].name}': {type(error).__name__}: {error}"
            continue
        found = search.additions.writers()
        break
    everyone = run.peers.exchange((found, problem))
    for writers, _ in everyone:
        if writers is not None:
            return writers
    for _, why in everyone:
        if why:
            message = (
                "residual: the forward that looks for residual streams failed for every task, so they are not "
                f"repaired ({why}). If that is what you want, set residual=False"
            )
            run.warnings.append(message)
            if run.peers.rank == 0:
                warnings.warn(message, stacklevel=2)
            break
    return {}


class ResidualSearch(Visitor):
    """Watches the additions of one forward of an expert."""

    watches_outputs = True

    def __init__(self) -> None:
        self.additions = _Additions()

    def on_forward(self, forward: CalibrationForward) -> None:
        call = forward.call

        def watched() -> None:
            with self.additions:
                call()

        forward.call = watched

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        layer = sweep.layer(name)
        if refusal := sweep.refusal(layer, calls):
            return LayerRecord(name, layer.layer_type.name, note=refusal)
        self.additions.enter(name, calls[0].input, layer.layer_type.can_repair_stream)
        sweep.mark_solved(sweep.extents(layer))  # so that the same layers are met as in a merge
        return LayerRecord(name, layer.layer_type.name)

    def on_output(self, forward: CalibrationForward, layer: str, output: Any) -> None:
        self.additions.leave(layer, output)


@dataclass(frozen=True)
class _Known:
    """Origin of a tensor, as long as nothing writes to it, and whether that is all that the tensor holds."""

    terms: Terms
    version: int
    whole: bool = False


class _Additions(TorchFunctionMode):
    """Follows what layers get and give through the functions of a forward."""

    def __init__(self) -> None:
        super().__init__()
        self._known = WeakTensorKeyDictionary()
        self._order: dict[Term, int] = {}
        self._shapes: dict[Term, torch.Size] = {}
        self._sums: dict[str, dict[Term, bool]] = {}
        """Layers that can be corrected -> the terms of the sum that their output has gone into."""

    def enter(self, layer: str, value: Tensor, corrects: bool) -> None:
        """A layer is called with a tensor."""
        if corrects:
            self._sums[layer] = {}
        known = self._known.get(value)  # type: ignore[no-untyped-call]
        seen = known is not None and known.whole and known.version == private_torch.version(value)
        if not seen or next(iter(known.terms))[0] == "output":  # of several layers with one input, the first
            self._name(("input", layer), value)
        self._order["input", layer] = len(self._order)

    def leave(self, layer: str, value: Any) -> None:
        """What it gives."""
        if isinstance(value, Tensor):
            self._name(("output", layer), untracked(value))
            self._order["output", layer] = len(self._order)

    def writers(self) -> dict[str, list[Source]]:
        found = {}
        for layer, terms in self._sums.items():
            mine: Term = ("output", layer)
            before = [term for term in terms if self._order[term] <= self._order["input", layer]]
            if before:
                found[layer] = [Source(*term, swapped=terms[term] != terms[mine]) for term in before]
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, terms = name_of(func), _NOTHING
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        before = [(tensor, self._terms(tensor)) for tensor in tensors if name in _FOLLOWED]
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor) or not any(terms for _, terms in before):
            return result
        if name in _ADDITIONS and kwargs.get("alpha", 1) == 1:
            terms = self._added(before, result)
        elif name in _PRODUCTS:
            terms = before[0][1] if any(isinstance(a, (int, float)) and a == 1 for a in args) else _NOTHING
        elif name in _TRANSPOSES:
            terms = self._transposed(before[0], func, args, kwargs)
        elif name in _RESHAPES and result.shape[-1:] == before[0][0].shape[-1:] and result.is_floating_point():
            terms = before[0][1]
        if terms and not self._terms(result):  # an output has got its name within the function
            self._know(result, terms)
        return result

    def _added(self, addends: Sequence[tuple[Tensor, Terms]], result: Tensor) -> Terms:
        total: dict[Term, bool] = {}
        for tensor, terms in addends:
            if tensor.shape != result.shape or isinstance(tensor, (Tracked, torch.nn.Parameter)):
                continue
            if total.keys() & terms:  # twice the same is no sum of different things
                return {}
            total.update(terms)
        # Where the order of dimensions differs, all must be as the sum is: a reshape in between would be in the way.
        if any(total.values()):
            total = {term: swapped for term, swapped in total.items() if self._shape(term, swapped) == result.shape}
        for role, layer in total:
            mine = self._sums.get(layer) if role == "output" else None
            if mine is not None and mine.keys() <= total.keys():  # the first sum, and what that goes into
                mine.update(total)
        return total

    def _transposed(self, of: tuple[Tensor, Terms], func: Any, args: Any, kwargs: Any) -> Terms:
        tensor, terms = of
        probe = torch.empty(tensor.shape, device="meta")
        args = [probe if arg is tensor else arg for arg in args]
        moved = func(*args, **{name: probe if arg is tensor else arg for name, arg in kwargs.items()})
        if moved.stride() == probe.stride():
            return terms
        if tensor.dim() < 3 or moved.stride() != probe.transpose(0, 1).stride():
            return {}
        # Of what has been reshaped before, these are not the first two dimensions.
        return {term: not swapped for term, swapped in terms.items() if self._shape(term, swapped) == tensor.shape}

    def _shape(self, term: Term, swapped: bool) -> torch.Size:
        shape = self._shapes[term]
        return torch.Size((shape[1], shape[0], *shape[2:])) if swapped else shape

    def _name(self, term: Term, tensor: Tensor) -> None:
        self._shapes[term] = tensor.shape
        self._know(tensor, {term: False}, whole=True)

    def _know(self, tensor: Tensor, terms: Terms, whole: bool = False) -> None:
        if not tensor.is_inference():
            self._known[tensor] = _Known(terms, private_torch.version(tensor), whole)

    def _terms(self, tensor: Tensor) -> Terms:
        known = self._known.get(tensor)  # type: ignore[no-untyped-call]
        return known.terms if known is not None and known.version == private_torch.version(tensor) else _NOTHING
