"""The folder that a merge leaves behind, written whole or not at all."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from com_lightning.core.tensors.modules import as_dtype, copy_module, named_tensors, size_of, tied_names
from com_lightning.errors import MergeError
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.load import load_expert, take_precision
from com_lightning.experts.state_dicts import fill, some
from com_lightning.experts.transformers_models import pretrained_parts, save_pretrained
from com_lightning.results.atomic import Workplace
from com_lightning.results.html import html_report
from com_lightning.results.model_card import model_card
from com_lightning.results.plots import save_figure
from com_lightning.results.report import MergeReport
from com_lightning.validation import quiet_lightning

ALL = "merged"
"""Name of the checkpoint of all tasks, where they differ in nothing."""
PRETRAINED = "transformers"
"""Name of the folder of transformers models."""


def output_problems(folder: Path, overwrite: bool) -> list[str]:
    """Why a result could not be written to ``folder``, found out before the merge."""
    parent = Path(os.path.realpath(folder)).parent  # a link stays, and what it points to is written
    try:
        there = folder.exists()
        if there and not overwrite:
            return [f"output_dir: {folder} exists already; remove it, name another, or set overwrite"]
        if there and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "report.json").exists())):
            return [f"output_dir: {folder} is not the result of a merge, and is not overwritten; name another"]
    except OSError as error:  # a name that is too long
        return [f"output_dir: {folder} cannot be made ({error.strerror})"]
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"output_dir: {parent} cannot be made ({error.strerror})"]
    return [] if os.access(parent, os.W_OK) else [f"output_dir: {parent} cannot be written to"]


def space_problems(folder: Path, modules: Mapping[str, LightningModule], journal: bool) -> list[str]:
    """Whether a result of about the size of these modules would not fit on the disk."""
    sizes = [size_of(t for _, t, _ in named_tensors(module)) for module in modules.values()]
    twice = any(map(pretrained_parts, modules.values()))  # a folder for from_pretrained beside each checkpoint
    need = sum(sizes) * (2 if twice else 1) + max(sizes) * (2 if journal else 1)
    parent = Path(os.path.realpath(folder)).parent
    free = shutil.disk_usage(parent).free
    if need <= free:
        return []
    return [
        f"output_dir: the result takes up to {need / 2**30:.2f} GiB, and {parent} has {free / 2**30:.2f} GiB "
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
) -> None:
    """Write a merge's result: ``merged.safetensors`` (shared parameters), ``<task>.ckpt`` (one Lightning checkpoint a
    task; only ``merged.ckpt`` where tasks differ in nothing), the report (``report.json``, ``.md``, ``.html`` and, if
    matplotlib is installed, ``.png``), and a model card (``README.md``). Models of transformers are written to
    ``transformers`` too, see :func:`~com_lightning.experts.transformers_models.save_pretrained`.

    Args:
        folder: where to. All is written beside it first, and then put there at once; with it goes what an unfinished
            merge has left there.
        modules: task -> merged module.
        shared: names of the shared parameters and buffers.
        report: of the merge.
        overwrite: whether an existing folder is replaced.
        files: further files, name -> text.
        precision: task -> name of each tensor that is stored in another precision than the module's -> that one.

    Raises:
        MergeError: if the folder exists and is not to be overwritten, or cannot be written.
    """
    if problems := output_problems(folder, overwrite):
        raise MergeError(problems)
    modules = _in_precision(modules, precision or {})

    def write(made: Path) -> None:
        module = next(iter(modules.values()))
        ties = tied_names(module)
        tensors = {n: t for n, t, _ in named_tensors(module) if n in set(shared) and ties[n] == n}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, made / "merged.safetensors")
        for name, merged in ({ALL: module} if are_alike(modules) else modules).items():
            _save_checkpoint(merged, made / f"{name}.ckpt")
            _warn_of_what_lacks(merged, made / f"{name}.ckpt", set(shared))
        save_pretrained(modules, shared, made / PRETRAINED)
        texts = {"report.json": report.to_json(), "report.md": report.to_markdown(), **(files or {})}
        for name, text in texts.items():
            (made / name).write_text(text, encoding="utf-8")
        drawn = save_figure(report, made / "report.png")
        page = html_report(report, (made / "report.png").read_bytes() if drawn else None)
        (made / "report.html").write_text(page, encoding="utf-8")
        kinds = {task: f"{type(module).__module__}.{type(module).__qualname__}" for task, module in modules.items()}
        there = sorted(path.relative_to(made).as_posix() for path in made.rglob("*"))
        if "README.md" not in there:  # which the user may have given
            (made / "README.md").write_text(model_card(report, there, kinds), encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        (made / "merged.safetensors").chmod(0o666 & ~umask)  # which safetensors makes private to its owner

    workplace = Workplace(folder)
    try:
        workplace.publish(write)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        workplace.close(keep=True)
        raise MergeError([f"output_dir: {folder} could not be written ({error}); it was left as it was"]) from error
    except BaseException:
        workplace.close(keep=True)
        raise
    workplace.close()


def are_alike(modules: Mapping[str, LightningModule]) -> bool:
    """Whether one checkpoint would do for all tasks: class, hyperparameters, weights and buffers are the same."""
    first, *others = modules.values()
    if is_overridden("on_save_checkpoint", first) or not others:
        return False
    state = first.state_dict()
    return all(
        type(other) is type(first)
        and dict(other.hparams) == dict(first.hparams)
        and (own := other.state_dict()).keys() == state.keys()
        and all(_is_same(value, state[name]) for name, value in own.items())
        for other in others
    )


def _is_same(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return bool(one is other)
    there = one.device == other.device and one.data_ptr() == other.data_ptr() and one.numel() > 0
    return (one.shape, one.dtype) == (other.shape, other.dtype) and (there or torch.equal(one, other.to(one.device)))


def _in_precision(
    modules: Mapping[str, LightningModule], precision: Mapping[str, Mapping[str, torch.dtype]]
) -> dict[str, LightningModule]:
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


def load_results(folder: Path, model: LightningModule, tasks: list[str]) -> dict[str, LightningModule]:
    """Task -> merged module, from a result folder.

    Raises:
        MergeError: naming the tasks that the folder has no readable checkpoint for.
    """
    modules, problems = {}, []
    for task in tasks:
        path = folder / f"{task}.ckpt"
        path = path if path.is_file() else folder / f"{ALL}.ckpt"
        if not path.is_file():
            path = folder / f"{task}.ckpt"
            known = sorted(p.stem for p in folder.glob("*.ckpt")) if folder.is_dir() else []
            problems.append(f"{path}: no such file; {folder} has results for {', '.join(known) or 'no task'}")
            continue
        try:
            modules[task] = _load_result(task, path, model)
        except MergeError as error:
            problems += error.problems
    if problems:
        raise MergeError(problems)
    return modules


def _load_result(task: str, path: Path, model: LightningModule) -> LightningModule:
    try:
        return load_expert(task, path, model)
    except MergeError:
        pretrained = path.parent / PRETRAINED / task
        if not pretrained.is_dir():
            raise
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a part, in a module of another head
            module = load_expert(task, pretrained, model)
        fill(module, read_checkpoint(path)["state_dict"], str(path))
        take_precision(module, model)
        return module


def _warn_of_what_lacks(module: LightningModule, path: Path, shared: set[str]) -> None:
    """A module that writes its adapters only, say, would write nothing of what was merged."""
    try:
        state = read_checkpoint(path)["state_dict"]
    except MergeError:  # hyperparameters that safe loading refuses
        return
    if lacking := [name for name, _ in module.named_parameters() if name in shared and name not in state]:
        rank_zero_warn(
            f"{path.name} lacks merged weights, because {type(module).__name__} leaves them out of its checkpoints: "
            f"{some(lacking)}; merged.safetensors has them"
        )


class _StraightToDisk(TorchCheckpointIO):
    """Lightning's own makes the whole file in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        torch.save(checkpoint, path)


def _save_checkpoint(module: LightningModule, path: Path) -> None:
    """As ``trainer.save_checkpoint`` writes it: hyperparameters and weights, no optimizer."""
    outer = module._trainer
    with quiet_lightning(), torch.inference_mode(False):
        settings: Any = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        trainer = Trainer(**settings, plugins=[_StraightToDisk()])
        trainer.strategy.connect(module)
        module.trainer = trainer
        trainer.save_checkpoint(path, weights_only=True)
    module._trainer = outer
