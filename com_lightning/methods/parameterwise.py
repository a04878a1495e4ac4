"""Rules that merge one parameter at a time, from its values in the experts and in the base."""

from __future__ import annotations

import hashlib
import math
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import EllipsisType
from typing import Literal

import torch
from torch import Tensor, nn

from com_lightning.core.sweep.context import each
from com_lightning.core.sweep.task import LayerRecord, NonFiniteError
from com_lightning.core.tensors.matmul import exact_products
from com_lightning.core.tensors.modules import all_finite, average, named_tensors, row_slices
from com_lightning.methods.base import MergeJob, MergingMethod, ParameterRecord

Rows = Literal["outputs", "inputs", "entries"]


@dataclass
class SharedParameter:
    """One parameter, in all experts and in the base.

    Its methods make values when they are called, in at least float32 and on the device to compute on. So a rule holds
    no more values there than it works on.

    Attributes:
        name: name in the experts. For a tied parameter, its first name.
        values: task -> value in that expert, in the order of the tasks. Tasks of importance 0 are left out.
        weights: task -> its importance; their sum is one.
        origin: value in the base. ``None`` if the rule does not need the base.
        target: the merged parameter.
        device: where to compute.
        rows: what the first dimension counts: the layer's outputs, its inputs (transposed convolutions, transformers'
            Conv1D), or the entries of an embedding's table.
    """

    name: str
    values: Mapping[str, Tensor]
    weights: Mapping[str, float]
    origin: Tensor | None
    target: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rows: Rows = "outputs"
    _holds: bool = False
    _base: Tensor | None = None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, the base is made once for all task vectors."""
        self._holds = True
        try:
            yield
        finally:
            self._holds, self._base = False, None

    def parts(self) -> Iterator[tuple[slice | EllipsisType, SharedParameter]]:
        """A few rows at a time, with their place, for rules that act on each element alone."""
        for place in row_slices(self.target) if self.device.type == "cpu" else [...]:
            values = {task: value.detach()[place] for task, value in self.values.items()}
            origin = None if self.origin is None else self.origin.detach()[place]
            part = replace(self, values=values, origin=origin, target=self.target.detach()[place], _base=None)
            with part.held():
                yield place, part

    def by_parts(self, combine: Callable[[SharedParameter], Tensor]) -> Tensor:
        """Apply a rule that acts on each element alone; the result has the precision of the stored parameter."""
        result = torch.empty_like(self.target.detach(), device=self.device)
        for place, part in self.parts():
            result[place] = combine(part)
        return result

    @property
    def tasks(self) -> list[str]:
        """The tasks, in order."""
        return list(self.values)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of computation: float32, or float64 if the parameter has that."""
        return torch.promote_types(self.target.dtype, torch.float32)

    def share(self, task: str) -> float:
        """Importance of a task in a sum over tasks: 1 for each where all count alike."""
        return self.weights[task] * len(self.values)

    def expert(self, task: str) -> Tensor:
        """The value in an expert."""
        return self._working(self.values[task])

    def base(self) -> Tensor:
        """The value in the base."""
        assert self.origin is not None, "a rule that asks for the base says so in `needs`"
        base = self._working(self.origin) if self._base is None else self._base
        self._base = base if self._holds else None
        return base

    def average(self) -> Tensor:
        """The average of the experts."""
        return self._working(average(list(self.values.values()), list(self.weights.values())))

    def vector(self, task: str) -> Tensor:
        """The task vector: the expert minus the base. It is a new tensor, which you may write into."""
        return self.expert(task) - self.base()

    def sum(self, vector: Callable[[str], Tensor] | None = None) -> Tensor:
        """The sum over tasks of the task vectors, or of ``vector(task)``, each times its :meth:`share`."""
        vector = vector or self.vector
        total = self.zeros()
        for task in self.tasks:
            total.add_(vector(task), alpha=self.share(task))
        return total

    def as_matrix(self) -> SharedParameter:
        """The same parameter as a matrix, see :meth:`to_matrix`."""
        values = {task: self.to_matrix(value) for task, value in self.values.items()}
        origin, target = None if self.origin is None else self.to_matrix(self.origin), self.to_matrix(self.target)
        return replace(self, values=values, origin=origin, target=target, rows="outputs", _base=None)

    def to_matrix(self, value: Tensor) -> Tensor:
        """A value as a matrix ``(outputs, inputs)``: of a convolution, as it acts on a flattened patch."""
        flat = value.detach().flatten(1)
        return flat.T if self.rows == "inputs" else flat

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A value as it is stored, from :meth:`to_matrix`."""
        return (matrix.T if self.rows == "inputs" else matrix).reshape(self.target.shape)

    def zeros(self) -> Tensor:
        """Zeros of its shape."""
        return torch.zeros(self.target.shape, dtype=self.dtype, device=self.device)

    def uniform(self, task: str, seed: int) -> Tensor:
        """Return uniform random numbers in [0, 1), one for each element.

        They depend only on seed, task and name: not on the order of parameters or tasks, the number of processes, or
        the device.
        """
        digest = hashlib.sha256(f"{seed}/{task}/{self.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        return torch.rand(self.target.shape, generator=generator, dtype=torch.float32).to(self.device)

    def _working(self, value: Tensor) -> Tensor:
        return value.detach().to(self.device, self.dtype)


Combine = Callable[[SharedParameter], "Tensor | None"]
_INPUTS_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class ParameterRule(MergingMethod):
    """A rule that needs no data, and merges each parameter on its own.

    :meth:`combine` gets every shared floating-point parameter once, tied ones under their first name. Buffers, such as
    running statistics, are averaged. Several processes divide the parameters among them.
    """

    needs = frozenset()
    starts_from_average = False

    @abstractmethod
    def combine(self, parameter: SharedParameter) -> Tensor | None:
        """The merged value; ``None`` for the average."""

    def combiner(self, parameters: Sequence[SharedParameter]) -> Combine:
        """:meth:`combine`, or a function like it that makes use of all parameters."""
        return self.combine

    def merge(self, job: MergeJob) -> list[LayerRecord]:
        weights = dict(zip((task.name for task in job.tasks), self.weights([task.name for task in job.tasks])))
        device = job.device or torch.device("cpu")
        # Singular vectors and the like lose more to TF32 or bfloat16 than a forward does.
        with job.context.peers.shares_failures(), torch.autocast(device.type, enabled=False), exact_products():
            return self._merge(job, list(shared_parameters(job, weights)))

    @torch.no_grad()
    def _merge(self, job: MergeJob, parameters: Sequence[SharedParameter]) -> list[LayerRecord]:
        records: list[LayerRecord] = []
        peers = job.context.peers
        combine = self.combiner(parameters)
        for number, parameter in enumerate(each(parameters, job.context.progress, "merging parameters")):
            start, owner = time.perf_counter(), number % peers.size
            value = None
            if owner == peers.rank:
                with parameter.held():
                    value = finite(combine(parameter), parameter)
            if peers.exchange(value is not None)[owner]:  # returns if no process has failed
                if value is None:
                    value = torch.empty_like(parameter.target, device=parameter.device)
                peers.broadcast(value, owner)
                parameter.target.copy_(value)
                count = {parameter.name: parameter.target.numel()}
                record = ParameterRecord(parameter.name, type(self).__name__, count)
                record.seconds = time.perf_counter() - start
                job.context.on_layer(record)
                records.append(record)
            else:
                parameter.target.copy_(parameter.average())
        return records

    def _out_of(self, low: float, high: float, **settings: float) -> list[str]:
        """Problems of settings that must be above ``low``, and at most ``high``."""
        return [
            f"{name}: must be above {low:g} and at most {high:g}, got {value}"
            for name, value in settings.items()
            if not low < value <= high
        ]


def shared_parameters(job: MergeJob, weights: Mapping[str, float]) -> Iterator[SharedParameter]:
    """The parameters of a job. A tied parameter is there once."""
    counted = [task for task in job.tasks if weights[task.name] > 0]
    states = {task.name: {name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in counted}
    rows = _rows(counted[0].expert)
    seen: set[int] = set()
    for name, target in job.merged.items():
        if isinstance(target, nn.Parameter) and target.numel() and id(target) not in seen:
            seen.add(id(target))
            values = {task: state[name] for task, state in states.items()}
            origin = job.base[name] if job.base is not None else None
            device = job.device or target.device
            shares = {task: weights[task] for task in values}
            kind = rows.get(id(values[counted[0].name]), "outputs")
            yield SharedParameter(name, values, shares, origin, target, device, kind)


def _rows(expert: nn.Module) -> dict[int, Rows]:
    """``id`` of each weight whose first dimension does not count a layer's outputs -> what it counts."""
    rows: dict[int, Rows] = {}
    for part in expert.modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
            rows[id(part.weight)] = "entries"
        elif isinstance(part, _INPUTS_FIRST) or type(part).__name__ == "Conv1D":  # of transformers; torch has Conv1d
            rows.setdefault(id(part.weight), "inputs")
    return rows


def scale_problems(scale: float) -> list[str]:
    """Problems of a factor of task vectors."""
    return [] if math.isfinite(scale) else [f"scale: must be a finite number, got {scale}"]


def finite(value: Tensor | None, parameter: SharedParameter) -> Tensor | None:
    """Return a merged value in the precision that it is stored in.

    Raises:
        NonFiniteError: if it holds NaN or infinity. The message names the cause.
    """
    rounded = value.to(parameter.target.dtype) if value is not None else None
    if rounded is None or all_finite(rounded):
        return rounded
    for task, expert in parameter.values.items():
        if not all_finite(expert):
            raise NonFiniteError(f"{parameter.name} of expert '{task}' holds NaN or infinity")
    if parameter.origin is not None and not all_finite(parameter.origin):
        raise NonFiniteError(f"{parameter.name} of the base holds NaN or infinity")
    dtype = str(parameter.target.dtype).removeprefix("torch.")
    raise NonFiniteError(
        f"the merged value of {parameter.name} is too large for {dtype}; lower the rule's scale, or merge in float32"
    )
