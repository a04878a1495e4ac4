"""The folder that a merge leaves behind: checks before the merge, writing, reading.

A user who waits hours for a merge must not lose it to a full disk, and must not find half of a result. So the folder is
checked before the merge starts (:func:`output_problems`, :func:`space_problems`), and :func:`save_results` writes
everything to a hidden folder beside it that takes its place in one step.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from com_lightning.core.tensors.digest import digest
from com_lightning.core.tensors.modules import as_dtype, copy_module, named_tensors, num_bytes, tied_names
from com_lightning.errors import MergeError, paths_told
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.load import SetUp, load_expert, take_precision
from com_lightning.experts.settings import differing, has_configuration, settings_of
from com_lightning.experts.state_dicts import fill, some, submodule
from com_lightning.experts.transformers_models import (
    MODEL_CONFIG,
    load_pretrained,
    pretrained_parts,
    save_pretrained,
    without_adapters,
)
from com_lightning.results.atomic import Workplace
from com_lightning.results.corrections import Corrections, write_corrections
from com_lightning.results.html import html_report
from com_lightning.results.importance_plot import importance_of, save_importance
from com_lightning.results.model_card import model_card
from com_lightning.results.plots import save_figure
from com_lightning.results.report import MergeReport
from com_lightning.results.verification import Trial, verify
from com_lightning.validation import quiet_lightning

ALL = "merged"
"""Name of the one checkpoint that is written if all tasks have the same module."""
PRETRAINED = "transformers"
"""Name of the folder with models of transformers."""
ADAPTERS = "adapters"
"""Name of the folder with a base and the tasks' adapters."""


def output_problems(folder: Path, overwrite: bool) -> list[str]:
    """Find out, before the merge, why a result could not be written.

    Args:
        folder: Folder for the result.
        overwrite: Whether it may replace an earlier result.

    Returns:
        The problems; an empty list if there are none.
    """
    try:
        parent = Path(os.path.realpath(folder)).parent  # a link stays a link; its target is replaced
        exists = folder.exists()
        if exists and not overwrite:
            return [f"output_dir: {folder} exists already; remove it, name another, or set overwrite"]
        if exists and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "report.json").exists())):
            return [f"output_dir: {folder} is not the result of a merge and is not overwritten; name another"]
    except (OSError, ValueError) as error:  # for example a name that is too long, or has a zero byte
        return [f"output_dir: {folder} cannot be created ({getattr(error, 'strerror', None) or error})"]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"output_dir: {parent} cannot be created ({error.strerror})"]
    return [] if os.access(parent, os.W_OK) else [f"output_dir: {parent} cannot be written to"]


def space_problems(folder: Path, modules: Mapping[str, LightningModule], journal: bool) -> list[str]:
    """Find out whether a result would be too large for the disk.

    Args:
        folder: Folder for the result.
        modules: Task -> a module as large as the merged one.
        journal: Whether merged layers are written to the disk during the merge as well.

    Returns:
        One problem, or none.
    """
    sizes = [num_bytes(t for _, t, _ in named_tensors(module)) for module in modules.values()]
    copies = 2 if any(map(pretrained_parts, modules.values())) else 1  # checkpoint and folder for from_pretrained
    needed = copies * sum(sizes) + max(sizes) * (2 if journal else 1)
    parent = Path(os.path.realpath(folder)).parent
    free = shutil.disk_usage(parent).free
    if needed <= free:
        return []
    return [
        f"output_dir: the result takes up to {needed / 2**30:.2f} GiB, and {parent} has {free / 2**30:.2f} GiB "
        "free; make room, or name another"
    ]


