"""Products of an input with a weight along any of their dimensions."""

from __future__ import annotations

import math
import string
from collections.abc import Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.layers.base import LayerCall, LayerType, first, parameter_value
from com_lightning.core.solve.statistics import InputSums


class Contraction(LayerType):
    """``einsum``, ``matmul`` and the like, of an input and a weight.

    Args:
        data, weight, output: one letter per dimension of each, as in ``torch.einsum``.
    """

    name = "contraction"
    can_have_correction = True
    can_repair_stream = True

    def __init__(self, data: str, weight: str, output: str) -> None:
        self.groups = [letter for letter in weight if letter in output and letter in data]
        self.outputs = [letter for letter in weight if letter in output and letter not in data]
        self.inputs = [letter for letter in weight if letter not in output]
        self.lead = [letter for letter in data if letter not in weight]
        self.data, self.weight, self.output = data, weight, output

    @classmethod
    def parse(cls, equation: str, left: Tensor, right: Tensor, weight_first: bool) -> Contraction | None:
        """Return ``torch.einsum(equation, left, right)`` as a contraction.

        Args:
            equation: as for ``torch.einsum``.
            left: the first factor.
            right: the second factor.
            weight_first: whether the first factor is the weight.

        Returns:
            The contraction. ``None`` if a letter occurs twice in a factor, if a dimension that only one factor has is
            summed, or if a dimension of size one is broadcast.
        """
        sides = equation.replace(" ", "").split("->")
        factors = sides[0].split(",")
        if len(sides) != 2 or len(factors) != 2:
            return None
        rest = [letter for letter in string.ascii_letters if letter not in equation]
        ellipses = [tensor.dim() - len(f.replace("...", "")) for f, tensor in zip(factors, (left, right)) if "..." in f]
        widest = rest[: max(ellipses, default=0)]
        named = []
        for factor, tensor in zip(factors, (left, right)):
            dims = tensor.dim() - len(factor.replace("...", ""))
            named.append(factor.replace("...", "".join(widest[len(widest) - dims :]) if dims > 0 else ""))
        output = sides[1].replace("...", "".join(widest))
        sizes: dict[str, int] = {}
        for factor, tensor in zip(named, (left, right)):
            if len(set(factor)) != len(factor) or len(factor) != tensor.dim():
                return None
            if any(sizes.setdefault(letter, size) != size for letter, size in zip(factor, tensor.shape)):
                return None
        weight, data = named if weight_first else reversed(named)
        if any(letter not in data and letter not in output for letter in weight):
            return None
        if any(letter not in weight and letter not in output for letter in data):
            return None
        return cls(data, weight, output)

    def matches(self, module: nn.Module) -> bool:
        return False  # always a function call, never a module

    def key(self, module: nn.Module) -> Hashable:
        return (type(self), self.data, tuple(self.inputs), tuple(self.groups))

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        data = first(args, kwargs)
        data = data.permute([self.data.index(letter) for letter in (*self.lead, *self.groups, *self.inputs)])
        sizes = data.shape[len(self.lead) :]
        groups = sizes[: len(self.groups)].numel()
        yield data.reshape(*data.shape[: len(self.lead)], groups, sizes[len(self.groups) :].numel()), True

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        weight = parameter_value(layer, "weight").permute(self._order)
        a, b = len(self.groups), len(self.groups) + len(self.outputs)
        return weight.reshape(weight.shape[:a].numel(), weight.shape[a:b].numel(), weight.shape[b:].numel())

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        order = self._order
        shape = parameter_value(module, "weight").shape
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return {"weight": weight.reshape([shape[dim] for dim in order]).permute(inverse)}

    def offset(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], weight: Tensor, drift: Tensor
    ) -> Tensor | None:
        sizes = dict(zip(self.weight, parameter_value(module, "weight").shape))
        sizes.update(zip(self.data, first(args, kwargs).shape))
        shape = [sizes[letter] for letter in self.output]
        if drift.numel() != math.prod(shape):
            return None
        order = [self.output.index(letter) for letter in (*self.lead, *self.groups, *self.outputs)]
        return drift.reshape(shape).permute(order).reshape(-1, *weight.shape[:2])

    def has_bias(self, module: nn.Module) -> bool:
        return False

    @property
    def _order(self) -> list[int]:
        return [self.weight.index(letter) for letter in (*self.groups, *self.outputs, *self.inputs)]


class GroupedLinear(LayerType):
    """``torch.nn.functional.grouped_mm`` in a mixture of experts, whose rows are sorted by (mixture) expert.

    Each expert of the mixture is a group with the rows that were sent to it. If it got none, it keeps the average. Rows
    of the fine-tuned expert are used only if both models sent equal numbers of rows to each group.
    """

    name = "grouped linear"
    can_have_correction = True
    reaches_all_groups = False

    def matches(self, module: nn.Module) -> bool:
        return False  # always a function call, never a module

    def has_bias(self, module: nn.Module) -> bool:
        return False

    def rows(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Tensor, bool]]:
        start = 0
        for end in args[1].tolist():
            yield args[0][start:end, None], False
            start = end

    def to_matrix(self, layer: nn.Module, like: nn.Module) -> Tensor:
        return parameter_value(layer, "weight").mT

    def from_matrix(self, module: nn.Module, weight: Tensor) -> dict[str, Tensor]:
        return {"weight": weight.mT}

    def key(self, module: nn.Module) -> Hashable:
        return id(module)  # another layer may send the same rows to other groups

    def gather(self, module: nn.Module, sums: InputSums, call: LayerCall) -> bool:
        merged, expert = call.merged, call.expert
        if expert is not None and not torch.equal(merged.args[1], expert.args[1]):
            expert = None
        expert_rows = iter(()) if expert is None else self.rows(module, expert.args, expert.kwargs)
        groups = []
        for number, (rows, _) in enumerate(self.rows(module, merged.args, merged.kwargs)):
            group = InputSums(False, sums.normalize, sums.multiplies_drift, scratch=sums.scratch)
            group.measures_similarity = sums.measures_similarity
            group.update(rows, next(expert_rows, (None, False))[0], call.weight[number : number + 1])
            groups.append(group)
            sums.drift_norms.add(group.drift_norms)
        grams = [group.gram for group in groups if group.gram is not None]
        drifts = [group.drift for group in groups if group.drift is not None]
        total_rows = sum(group.rows for group in groups)
        sums.add(torch.cat(grams), None if expert is None else torch.cat(drifts), total_rows)
        unit_grams = [group.unit_gram for group in groups if group.unit_gram is not None]
        unit_rows = [group.unit_rows for group in groups if group.unit_rows is not None]
        if unit_grams:
            sums.add_units(torch.cat(unit_grams), torch.cat(unit_rows))
        return expert is not None
