"""Modules that are compiled or wrapped: experts are copied without, and compiled as the model is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch._dynamo import OptimizedModule
from torch.optim.swa_utils import AveragedModel

from com_lightning.core.tensors.modules import copy_with_tensors
from com_lightning.experts.state_dicts import plain

_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside those that compile, distribute or average it."""
    if isinstance(module, OptimizedModule):
        return unwrapped(module._orig_mod)
    return unwrapped(module.module) if isinstance(module, (*_WRAPPERS,)) else module


def compiled_like(module: nn.Module, like: OptimizedModule) -> nn.Module:
    """The module, compiled with the options (backend, mode, ...) of another compiled module."""
    compiled: Any = like.dynamo_ctx(module)
    assert isinstance(compiled, nn.Module)
    return compiled


def copy_of(model: LightningModule, instead: dict[int, nn.Module] | None = None) -> LightningModule:
    """A copy that is not compiled; ``instead`` maps the ``id`` of a submodule to what takes its place."""
    model = copy_with_tensors(model, instead)
    forget_compilation(model)
    return model


def forget_compilation(module: LightningModule) -> None:
    """Undo what ``trainer.validate(torch.compile(module))`` does: it makes methods call those of the compiled module,
    which a copy would call too."""
    if module._compiler_ctx is not None:
        module._compiler_ctx = None
        for name in ("forward", "training_step", "validation_step", "test_step", "predict_step"):
            vars(module).pop(name, None)


def compile_like(expert: LightningModule, model: LightningModule) -> None:
    """Compile the same submodules as in ``model``, so that names fit."""
    compiled = {plain(name): part for name, part in model.named_modules() if isinstance(part, OptimizedModule)}
    for name, part in reversed(list(expert.named_modules())):  # inner modules before those around them
        if isinstance(part, OptimizedModule) and plain(name) not in compiled:
            expert.set_submodule(name, part._orig_mod)
    for place in sorted(compiled, key=len, reverse=True):
        match = next(((n, p) for n, p in expert.named_modules() if plain(n) == place), None)
        if match and not isinstance(match[1], OptimizedModule):
            expert.set_submodule(match[0], compiled_like(match[1], compiled[place]))
