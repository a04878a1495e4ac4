"""The tensors that experts share: their average, and modules that hold merged ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from com_lightning.core.tensors.mapped import mapped_copy
from com_lightning.core.tensors.modules import as_dtype, average, copy_module, named_tensors, tied_names
from com_lightning.plan import MergePlan


def average_shared(
    plan: MergePlan,
    weights: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    parameters_too: bool = True,
    is_mapped: bool = False,
) -> dict[str, Tensor]:
    """Return the average of each shared parameter and floating-point buffer, in the precision that it is stored in.

    All names of a tied parameter have one tensor.

    Args:
        plan: the experts, and what they share.
        weights: of the experts; ``None``: all count alike.
        device: for the result.
        parameters_too: without it, parameters have undefined values.
        is_mapped: whether parameters are in :mod:`mapped files <com_lightning.core.tensors.mapped>` in place of the
            device.
    """
    precision = plan.precision(next(iter(plan.experts)))
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in plan.experts.values()]
    ties = tied_names(next(iter(plan.experts.values())))
    result: dict[str, Tensor] = {}
    for name in plan.parameters.shared:
        tensors = [state[name] for state in states]
        if ties[name] in result:
            result[name] = result[ties[name]]
        elif tensors[0].is_floating_point():
            dtype, is_parameter = precision.get(name, tensors[0].dtype), isinstance(tensors[0], nn.Parameter)
            home = "cpu" if is_mapped and is_parameter else device
            if is_parameter and not parameters_too:
                value = torch.empty_like(tensors[0], dtype=dtype, device=home, requires_grad=False)
            else:
                value = average(tensors, weights).to(home, dtype)
            if is_mapped and is_parameter:
                value = mapped_copy(value)
            result[name] = nn.Parameter(value, False) if is_parameter else value
    return result


def with_shared(
    plan: MergePlan,
    shared: Mapping[str, Tensor],
    own: Mapping[str, Sequence[Tensor]] | None = None,
    refitted: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, LightningModule]:
    """Return task -> a copy of its expert that holds the shared tensors, in the experts' precision.

    A tensor in ``own`` replaces the shared one of that name. Private tensors are the expert's, unless they were
    ``refitted``.
    """
    converted: dict[int, tuple[Tensor, Tensor]] = {}  # with the value itself, whose id nothing else may have
    modules = {}
    for number, (task, expert) in enumerate(plan.experts.items()):
        tensors = {}
        values = {**shared, **{name: each[number] for name, each in (own or {}).items()}}
        precision = plan.precision(task)  # shared tensors have it since they were averaged
        heads = (refitted or {}).get(task, {})
        values.update({name: as_dtype(head, precision.get(name, head.dtype)) for name, head in heads.items()})
        for name, tensor, _ in named_tensors(expert):
            if (value := values.get(name)) is not None:
                if id(value) not in converted:
                    converted[id(value)] = value, as_dtype(value, tensor.dtype)
                tensors[id(tensor)] = converted[id(value)][1]
        module = copy_module(expert, tensors)
        assert isinstance(module, LightningModule)
        modules[task] = module
    return modules


@torch.no_grad()
def load_into(model: LightningModule, module: LightningModule, lend: bool = False) -> None:
    """Copy all parameters and buffers of ``module`` into ``model``, or lend it those that need no conversion."""
    values = {name: tensor for name, tensor, _ in named_tensors(module)}
    for name, tensor, _ in named_tensors(model):
        if lend:
            tensor.data = values[name].detach().to(tensor.device, tensor.dtype)
        else:
            # The user may have built the model in inference mode.
            with torch.inference_mode() if tensor.is_inference() else nullcontext():
                tensor.copy_(values[name])
