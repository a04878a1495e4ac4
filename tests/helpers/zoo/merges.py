"""Merges of experts of the zoo, and what became of each parameter."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, copy_module, named_tensors, tied_names
from tests.helpers.classifier import perturb
from tests.helpers.zoo.models import ZOO, Inputs

Merge = Callable[[Sequence[Task], Mapping[str, Tensor], Sequence[float], ChainOptions], list[LayerRecord]]


def run(module: nn.Module, inputs: Inputs, index: int = 0) -> object:
    """The forward of a model of the zoo."""
    return module(**inputs)


@torch.no_grad()
def output(module: nn.Module, inputs: Inputs) -> Tensor:
    """What a model of the zoo is for, as one tensor."""
    result = run(module, inputs)
    if isinstance(result, Tensor):
        return result
    assert isinstance(result, Mapping)
    parts = [result[key] for key in ("logits", "image_embeds", "text_embeds") if result.get(key) is not None]
    return torch.cat([part.flatten() for part in parts])


def make_experts(name: str, count: int = 2, scale: float = 0.25) -> tuple[list[nn.Module], list[list[Inputs]]]:
    """``count`` perturbed copies of a model of the zoo, each with two calibration batches of its own task.

    Weights are drawn so large that a tiny model does something, and running statistics are those of the task's data.
    """
    make, batch = ZOO[name]
    batches = [[batch(10 * task + number) for number in range(2)] for task in range(count)]
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                fan = parameter[0].numel() if parameter.dim() == 4 else parameter.shape[-1]
                if float(parameter.std()) < fan**-0.5:
                    parameter.normal_(0.0, fan**-0.5)
    experts = []
    for task in range(count):
        expert = perturb(copy.deepcopy(base), scale, seed=task + 1)
        _measure(expert, batches[task])
        experts.append(expert)
    return experts, batches


@torch.no_grad()
def _measure(module: nn.Module, batches: Sequence[Inputs]) -> None:
    """Set the running statistics of batch normalisations to those of some data."""
    layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        return
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    for inputs in batches:
        run(module, inputs)
    for layer in layers:
        layer.momentum = 0.1
        layer.eval()


def averages(experts: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The average of the experts, as ``merge_layers`` takes it: one tensor for all names of a tied one."""
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
    ties = tied_names(experts[0])
    result: dict[str, Tensor] = {}
    for name, _, is_parameter in named_tensors(experts[0]):
        if ties[name] in result:
            result[name] = result[ties[name]]
        elif states[0][name].is_floating_point():
            value = average([state[name] for state in states])
            result[name] = nn.Parameter(value, False) if is_parameter else value
    return result


@dataclass
class Merged:
    """A merge of a model of the zoo, and what it was made from."""

    experts: list[nn.Module]
    batches: list[list[Inputs]]
    values: dict[str, Tensor]
    records: list[LayerRecord]
    seconds: float

    def error(self, values: Mapping[str, Tensor]) -> float:
        """Relative squared error of the outputs on the calibration data, of a model that holds ``values``."""
        errors = []
        for expert, part in zip(self.experts, self.batches):
            module = with_values(expert, values)
            pairs = [(output(module, inputs), output(expert, inputs)) for inputs in part]
            gap = sum(float((ours - theirs).square().sum()) for ours, theirs in pairs)
            errors.append(gap / sum(float(theirs.square().sum()) for _, theirs in pairs))
        return sum(errors) / len(errors)


def with_values(expert: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of an expert that holds the given tensors."""
    return copy_module(expert, {id(t): values[name] for name, t, _ in named_tensors(expert) if name in values})


def merge(
    experts: list[nn.Module], batches: list[list[Inputs]], using: Merge = merge_layers, rule: ChainOptions | None = None
) -> Merged:
    """Merge with equal importance."""
    values = averages(experts)
    tasks = [Task(f"task{n}", e, b, run) for n, (e, b) in enumerate(zip(experts, batches))]
    start = time.perf_counter()
    records = using(tasks, values, [1 / len(experts)] * len(experts), rule or ChainOptions())
    return Merged(experts, batches, values, records, time.perf_counter() - start)


def account(merged: Merged) -> dict[str, str]:
    """Name of each parameter and buffer -> ``"solved"``, ``"buffer"`` or why it was averaged.

    Whether a parameter has any influence on the outputs is found out by a forward with gradients, not believed.
    """
    expert = merged.experts[0]
    ties = tied_names(expert)
    solved: dict[str, int] = {}
    for name, count in (item for record in merged.records for item in record.parameters.items()):
        solved[ties[name]] = solved.get(ties[name], 0) + count
    notes = {record.name: record.note for record in merged.records if record.note}
    used = _influence(expert, merged.batches[0])
    result = {}
    for name, tensor, is_parameter in named_tensors(expert):
        kind = f"{owner(expert, name)}.{name.rpartition('.')[2]}"
        if not is_parameter:
            result[name] = "buffer"
        elif ties[name] in solved:
            whole = solved[ties[name]] == tensor.numel()
            result[name] = "solved" if whole else f"{kind}: solved in part"
        elif id(tensor) not in used:
            result[name] = "not used by the forward"
        else:
            note = notes.get(ties[name], notes.get(name.rpartition(".")[0]))
            result[name] = f"{kind}: {note or 'MISSED, though it is used'}"
    return result


def owner(module: nn.Module, name: str) -> str:
    return type(module.get_submodule(name.rpartition(".")[0])).__name__


def _influence(expert: nn.Module, batches: Sequence[Inputs]) -> set[int]:
    """``id`` of each parameter that has a gradient."""
    module = copy.deepcopy(expert).requires_grad_()
    result = run(module, batches[0])
    parts = [result] if isinstance(result, Tensor) else list(vars(result).values())
    loss = sum(p.double().square().sum() for p in parts if isinstance(p, Tensor) and p.requires_grad)
    assert isinstance(loss, Tensor)
    loss.backward()  # type: ignore[no-untyped-call]
    originals = {name: tensor for name, tensor, _ in named_tensors(expert)}
    return {id(originals[n]) for n, p, is_parameter in named_tensors(module) if is_parameter and p.grad is not None}
