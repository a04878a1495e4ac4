"""The models of a merge: the experts as they are stored, the merged one, and what runs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from com_lightning.core.chain.gather import Layer
from com_lightning.core.layers.candidates import Candidate, candidates
from com_lightning.core.layers.functional import Use
from com_lightning.core.sweep.task import Stream, Task
from com_lightning.core.tensors import private_torch
from com_lightning.core.tensors.attention import split_attention
from com_lightning.core.tensors.modules import copy_module, named_tensors, tied_names
from com_lightning.core.tensors.placement import Placement, Running
from com_lightning.core.tensors.tracked import Part


class Models:
    """All modules and tensors that a chain works on. Attention is taken apart in all of them.

    Attributes:
        candidates: the modules that are layers, by name.
        merged: name -> merged parameter or buffer, in the precision that it is stored in; parts of packed ones too.
        whole: name of each such part -> that of the packed parameter.
        experts: as they are stored.
        tensors: the same names as in ``merged`` -> that of each expert.
        reference: the merged model, as it is stored.
        running: what runs, of each task and stream.
        computed: name -> what merged models compute with: the merged tensor, or a copy on another device or in another
            precision.
        device: where statistics are gathered.
        tied: see :func:`~com_lightning.core.tensors.modules.tied_names`.
        places: of each module among all; of one that has others within it, after the last of them.
        order: of each parameter and buffer among all.
        buffers: names of those that are buffers.
        base: the model that the experts were fine-tuned from, for rules that need it, and its tensors.
        own: name of what each task keeps for itself -> under which names :attr:`merged` has it, task by task.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        merged: Mapping[str, Tensor],
        streams: Sequence[Stream],
        base: Mapping[str, Tensor] | None = None,
        own: Mapping[str, Sequence[Tensor]] | None = None,
        fixed: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = own or {}
        self.candidates: dict[str, Candidate] = {}
        self.merged = dict(merged)
        self.whole: dict[str, str] = {}
        self.own = {name: [f"{name} of {task.name}" for task in tasks] for name in own}
        for name, keys in self.own.items():
            self.merged.update(zip(keys, own[name]))
        self.experts: list[nn.Module] = []
        for task in tasks:
            self.candidates.update(candidates(task.expert, merged))
            expert = copy_module(task.expert)
            for name, (whole, rows) in split_attention(expert).items():
                if whole in merged:  # a view, so that what is written here is written there
                    self.merged.setdefault(name, nn.Parameter(merged[whole].detach()[rows], requires_grad=False))
                    self.whole[name] = whole
                if whole in own and name not in self.own:
                    self.own[name] = [f"{name} of {other.name}" for other in tasks]
                    parts = [nn.Parameter(tensor.detach()[rows], requires_grad=False) for tensor in own[whole]]
                    self.merged.update(zip(self.own[name], parts))
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
        self.running: dict[tuple[int, Stream], Running] = {}
        self.computed: dict[str, Tensor] = {}
        for number, placement in enumerate(placements):
            values = {**(fixed or {}), **merged, **{name: tensors[number] for name, tensors in own.items()}}
            for stream in streams:
                model = Running.of(placement, stream, values, tasks[number].stays, converted)
                self.running[number, stream] = model
                for name, tensor in model.tensors.items() if stream == "merged" else ():
                    self.computed[self.own[name][number] if name in self.own else name] = tensor
        self.device = placements[0].target(next(iter(merged)))[0] if merged else torch.device("cpu")
        self.tied = tied_names(self.reference)
        self.tied.update({key: key for keys in self.own.values() for key in keys})
        self.places: dict[str, int] = {}
        for number, (name, _) in enumerate(self.reference.named_modules()):
            while True:
                self.places[name] = number
                if not name:
                    break
                name = name.rpartition(".")[0]
        self.buffers = {name for name, _, is_parameter in named_tensors(self.reference) if not is_parameter}
        self.order = {name: number for number, name in enumerate(self.tied)}

    def layer(self, name: str, use: Use | None = None) -> Layer:
        """A layer in the merged model and in every expert. ``use``: the function call that it is, if no module."""
        if use is None:
            candidate = self.candidates[name]
            parts = {own: Part(full) for own, full in candidate.written(name).items()}
            merged, *experts = [self._here(model.get_submodule(name)) for model in (self.reference, *self.experts)]
            base = self._here(self.base[0].get_submodule(name)) if self.base else None
            return Layer(name, candidate.kind, merged, experts, parts, base)
        everyone = [self.merged, *self.tensors, *([self.base[1]] if self.base else [])]
        chosen = [{own: p.of(t[p.name]).to(self.device) for own, p in use.parts.items()} for t in everyone]
        merged, *experts = [use.module(values) for values in chosen]
        base = experts.pop() if self.base else None
        return Layer(name, use.kind, merged, experts, dict(use.parts), base)

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
