"""The models of a merge: the experts as they are stored, the merged one, and what runs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from com_lightning.core.layers.candidates import Candidate, candidates
from com_lightning.core.layers.functional import FunctionCall
from com_lightning.core.sweep.layer import Layer
from com_lightning.core.sweep.task import Stream, Task
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module, named_tensors, tied_names
from com_lightning.core.tensors.placement import Placement, RunningModel
from com_lightning.core.tensors.tracked import Part


class Models:
    """All modules and tensors that a sweep works on. In all of them, attention is split into its linear maps.

    Args:
        tasks: the experts.
        merged: name of each shared parameter or buffer -> its merged value.
        streams: the models that run for each task.
        base: the same names -> value in the model that the experts were fine-tuned from, for rules that need it.
        task_tensors: name of what each task keeps for itself -> one tensor for each.
        fixed: name of what else the merged model has in place of the expert's -> tensor. It is not merged.

    Attributes:
        candidates: the modules that are layers, by name.
        merged: name -> merged parameter or buffer, in the precision that it is stored in; also parts of packed ones.
        whole: name of each such part -> name of the packed parameter.
        experts: as they are stored.
        tensors: for each expert, the names of ``merged`` -> its tensor.
        reference: the merged model, as it is stored.
        running: task and stream -> the model that runs.
        computed: name -> what merged models compute with: the merged tensor, or a copy on another device or in another
            precision.
        device: where statistics are gathered.
        tied: see :func:`~com_lightning.core.tensors.modules.tied_names`.
        places: place of each module among all. A module that has others within it comes after the last of them.
        order: place of each parameter and buffer among all.
        buffers: names of those that are buffers.
        base: the model that the experts were fine-tuned from, and its tensors, for rules that need it.
        task_tensors: name of what each task keeps for itself -> the names under which :attr:`merged` has it, by task.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        merged: Mapping[str, Tensor],
        streams: Sequence[Stream],
        base: Mapping[str, Tensor] | None = None,
        task_tensors: Mapping[str, Sequence[Tensor]] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        own, self.streams = task_tensors or {}, tuple(streams)
        self.candidates: dict[str, Candidate] = {}
        self.merged = dict(merged)
        self.whole: dict[str, str] = {}
        self.task_tensors = {name: [f"{name} of {task.name}" for task in tasks] for name in own}
        for name, keys in self.task_tensors.items():
            self.merged.update(zip(keys, own[name]))
        self.experts: list[nn.Module] = []
        for task in tasks:
            self.candidates.update(candidates(task.expert, merged))
            expert = copy_module(task.expert)
            for name, (whole, rows) in split_attention(expert).items():
                if whole in merged:  # a view, so that what is written here is written there
                    self.merged.setdefault(name, nn.Parameter(merged[whole].detach()[rows], requires_grad=False))
                    self.whole[name] = whole
                if whole in own and name not in self.task_tensors:
                    self.task_tensors[name] = [f"{name} of {other.name}" for other in tasks]
                    parts = [nn.Parameter(tensor.detach()[rows], requires_grad=False) for tensor in own[whole]]
                    self.merged.update(zip(self.task_tensors[name], parts))
            self.experts.append(expert)
        self.tensors = [{n: t for n, t, _ in named_tensors(expert) if n in self.merged} for expert in self.experts]
        self.base: tuple[nn.Module, dict[str, Tensor]] | None = None
        if base is not None:
            there = {name: tensor for name, tensor, _ in named_tensors(tasks[0].expert)}
            module = copy_module(tasks[0].expert, {id(there[n]): _like(there[n], t.detach()) for n, t in base.items()})
            split_attention(module)
            self.base = (module, {name: tensor for name, tensor, _ in named_tensors(module)})
        shared = {id(tensor): self.merged[name] for name, tensor in self.tensors[0].items()}
        self.reference = copy_module(self.experts[0], shared)
        placements = [Placement(task.expert, task.move) for task in tasks]
        converted: dict[int, Tensor] = {}
        self.running: dict[tuple[int, Stream], RunningModel] = {}
        self.computed: dict[str, Tensor] = {}
        for number, placement in enumerate(placements):
            values = {**(fixed or {}), **merged, **{name: tensors[number] for name, tensors in own.items()}}
            for stream in streams:
                model = RunningModel.of(placement, stream, values, tasks[number].offload, converted)
                self.running[number, stream] = model
                for name, tensor in model.tensors.items() if stream == "merged" else ():
                    self.computed[self.task_tensors[name][number] if name in self.task_tensors else name] = tensor
        self.device = placements[0].target(next(iter(merged)))[0] if merged else torch.device("cpu")
        self.tied = tied_names(self.reference)
        self.tied.update({key: key for keys in self.task_tensors.values() for key in keys})
        self.places: dict[str, int] = {}
        for number, (name, _) in enumerate(self.reference.named_modules()):
            while True:
                self.places[name] = number
                if not name:
                    break
                name = name.rpartition(".")[0]
        self.buffers = {name for name, _, is_parameter in named_tensors(self.reference) if not is_parameter}
        self.order = {name: number for number, name in enumerate(self.tied)}

    def layer(self, name: str, call: FunctionCall | None = None) -> Layer:
        """Return a layer in the merged model and in every expert. ``call`` is its function call, if it is no module."""
        if call is None:
            candidate = self.candidates[name]
            parts = {local: Part(full) for local, full in candidate.written(name).items()}
            merged, *experts = [self._here(model.get_submodule(name)) for model in (self.reference, *self.experts)]
            base = self._here(self.base[0].get_submodule(name)) if self.base else None
            return Layer(name, candidate.layer_type, merged, experts, parts, base)
        models = [self.merged, *self.tensors, *([self.base[1]] if self.base else [])]
        chosen = [
            {local: part.of(tensors[part.name]).to(self.device) for local, part in call.parts.items()}
            for tensors in models
        ]
        merged, *experts = [call.module(values) for values in chosen]
        base = experts.pop() if self.base else None
        return Layer(name, call.layer_type, merged, experts, dict(call.parts), base)

    def _here(self, layer: nn.Module) -> nn.Module:
        """A layer on the device where statistics are gathered."""
        away = [tensor for _, tensor, _ in named_tensors(layer) if tensor.device != self.device]
        return copy_module(layer, {id(t): _like(t, t.to(self.device)) for t in away}) if away else layer

    def refresh(self, name: str) -> None:
        """Let merged models compute with what has been written to a merged tensor."""
        merged = self.merged[name]
        computed = self.computed.get(name, merged)
        if computed.data_ptr() != merged.data_ptr():
            with private_torch.unversioned_write(computed):
                computed.copy_(merged)


def _like(tensor: Tensor, value: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
