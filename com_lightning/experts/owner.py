"""A checkpoint as its owner would load it, with ``load_from_checkpoint`` of the user's class.

:func:`~com_lightning.experts.load.load_expert` maps the tensors of a file into a module by their names, which takes
neither time nor memory. The class may do more when it loads: it may rename, tie or compute. So small experts are loaded
in both ways, and compared.
"""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from com_lightning.compat import load_module
from com_lightning.core.tensors.modules import named_tensors, num_bytes
from com_lightning.errors import MergeWarning, reason
from com_lightning.experts.adapters import merge_adapter
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.hyperparameters import check_hyperparameters, restore_hyperparameters
from com_lightning.experts.load import ExpertSource, take_precision
from com_lightning.experts.settings import computed_buffers, described, differing, settings_of
from com_lightning.experts.state_dicts import plain, some

LARGEST = 2**27
"""Bytes of the largest expert that is loaded a second time."""

Module = TypeVar("Module", bound=LightningModule)


def load_by_class(path: Path, model: Module) -> Module:
    """Load a Lightning checkpoint with ``load_from_checkpoint`` of the class of ``model``.

    Args:
        path: of the checkpoint.
        model: a module of the class. Its hyperparameters say what those of the file may name.

    Returns:
        The module, as the class makes it.

    Raises:
        Exception: whatever the class raises, and ``ValueError`` for hyperparameters that name foreign code.
    """
    content = read_checkpoint(path)
    check_hyperparameters(content, model)
    with torch.random.fork_rng([]), warnings.catch_warnings():  # making a module draws random weights
        warnings.simplefilter("ignore")
        loaded = load_module(type(model), content, path)
    restore_hyperparameters(loaded, content)
    return loaded


def compare_with_owner(label: str, source: ExpertSource, expert: LightningModule, model: LightningModule) -> list[str]:
    """Compare an expert from a Lightning checkpoint with what its class loads, and warn if these are not the same.

    Args:
        label: what messages call the expert.
        source: where it comes from.
        expert: as it was loaded.
        model: a module of its class.

    Returns:
        What was compared, or why it was not; nothing if the source is no Lightning checkpoint.
    """
    if not isinstance(source, (str, Path)) or not Path(source).is_file():
        return []
    label, how = f"{label} ({source})", f"{type(model).__name__}.load_from_checkpoint"
    if "pytorch-lightning_version" not in read_checkpoint(Path(source), label):
        return []
    size = num_bytes(tensor for _, tensor, _ in named_tensors(expert))
    if size > LARGEST:
        return [f"{label}: not compared with what {how} gives, because it has more than {LARGEST // 2**20} MiB"]
    try:
        owners = load_by_class(Path(source), model)
        merge_adapter(owners, label)  # as in the expert
    except Exception as error:  # code of the class
        return [f"{label}: not compared with what {how} gives ({reason(error)})"]
    take_precision(owners, expert)
    tensors = differing_tensors(expert, owners)
    settings = differing({"this merge": settings_of(expert), "that module": settings_of(owners)})
    found = [f"other values of {some(tensors, most=3)}"] * bool(tensors) + [described(settings)] * bool(settings)
    if not found:
        return [f"{label}: {how} gives the same tensors and settings"]
    warnings.warn(
        f"{label}: {how} gives another module than the one that is merged: {'; '.join(found)}. Give the module itself",
        MergeWarning,
        stacklevel=2,
    )
    return [f"{label}: {how} gives another module, see the warning"]


def differing_tensors(one: nn.Module, other: nn.Module, up_to_rounding: bool = False) -> list[str]:
    """Find the parameters and saved buffers that are not equal. Buffers that are computed count as settings.

    Args:
        one: a module.
        other: another one.
        up_to_rounding: whether tensors count as equal whose relative distance is that of rounding.

    Returns:
        Their names.
    """
    ours, theirs = (
        {plain(name): tensor.detach() for name, tensor, _ in named_tensors(module) if name not in computed}
        for module in (one, other)
        for computed in [computed_buffers(module)]
    )
    equal = partial(_equal, up_to_rounding=up_to_rounding)
    return [n for n in {**ours, **theirs} if n not in ours or n not in theirs or not equal(ours[n], theirs[n])]


def _equal(one: Tensor, other: Tensor, up_to_rounding: bool) -> bool:
    if one.shape != other.shape:
        return False
    other = other.to(one)
    if up_to_rounding and one.is_floating_point():
        distance = (one.double() - other.double()).norm() / one.double().norm().clamp_min(1e-30)
        return bool(distance <= max(2 * torch.finfo(one.dtype).eps, 1e-4)) or torch.equal(one, other)
    return torch.equal(one, other) or bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