def save_results(
    folder: Path,
    modules: Mapping[str, LightningModule],
    shared: list[str],
    report: MergeReport,
    overwrite: bool = False,
    files: Mapping[str, str] | None = None,
    precision: Mapping[str, Mapping[str, torch.dtype]] | None = None,
    trials: Mapping[str, Trial] | None = None,
    corrections: Corrections | None = None,
) -> None:
    """Write the result of a merge, and compare what was written with the modules.

    The folder contains

    - ``merged.safetensors``: the shared parameters and buffers;
    - ``<task>.ckpt``: a Lightning checkpoint per task, or a single ``merged.ckpt`` if all tasks have the same module;
    - ``report.json``, ``report.md``, ``report.html`` and, if matplotlib is installed, ``report.png``, and with
      ``importance="similarity"`` also ``importance.png``;
    - ``README.md``: a model card;
    - ``transformers``: any models of transformers, see
      :func:`~com_lightning.experts.transformers_models.save_pretrained`;
    - ``adapters``: with ``task_rank``, one base and an adapter of PEFT for each task, see
      :func:`~com_lightning.results.corrections.write_corrections`.

    Args:
        folder: Where to write. The journal of an unfinished merge into the same folder is removed.
        modules: Task -> merged module.
        shared: Names of the shared parameters and buffers.
        report: Report of the merge.
        overwrite: Whether an earlier result is replaced.
        files: Name -> text of further files.
        precision: Task -> name -> dtype of tensors that are stored in another precision than the module has.
        trials: Task -> a calibration forward, for :func:`~com_lightning.results.verification.verify`.
        corrections: What the tasks share, where each of them has corrections of low rank.

    Raises:
        MergeError: If the folder exists and may not be overwritten, or cannot be written. It is then left as it was.
    """
    if problems := output_problems(folder, overwrite):
        raise MergeError(problems)
    stored = _in_precision(modules, precision or {})
    if corrections:
        first = next(iter(modules))
        base = _in_precision({first: corrections.base}, precision or {})[first]
        corrections = replace(corrections, base=base)

    def write(made: Path) -> None:
        told = _write_weights(made, stored, shared, corrections)
        adapters: dict[Path, tuple[str, nn.Module, str]] = {}
        if corrections:
            name = f"{folder}/{ADAPTERS}"
            more, adapters = write_corrections(corrections, stored, made / ADAPTERS, _save_checkpoint, name)
            told += more
        found = verify(*_written(made, modules), trials or {}, adapters)
        report.checks = [check for check in report.checks if check not in found.checks] + found.checks
        for warning in told + found.warnings:
            rank_zero_warn(warning)
            if warning not in report.warnings:
                report.warnings.append(warning)
        _write_report(made, modules, report, files or {})

    workplace = Workplace(folder)
    try:
        workplace.publish(write)
    except BaseException as error:
        workplace.close(keep=True)
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):  # torch.save: RuntimeError for a full disk
            problem = f"output_dir: {folder} could not be written ({error}); it was left as it was"
            raise MergeError([problem]) from error
        raise
    workplace.close()


def _write_weights(
    folder: Path, modules: Mapping[str, LightningModule], shared: list[str], corrections: Corrections | None
) -> list[str]:
    """Write all weights, and return warnings of what is not written."""
    module, names = next(iter(modules.values())), set(shared)
    ties = tied_names(module)
    corrected = set(corrections.names) if corrections else set()
    base = corrections.base if corrections else module
    tensors = {n: t for n, t, _ in named_tensors(base) if n in names | corrected and ties[n] == n}
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, folder / "merged.safetensors")
    umask = os.umask(0)
    os.umask(umask)
    (folder / "merged.safetensors").chmod(0o666 & ~umask)  # safetensors makes its files private to their owner
    for name, merged in ({ALL: module} if are_alike(modules) else modules).items():
        _save_checkpoint(merged, folder / f"{name}.ckpt")
        _warn_of_missing_weights(merged, folder / f"{name}.ckpt", names)
    return save_pretrained(modules, shared, folder / PRETRAINED, _apart(modules))


