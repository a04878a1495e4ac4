"""The models of a sweep: the experts as they are stored, the merged model, and the models that forwards run in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from com_lightning.core.layers.candidates import Candidate, candidates
from com_lightning.core.layers.functional import FunctionCall
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.lockstep import seeded
from com_lightning.core.sweep.task import SEEDS_OF_TASK, Stream, Task
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module, named_tensors, tied_names
from com_lightning.core.tensors.placement import Placement, RunningModel
from com_lightning.core.tensors.tracked import Part


class Models:
    """All modules and tensors of a sweep. In all of them, attention is split into its linear layers.

    Args:
        tasks: the experts.
        merged: name of each shared parameter or buffer -> its merged value.
        streams: the models that run for each task.
        anchor: the same names -> the value that solutions are pulled towards, for rules that need it.
        task_tensors: name of each parameter of which every task has its own -> one tensor for each task.
        fixed: name of other tensors that replace the expert's in the merged model -> tensor. They are not merged.

    Attributes:
        candidates: the modules that are layers, by name.
        merged: name -> merged parameter or buffer, in its stored precision. Includes the parts of packed parameters.
        packed_names: name of each such part -> name of the packed parameter.
        experts: the experts as they are stored.
        tensors: for each expert, the names of ``merged`` -> its tensor.
        reference: the merged model, in its stored precision.
        running: task and stream -> the model that the forwards run in.
        computed: name -> tensor that merged models compute with: the merged tensor, or a copy on another device or in
            another precision.
        moved: weights that were moved to the device for the forwards that pass the present layer, see
            :class:`~com_lightning.core.tensors.tracked.Target`.
        device: the device on which statistics are gathered.
        tied: see :func:`~com_lightning.core.tensors.modules.tied_names`.
        positions: name of each module -> its position. A module comes after all modules within it.
        order: name of each parameter and buffer -> its position.
        buffers: names of the buffers.
        anchor: the model that solutions are pulled towards, and its tensors, for rules that need it.
        task_tensors: name of each parameter of which every task has its own -> its names in :attr:`merged`, by task.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        merged: Mapping[str, Tensor],
        streams: Sequence[Stream],
        anchor: Mapping[str, Tensor] | None = None,
        task_tensors: Mapping[str, Sequence[Tensor]] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        tensors_by_task, self.streams = task_tensors or {}, tuple(streams)
        self.candidates: dict[str, Candidate] = {}
        self.merged = dict(merged)
        self.packed_names: dict[str, str] = {}
        self.task_tensors = {name: [f"{name} of {task.name}" for task in tasks] for name in tensors_by_task}
        for name, keys in self.task_tensors.items():
            self.merged.update(zip(keys, tensors_by_task[name]))
        self.experts: list[nn.Module] = []
        for task in tasks:
            self.candidates.update(candidates(task.expert, merged))
            expert = copy_module(task.expert)
            for name, (packed, rows) in split_attention(expert).items():
                if packed in merged:  # a view: writing to it writes to the packed parameter
                    self.merged.setdefault(name, nn.Parameter(merged[packed].detach()[rows], requires_grad=False))
                    self.packed_names[name] = packed
                if packed in tensors_by_task and name not in self.task_tensors:
                    self.task_tensors[name] = [f"{name} of {other.name}" for other in tasks]
                    parts = [
                        nn.Parameter(tensor.detach()[rows], requires_grad=False) for tensor in tensors_by_task[packed]
                    ]
                    self.merged.update(zip(self.task_tensors[name], parts))
            self.experts.append(expert)
        self.tensors = [{n: t for n, t, _ in named_tensors(expert) if n in self.merged} for expert in self.experts]
        self.anchor: tuple[nn.Module, dict[str, Tensor]] | None = None
        if anchor is not None:
            stored = {name: tensor for name, tensor, _ in named_tensors(tasks[0].expert)}
            module = copy_module(
                tasks[0].expert, {id(stored[n]): _like(stored[n], t.detach()) for n, t in anchor.items()}
            )
            split_attention(module)
            self.anchor = (module, {name: tensor for name, tensor, _ in named_tensors(module)})
        shared = {id(tensor): self.merged[name] for name, tensor in self.tensors[0].items()}
        self.reference = copy_module(self.experts[0], shared)
        placements = [Placement(task.expert, task.move) for task in tasks]
        converted: dict[int, Tensor] = {}
        self.running: dict[tuple[int, Stream], RunningModel] = {}
        self.computed: dict[str, Tensor] = {}
        self.moved: dict[Hashable, tuple[Tensor, Tensor]] = {}
        for number, placement in enumerate(placements):
            values = {**(fixed or {}), **merged, **{name: tensors[number] for name, tensors in tensors_by_task.items()}}
            for stream in streams:
                model = RunningModel.of(placement, stream, values, tasks[number].offload, converted, self.moved)
                self.running[number, stream] = model
                for name, tensor in model.tensors.items() if stream == "merged" else ():
                    self.computed[self.task_tensors[name][number] if name in self.task_tensors else name] = tensor
        self._tasks, self._prepared = list(tasks), dict[tuple[int, Stream], nn.Module]()
        self.device = placements[0].target(next(iter(merged)))[0] if merged else torch.device("cpu")
        self.tied = tied_names(self.reference)
        self.tied.update({key: key for keys in self.task_tensors.values() for key in keys})
        self.positions: dict[str, int] = {}
        for number, (name, _) in enumerate(self.reference.named_modules()):
            while True:
                self.positions[name] = number
                if not name:
                    break
                name = name.rpartition(".")[0]
        self.buffers = {name for name, _, is_parameter in named_tensors(self.reference) if not is_parameter}
        self.order = {name: number for number, name in enumerate(self.tied)}

    def merged_name(self, name: str, task: int) -> str:
        """Return the name, in :attr:`merged`, of the value that a task's merged model has of a shared parameter."""
        return self.task_tensors[name][task] if name in self.task_tensors else name

    def prepared(self, task: int, stream: Stream) -> nn.Module:
        """Return the model that forwards of a task run in, after what comes once before all of them."""
        if self._tasks[task].prepare is None:
            return self.running[task, stream].module
        if (task, stream) not in self._prepared:
            self._prepared[task, stream] = copy_module(self.running[task, stream].module)
            run_before_forwards(task, self._tasks[task], self._prepared[task, stream], stream)
        return self._prepared[task, stream]

    def layer(self, name: str, call: FunctionCall | None = None) -> Layer:
        """Return a layer in the merged model and in every expert. ``call`` is given if the layer is a function call."""
        if call is None:
            candidate = self.candidates[name]
            parts = {local_name: Part(full_name) for local_name, full_name in candidate.written(name).items()}
            merged, *experts = [self._on_device(model.get_submodule(name)) for model in (self.reference, *self.experts)]
            anchor = self._on_device(self.anchor[0].get_submodule(name)) if self.anchor else None
            return Layer(name, candidate.layer_type, merged, experts, parts, anchor)
        models = [self.merged, *self.tensors, *([self.anchor[1]] if self.anchor else [])]
        values_by_model = [
            {local_name: part.of(tensors[part.name]).to(self.device) for local_name, part in call.parts.items()}
            for tensors in models
        ]
        merged, *experts = [call.module(values) for values in values_by_model]
        anchor = experts.pop() if self.anchor else None
        return Layer(name, call.layer_type, merged, experts, dict(call.parts), anchor)

    def _on_device(self, layer: nn.Module) -> nn.Module:
        """The same layer on the device where statistics are gathered."""
        elsewhere = [tensor for _, tensor, _ in named_tensors(layer) if tensor.device != self.device]
        return copy_module(layer, {id(t): _like(t, t.to(self.device)) for t in elsewhere}) if elsewhere else layer

    def refresh(self, name: str) -> None:
        """Copy a merged tensor that has been written to, so that merged models compute with the new values."""
        merged = self.merged[name]
        computed = self.computed.get(name, merged)
        if computed.data_ptr() != merged.data_ptr():
            with private_torch.unversioned_write(computed):
                computed.copy_(merged)


def run_before_forwards(number: int, task: Task, module: nn.Module, stream: Stream) -> None:
    """Run what comes once before all forwards of a task.

    Args:
        number: of the task.
        task: the task.
        module: the copy of a model that it runs on.
        stream: which model that is.
    """
    if task.prepare is not None:
        try:
            with seeded(SEEDS_OF_TASK * (number + 1) - 1):
                task.prepare(module)
        except Exception as error:
            error.add_note(f"raised before the calibration forwards of task '{task.name}', {stream} model")
            raise


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
