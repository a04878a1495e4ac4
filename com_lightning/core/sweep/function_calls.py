"""The function calls that forwards make with shared parameters, and which of them are layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from com_lightning.core.layers.functional import FunctionCall, recognise
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import Position, pause, running
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.tracked import Part, Tracked, materialized, name_of, tensors_in, tracked_in, untracked


class FunctionCalls:
    """What has become of each shared parameter so far.

    Attributes:
        layers: name of each function call that is a layer -> how it uses parameters.
        used: first name of each parameter that went into a function that is no layer: too late for one that is.
        entered: those of them that have come to be used since the processes last met.
        solved: first name of a parameter -> extents of the parts of it that are solved.
        notes: first name of a parameter -> why it is not solved.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.layers: dict[str, FunctionCall] = {}
        self.used: set[str] = set()
        self.entered: set[str] = set()
        self.solved: dict[str, list[tuple[int, int]]] = {}
        self.notes: dict[str, LayerRecord] = {}

    def on_use(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[Any], Any] | None:
        """A watched parameter is about to enter a function: pause there if it is a layer that is not solved yet.

        Returns:
            What to call with the function's result. If that returns something, it replaces the result.
        """
        forward = running()
        if not isinstance(forward, CalibrationForward):
            return None
        watched = list(tracked_in(args, kwargs))
        if forward.id.stream == "merged":
            for entry in watched:
                entry.refresh(self.models.computed[entry.part.name])
        if not any(self._is_free(entry.part) for entry in watched):
            return None
        if call := recognise(function, args, kwargs, self._is_free) if self._is_intact(forward, watched) else None:
            label, place = self._placed(call)
            self.layers.setdefault(label, replace(call, args=()))
            if pause(label, place, tuple(map(materialized, call.args)), {}):
                for entry in watched if forward.id.stream == "merged" else ():
                    entry.refresh(self.models.computed[entry.part.name])
                return lambda result: forward.on_output(label, result) if forward.on_output else None

        def leaving(result: Any) -> None:
            if function is Tensor.__setitem__ or any(True for _ in tensors_in(result)):
                for part in [entry.part for entry in watched if self._is_free(entry.part)]:
                    first = self.models.tied[part.name]
                    self.used.add(first)
                    self.entered.add(first)
                    note = f"goes into {name_of(function).strip('_')}, where it has no closed form"
                    self.notes.setdefault(first, LayerRecord(first, "parameter", note=note))

        return None if call is not None else leaving

    def _is_free(self, part: Part) -> bool:
        """Whether a function of a part of a parameter may be solved: no forward has computed with it yet."""
        return self.models.tied[part.name] not in self.used and self.is_unsolved(part)

    def is_unsolved(self, part: Part) -> bool:
        """Whether no element of a part has been solved."""
        solved = self.solved.get(self.models.tied[part.name])
        if not solved:
            return True
        whole = self.models.merged[part.name]
        if solved[0] == (0, whole.numel() - 1):
            return False
        start, end = part.extent(whole)
        return all(end < a or b < start for a, b in solved)

    def _is_intact(self, forward: CalibrationForward, watched: Sequence[Tracked]) -> bool:
        """Whether the tensors hold what they were picked from; a forward may have written into a copy."""
        model = self.models.running[forward.id.batch.task, forward.id.stream]
        for entry in watched:
            if entry.part.steps:
                name, own = entry.part.name, model.tensors[entry.part.name]
                if entry.target is None and name in model.targets:  # it was brought there to be cast
                    own = own.to(*model.targets[name])
                if not torch.equal(untracked(entry), entry.part.of(own, casts=True)):
                    return False
        return True

    def _placed(self, call: FunctionCall) -> tuple[str, Position]:
        """Name of a function call by the parameter that it uses, and its place among all layers."""
        part = next(iter(call.parts.values()))
        name, whole = part.name, self.models.merged[part.name]
        start, end = part.extent(whole)
        row = max(whole[0].numel(), 1) if whole.dim() else 1
        place = (self.models.places.get(name.rpartition(".")[0], 0), start // row, self.models.order[name])
        if end - start + 1 == whole.numel():
            return name, place
        if start % row or (end + 1) % row:
            return f"{name}[{start}:{end + 1} of the elements]", place
        first, last = start // row, (end + 1) // row
        return f"{name}[{first}]" if last - first == 1 else f"{name}[{first}:{last}]", place