def _written(
    folder: Path, modules: Mapping[str, LightningModule]
) -> tuple[dict[Path, tuple[str, LightningModule]], dict[Path, tuple[str, nn.Module, str]]]:
    """Find out which module each checkpoint, and which transformers model each folder was written from."""
    checkpoints: dict[Path, tuple[str, LightningModule]] = {}
    folders: dict[Path, tuple[str, nn.Module, str]] = {}
    for task, module in modules.items():
        path = folder / f"{task}.ckpt"
        checkpoints.setdefault(path if path.is_file() else folder / f"{ALL}.ckpt", (task, module))
        unadapted = without_adapters(module)
        for place in (parts := pretrained_parts(unadapted)):
            if saved := _saved(folder / PRETRAINED, task, place if len(parts) > 1 else ""):
                folders.setdefault(saved, (task, unadapted, place))
    return checkpoints, folders


def _saved(folder: Path, task: str, inside: str) -> Path | None:
    """The folder with a transformers model of a task: its own, or that of all tasks."""
    return next((f for f in (folder / task / inside, folder / inside) if (f / MODEL_CONFIG).is_file()), None)


def _write_report(
    folder: Path, modules: Mapping[str, LightningModule], report: MergeReport, files: Mapping[str, str]
) -> None:
    for name, text in {"report.json": report.to_json(), "report.md": report.to_markdown(), **files}.items():
        (folder / name).write_text(text, encoding="utf-8")
    save_figure(report, folder / "report.png")
    save_importance({"": importance_of(report.layers)}, folder / "importance.png")
    classes = {task: f"{type(m).__module__}.{type(m).__qualname__}" for task, m in modules.items()}
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    (folder / "report.html").write_text(html_report(report, names, classes), encoding="utf-8")
    if "README.md" not in names:  # the user's files may include one
        (folder / "README.md").write_text(model_card(report, names, classes), encoding="utf-8")


def are_alike(modules: Mapping[str, LightningModule]) -> bool:
    """Whether one checkpoint is enough for all tasks.

    Args:
        modules: Task -> module.

    Returns:
        Whether all modules have the same class, hyperparameters, weights, buffers, and settings that shape outputs.
    """
    first, *others = modules.values()
    if is_overridden("on_save_checkpoint", first) or not others:
        return False
    state, hyperparameters = first.state_dict(), digest(dict(first.hparams))
    return all(
        type(other) is type(first)
        and digest(dict(other.hparams)) == hyperparameters  # tensors and arrays have no truth value when compared
        and (other_state := other.state_dict()).keys() == state.keys()
        and all(_is_same(value, state[name]) for name, value in other_state.items())
        for other in others
    ) and not differing({task: settings_of(module) for task, module in modules.items()})


def _apart(modules: Mapping[str, LightningModule]) -> list[str]:
    """Names of the transformers models whose configurations differ between tasks."""
    found = differing({task: settings_of(module) for task, module in modules.items()})
    parts = dict.fromkeys(name for module in modules.values() for name in pretrained_parts(module))
    return [name for name in parts if any(key.startswith(f"{name}.") for key in found)]


def _is_same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return bool(one is other)
    shared = one.device == other.device and one.data_ptr() == other.data_ptr() and one.numel() > 0
    return (one.shape, one.dtype) == (other.shape, other.dtype) and (shared or torch.equal(one, other.to(one.device)))


def _in_precision(
    modules: Mapping[str, LightningModule], precision: Mapping[str, Mapping[str, torch.dtype]]
) -> dict[str, LightningModule]:
    """Copies of the modules in which the given tensors are converted; shared tensors stay shared."""
    converted: dict[int, Tensor] = {}
    result = {}
    for task, module in modules.items():
        dtypes = precision.get(task, {})
        for name, tensor, _ in named_tensors(module):
            if name in dtypes and id(tensor) not in converted:
                converted[id(tensor)] = as_dtype(tensor, dtypes[name])
        copied = copy_module(module, converted) if dtypes else module
        assert isinstance(copied, LightningModule)
        result[task] = copied
    return result


