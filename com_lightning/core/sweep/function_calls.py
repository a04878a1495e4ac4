"""Function calls with shared parameters. Some of them are layers."""

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
    """Finds function calls that are layers, and keeps track of the parameters that were solved or used.

    A "first name" is the name of a parameter, or for a tied one the first of its names.

    Args:
        models: the models of the sweep.

    Attributes:
        layers: name of each function call that is a layer -> how it uses parameters.
        used: first names of parameters that a function used that is no layer. They can no longer be solved.
        newly_used: those of them that were used since the last exchange between processes.
        solved: first name of a parameter -> extents of its solved parts.
        notes: first name of a parameter -> a record that says why it is not solved.
    """

    def __init__(self, models: Models) -> None:
        self.models = models
        self.layers: dict[str, FunctionCall] = {}
        self.used: set[str] = set()
        self.newly_used: set[str] = set()
        self.solved: dict[str, list[tuple[int, int]]] = {}
        self.notes: dict[str, LayerRecord] = {}
        self._functions: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
        """Function and parameter of each layer -> the part of the parameter -> name of the layer."""

    def on_use(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Callable[[Any], Any] | None:
        """Pause the forward if a function that is about to use a tracked parameter is a layer that is not solved yet.

        Args:
            function: the function.
            args: its arguments.
            kwargs: its keyword arguments.

        Returns:
            A function to call with the result, which may return a replacement for it. ``None``: there is none.
        """
        forward = running()
        if not isinstance(forward, CalibrationForward):
            return None
        tracked = list(tracked_in(args, kwargs))
        if forward.id.stream == "merged":
            for tensor in tracked:
                self._refresh(tensor, forward)
        if not any(self._is_solvable(tensor.part) for tensor in tracked):
            self._count_again(forward, function, tracked)
            return None
        if call := recognise(function, args, kwargs, self._is_solvable) if self._is_intact(forward, tracked) else None:
            name, position = self._name_and_position(call)
            self.layers.setdefault(name, replace(call, args=()))
            for part in call.parts.values():
                extent = part.extent(self.models.merged[part.name])
                self._functions.setdefault((name_of(function), part.name), {})[extent] = name
            forward.calls[name] += 1
            if pause(name, position, tuple(map(materialized, call.args)), {}):
                for tensor in tracked if forward.id.stream == "merged" else ():
                    self._refresh(tensor, forward)
                return lambda result: forward.on_output(name, result) if forward.on_output else None

        def on_result(result: Any) -> None:
            if function is Tensor.__setitem__ or any(True for _ in tensors_in(result)):
                for part in [tensor.part for tensor in tracked if self._is_solvable(tensor.part)]:
                    first = self.models.tied[part.name]
                    self.used.add(first)
                    self.newly_used.add(first)
                    note = f"goes into {name_of(function).strip('_')}, where it has no closed form"
                    self.notes.setdefault(first, LayerRecord(first, "parameter", note=note))

        return None if call is not None else on_result

    def _refresh(self, tensor: Tracked, forward: CalibrationForward) -> None:
        """Let a tracked tensor of a merged model have the present value."""
        tensor.refresh(self.models.computed[self.models.merged_name(tensor.part.name, forward.id.batch.task)])

    def _count_again(self, forward: CalibrationForward, function: Callable[..., Any], used: Sequence[Tracked]) -> None:
        """Count a further call of a layer."""
        for tensor in used:
            layers = self._functions.get((name_of(function), tensor.part.name))
            layer = layers and layers.get(tensor.part.extent(self.models.merged[tensor.part.name]))
            if layer:
                forward.calls[layer] += 1
                return

    def _is_solvable(self, part: Part) -> bool:
        """Whether a part of a parameter may still be solved, because no forward has computed with it."""
        return self.models.tied[part.name] not in self.used and self.is_unsolved(part)

    def is_unsolved(self, part: Part) -> bool:
        """Whether no element of a part has been solved."""
        solved = self.solved.get(self.models.tied[part.name])
        if not solved:
            return True
        parameter = self.models.merged[part.name]
        if solved[0] == (0, parameter.numel() - 1):
            return False
        start, end = part.extent(parameter)
        return all(end < a or b < start for a, b in solved)

    def _is_intact(self, forward: CalibrationForward, tracked: Sequence[Tracked]) -> bool:
        """Whether the tensors still equal the parts of the parameters. A forward may have written to a copy."""
        model = self.models.running[forward.id.batch.task, forward.id.stream]
        for tensor in tracked:
            if tensor.part.steps:
                name, parameter = tensor.part.name, model.tensors[tensor.part.name]
                if tensor.target is None and name in model.targets:  # a cast moved it from where it is stored
                    target = model.targets[name]
                    parameter = parameter.to(target.device, target.dtype)
                if not torch.equal(untracked(tensor), tensor.part.of(parameter, casts=True)):
                    return False
        return True

    def _name_and_position(self, call: FunctionCall) -> tuple[str, Position]:
        """Name of a function call, from the parameter that it uses, and its position among all layers."""
        part = next(iter(call.parts.values()))
        name, parameter = part.name, self.models.merged[part.name]
        start, end = part.extent(parameter)
        row = max(parameter[0].numel(), 1) if parameter.dim() else 1
        position = (self.models.positions.get(name.rpartition(".")[0], 0), start // row, self.models.order[name])
        if end - start + 1 == parameter.numel():
            return name, position
        if start % row or (end + 1) % row:
            return f"{name}[{start}:{end + 1} of the elements]", position
        first, last = start // row, (end + 1) // row
        return f"{name}[{first}]" if last - first == 1 else f"{name}[{first}:{last}]", position
