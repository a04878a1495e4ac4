"""Plain forwards: a batch runs through an expert by itself, and is watched.

Each layer notes what it is first called with. A forward that changes the expert's weights is stopped before it does,
and so is one that waits for other processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from com_lightning.core.sweep.distributed import NoCommunication
from com_lightning.core.sweep.lockstep import seeded
from com_lightning.core.sweep.models import Models, run_before_forwards
from com_lightning.core.sweep.sweep import without_fast_path
from com_lightning.core.sweep.task import SEEDS_OF_TASK, BatchId, Task
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.modules import copy_module, copy_on_same_storage
from com_lightning.core.tensors.placement import RunningModel
from com_lightning.core.tensors.tracked import Part, Tracked, WriteCount, untracked
from com_lightning.errors import MergeError

SAMPLED = 256
"""Number of values of each input that are compared."""


@dataclass
class Digest:
    """A few numbers of a tensor, by which it is compared with another one."""

    shape: tuple[int, ...]
    values: Tensor
    norm: Tensor
    precision: float

    @staticmethod
    def of(value: Any) -> Digest | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided or not value.numel():
            return None
        value = untracked(value).detach()
        flat = value.flatten()
        values = flat[:: max(len(flat) // SAMPLED, 1)]
        values = (values.abs() if values.is_complex() else values).double()
        precision = torch.finfo(value.dtype).eps if value.is_floating_point() else 0.0
        norm = torch.linalg.vector_norm(flat if flat.is_floating_point() else values, dtype=torch.float64)
        return Digest(tuple(value.shape), values.nan_to_num(), norm.nan_to_num(), precision)

    def is_close(self, other: Digest | None, tolerance: float) -> bool:
        if other is None or self.shape != other.shape:
            return False
        pairs = ((self.values, other.values), (self.norm[None], other.norm[None]))
        return all(float((a - b).norm()) <= tolerance * max(float(a.norm()), float(b.norm())) for a, b in pairs)


Trace = dict[str, Digest | None]
"""Layer -> what it was first called with, in the order of these calls."""


def first_difference(one: Trace, other: Trace) -> str | None:
    digests = [digest for digest in (*one.values(), *other.values()) if digest is not None]
    tolerance = max([1e-3, *(8 * digest.precision for digest in digests)])
    if any(digest.values.device.type != "cpu" for digest in digests):
        tolerance = max(tolerance, 1e-2)
    for layer, digest in one.items():
        if layer not in other or (digest is not None and not digest.is_close(other[layer], tolerance)):
            return layer
    return next((layer for layer in other if layer not in one), None)


def record(module: nn.Module, models: Models, trace: Trace, watch: _Watch | None = None) -> None:
    """Have each layer of a module note what it is first called with."""

    def note(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name in trace or private_torch.inside_transform():
            return
        trace[name] = Digest.of(args[0] if args else next(iter(kwargs.values()), None))
        if watch is not None:
            watch.check(name, layer, models.candidates[name].written(name))

    for name, layer in module.named_modules():
        if name in models.candidates:
            layer.register_forward_pre_hook(partial(note, name), with_kwargs=True)


def plain_forward(
    models: Models, batch: BatchId, task: Task, content: Any, has_peers: bool, what: str = "calibration"
) -> tuple[Trace, list[str]]:
    """Run a batch through the expert alone.

    Args:
        models: the models, the expert among them.
        batch: the batch.
        task: its task.
        content: what to run as that batch.
        has_peers: whether there are other processes, for which no forward may wait.
        what: what messages call the forward.

    Returns:
        What the layers were called with, and the names of buffers that were written to.

    Raises:
        MergeError: if the forward changes weights, or communicates.
    """
    running, trace, name = (
        models.running[batch.task, "expert"],
        Trace(),
        f"task '{task.name}': {type(task.expert).__name__}",
    )
    module = _on_same_storage(running)
    watch = _Watch(running, module, what)
    try:
        with without_fast_path(), NoCommunication(name) if has_peers else nullcontext(), watch:
            run_before_forwards(batch.task, task, module, "expert")
            watch.began = True
            record(module, models, trace, watch)
            with seeded(SEEDS_OF_TASK * batch.task + batch.number):
                task.call(module, content, batch.number)
    except _Stopped:
        pass
    except Exception:
        if not watch.problem:  # what was stopped may have been caught, and something else raised
            raise
    if watch.problem:
        raise MergeError([f"{name} {watch.problem}"])
    return trace, sorted(watch.written)


def _on_same_storage(running: RunningModel) -> nn.Module:
    """A copy whose parameters may be replaced, with buffers of its own. Offloaded weights are moved when used."""
    offloaded = {
        id(running.tensors[name]): Tracked.of(
            running.tensors[name], Part(name), _unnoticed, WriteCount(), target=target
        )
        for name, target in running.targets.items()
    }
    module = copy_module(running.module, offloaded) if offloaded else copy_on_same_storage(running.module)
    for part in module.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else buffer.clone()
    return module


def _unnoticed(function: Any, args: Any, kwargs: Any) -> None:
    return None


class _Stopped(BaseException):
    """Ends a plain forward. An ``except Exception`` in the model does not catch it."""


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Stops a plain forward that changes the expert's weights, and leaves them as they were.

    Args:
        model: the expert.
        module: the copy of it that runs, with buffers of its own.
        what: what messages call the forward.

    Attributes:
        problem: what the forward does wrong. It continues the name of the module.
        written: names of buffers that were written to.
        began: whether the forward has begun, after what comes once before all forwards.
    """

    supports_higher_order_operators = True

    def __init__(self, model: RunningModel, module: nn.Module, what: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tensors, self._what = model.tensors, what
        self._names = {
            private_torch.address(tensor.untyped_storage()): name
            for name, tensor in model.tensors.items()
            if isinstance(tensor, nn.Parameter) and tensor.layout == torch.strided
        }
        buffers = {name: buffer for name, buffer in module.named_buffers() if buffer.layout == torch.strided}
        self._names.update({private_torch.address(b.untyped_storage()): name for name, b in buffers.items()})
        self._buffers = set(buffers)
        self.problem: str | None = None
        self.written: set[str] = set()
        self.began = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not private_torch.is_operator(func):
            return func(*args, **kwargs)
        tensors = [tensor for tensor in private_torch.written(func, args, kwargs) if self._name(tensor)]
        if not tensors or "renorm" in func.name():  # embeddings with max_norm scale the rows that they look up
            return func(*args, **kwargs)
        before = [tensor.clone() for tensor in tensors]
        result = func(*args, **kwargs)
        changed = [(tensor, values) for tensor, values in zip(tensors, before) if not torch.equal(tensor, values)]
        names = {self._name(tensor) for tensor, _ in changed}
        self.written |= {name for name in names if name in self._buffers}
        if weights := [(tensor, values) for tensor, values in changed if self._name(tensor) not in self._buffers]:
            for tensor, values in weights:
                tensor.copy_(values)
            self._stop(self._changed(str(self._name(weights[0][0]))))
        return result

    def check(self, name: str, layer: nn.Module, parameters: Mapping[str, str]) -> None:
        """Check that a layer, when it is called, has the weights of the expert."""
        for local, full in parameters.items():
            actual: Any = layer
            for attribute in local.split("."):
                actual = getattr(actual, attribute, None)
            expected = self._tensors.get(full)
            if type(actual) not in (Tensor, nn.Parameter) or not isinstance(expected, nn.Parameter):
                continue
            same = actual.shape == expected.shape and actual.device == expected.device
            is_parameter = self._name(actual) not in (None, *self._buffers)
            if not same or not (is_parameter or torch.equal(actual, expected)):
                self._stop(self._changed(full))

    def _name(self, tensor: Tensor) -> str | None:
        """Name of the parameter or buffer that a tensor is a part of."""
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return None
        return self._names.get(private_torch.address(tensor.untyped_storage()))

    def _changed(self, name: str) -> str:
        where = f"in its {self._what} forward" if self.began else f"before its {self._what} forwards"
        return (
            f"computes with other weights than the expert's: '{name}' is changed {where}. If averaged weights (EMA) "
            "are swapped in for validation, the merge would be validated with them, and not with what was merged: give "
            "the averaged weights as the expert's state dict, to a module that swaps nothing"
        )

    def _stop(self, problem: str) -> None:
        if not self.problem:
            self.problem = problem
            raise _Stopped