def load_results(
    folder: Path, model: LightningModule, tasks: list[str], set_up: Callable[[str, LightningModule], None] | None = None
) -> dict[str, LightningModule]:
    """Load merged modules from a result folder.

    Args:
        folder: A folder that :func:`save_results` has written.
        model: A module of the merged modules' class.
        tasks: Names of the tasks to load.
        set_up: Calls ``setup`` of a task's module, where that may build its layers.

    Returns:
        Task -> merged module.

    Raises:
        MergeError: With the tasks that have no readable checkpoint in the folder.
    """
    modules, problems = {}, []
    for task in tasks:
        path, common = folder / f"{task}.ckpt", folder / f"{ALL}.ckpt"
        with paths_told("merged"):
            exists = path.is_file() or common.is_file()
        if not exists:
            there = sorted(p.stem for p in folder.glob("*.ckpt")) if folder.is_dir() else []
            problems.append(f"{path}: no such file; {folder} has results for {', '.join(there) or 'no task'}")
            continue
        try:
            own = None if set_up is None else partial(set_up, task)
            modules[task] = _load_result(task, path if path.is_file() else common, model, own)
        except MergeError as error:
            problems += error.problems
    if problems:
        raise MergeError(problems)
    return modules


def has_calibrated(folder: Path) -> bool:
    """Whether a merge has read calibration data, by the report in its folder; without a report, it is taken to have."""
    try:
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True
    return not isinstance(report, dict) or bool(report.get("samples", True))


def _load_result(task: str, path: Path, model: LightningModule, set_up: SetUp | None) -> LightningModule:
    try:
        module = load_expert(task, path, model, set_up=set_up)
    except MergeError:
        # A head of another size does not fit the model's class; the transformers folder says how to build it.
        pretrained = path.parent / PRETRAINED / task
        if not pretrained.is_dir():
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the folder holds only a part of the module, with another head
            module = load_expert(task, pretrained, model)
        fill(module, read_checkpoint(path)["state_dict"], str(path))
    else:
        _take_configurations(module, path.parent / PRETRAINED, task)
    take_precision(module, model)
    return module


def _take_configurations(module: LightningModule, folder: Path, task: str) -> None:
    """Replace each transformers model that the module's class configures otherwise than it was merged and written."""
    parts = pretrained_parts(module)
    for place, part in parts.items():
        saved = _saved(folder, task, place if len(parts) > 1 else "")
        if saved is not None and not has_configuration(part, saved):
            name, _ = submodule(module, place)
            module.set_submodule(name, load_pretrained(saved, f"task '{task}' ({saved})"))


def _warn_of_missing_weights(module: LightningModule, path: Path, shared: set[str]) -> None:
    """Some modules leave weights out of their checkpoints, for example all but their adapters."""
    try:
        state = read_checkpoint(path)["state_dict"]
    except MergeError:  # safe loading refuses the hyperparameters, so that there is nothing to check
        return
    if missing := [name for name, _ in module.named_parameters() if name in shared and name not in state]:
        rank_zero_warn(
            f"{path.name} lacks merged weights, because {type(module).__name__} leaves them out of its checkpoints: "
            f"{some(missing)}; merged.safetensors has them"
        )


class _DirectCheckpointIO(TorchCheckpointIO):
    """Writes to the disk directly. Lightning's class first builds the whole file in memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def _save_checkpoint(module: LightningModule, path: Path) -> None:
    """Write hyperparameters and weights, as ``trainer.save_checkpoint(path, weights_only=True)`` does."""
    outer = module._trainer
    with quiet_lightning(), torch.inference_mode(False):
        settings: Any = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(**settings, plugins=[_DirectCheckpointIO()])
        trainer.strategy.connect(module)
        module.trainer = trainer
        trainer.save_checkpoint(path, weights_only=True)
    module._trainer = outer
