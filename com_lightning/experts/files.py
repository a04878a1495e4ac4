"""Read checkpoints safely: nothing in a file is executed."""

from __future__ import annotations

import difflib
import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from com_lightning.errors import MergeError

_SMALL = 2**24
"""Bytes that are never too many."""
_LONGEST_JSON = 2**26
"""Bytes that a JSON file may have."""


def read_checkpoint(path: Path, label: str = "") -> dict[str, Any]:
    """The content of a checkpoint, memory-mapped if its format allows it.

    Args:
        path: of the file.
        label: names the file in messages; its path by default.

    Returns:
        A dictionary with a ``"state_dict"``. A file that holds nothing else (safetensors) becomes one.

    Raises:
        MergeError: if the file is missing, is not a checkpoint, or holds more than tensors and plain values.
    """
    label = label or str(path)
    if path.is_dir():
        raise MergeError([f"{label}: {_folder(path)}"])
    if path.exists() and not path.is_file():  # reading a pipe, for example, would wait
        raise MergeError([f"{label}: neither a file nor a folder"])
    if not path.is_file():
        raise MergeError([f"{label}: no such file{_nearby(path)}"])
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return {"state_dict": load_file(path)}
        except Exception as error:
            raise MergeError([f"{label}: not a readable safetensors file ({error})"]) from error
    if problem := archive_problem(path):
        raise MergeError([f"{label}: {problem}"])
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):
            raise MergeError([f"{label}: {_unsafe(path, error)}"]) from error
        # PyTorch's advice is to load the file unsafely.
        why = "safe loading finds no tensors in it" if "weights_only" in str(error) else _first_line(error)
        raise MergeError([f"{label}: not a readable checkpoint ({why})"]) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict):
        raise MergeError([f"{label}: holds a {type(state).__name__}, not a checkpoint or state dict"])
    if problems := state_problems(state, max(path.stat().st_size, _SMALL)):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    return content if "state_dict" in content else {"state_dict": content}


def archive_problem(path: Path) -> str | None:
    """Returns what is wrong with an archive that unpacks to more bytes than it has; ``None`` if it does not.

    PyTorch stores tensors without compression.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # no archive, or a broken one: the function that reads it reports that
        return None
    if size <= path.stat().st_size + _SMALL:
        return None
    return f"an archive that unpacks to {size:,} bytes, but has {path.stat().st_size:,}: no checkpoint of PyTorch"


def folder_problems(folder: Path) -> list[str]:
    """Returns what in a folder must not be read.

    These are pipes, archives that unpack to far more than they have, huge JSON files, and lists of files that lead out
    of the folder.
    """
    problems = []
    for path in sorted(folder.iterdir()):
        if path.exists() and not (path.is_file() or path.is_dir()):
            problems.append(f"{path.name} is neither a file nor a folder")
        elif path.suffix == ".bin" and (problem := archive_problem(path)):
            problems.append(f"{path.name}: {problem}")
        elif path.suffix == ".json" and path.is_file() and path.stat().st_size > _LONGEST_JSON:
            problems.append(f"{path.name} has {path.stat().st_size:,} bytes; at most {_LONGEST_JSON:,} are read")
    for path in () if problems else sorted(folder.glob("*.index.json")):
        try:
            files = {str(name) for name in json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{path.name} cannot be read ({type(error).__name__}: {error})")
            continue
        if outside := sorted(name for name in files if name in ("", ".", "..") or name != Path(name).name):
            problems.append(f"{path.name} names files outside of the folder: {', '.join(outside[:5])}")
    return problems


def state_problems(state: Mapping[Any, Any], limit: float = math.inf) -> list[str]:
    """Returns what in a state dict cannot be used.

    Args:
        state: names and tensors.
        limit: number of bytes that a tensor may have; a file may claim more than it holds.
    """
    if wrong := [name for name in state if not isinstance(name, str)]:
        return [f"names are text, but {wrong[0]!r} is {type(wrong[0]).__name__}"]
    problems = []
    for name, value in state.items():
        if isinstance(value, Tensor):
            if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
                layout = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
                layout = "complex" if value.is_complex() else layout.removeprefix("torch.")
                problems.append(f"{name} is {layout}; give plain tensors")
            elif value.numel() * value.element_size() > limit:
                problems.append(f"{name} claims {value.numel():,} values, more than the file has room for")
    return problems[:5]


def _folder(path: Path) -> str:
    """Why a folder cannot be read as an expert."""
    if (path / ".metadata").is_file():  # written by FSDP and tensor parallelism
        return (
            "a sharded checkpoint; make it one file with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`, and give that"
        )
    if (path / "checkpoint").is_dir():  # written by DeepSpeed
        return (
            "a sharded checkpoint; make it one file with `convert_zero_checkpoint_to_fp32_state_dict` of "
            "lightning.pytorch.utilities.deepspeed, and give that"
        )
    weights = {p.name for p in path.iterdir() if p.name.startswith(("adapter_model.", "model.", "pytorch_model."))}
    for config, start in (("adapter_config.json", "adapter_model."), ("config.json", ("model.", "pytorch_model."))):
        if beside := sorted(name for name in weights if name.startswith(start)):
            return f"{config} is missing beside {beside[0]}; save_pretrained writes both"
    children = sorted(
        p for p in path.iterdir() if any((p / c).is_file() for c in ("adapter_config.json", "config.json"))
    )
    if children:
        return f"a folder of experts; give one of them: {', '.join(map(str, children[:5]))}"
    return (
        "a folder that holds no expert: neither adapter_config.json (a PEFT adapter) nor config.json (a transformers "
        "model) is in it"
    )


def _nearby(path: Path) -> str:
    """A hint to which path may have been meant instead of one that does not exist."""
    hint = "" if path.is_absolute() else f" in the working directory, {Path.cwd()}"
    if not path.parent.is_dir():
        return f"{hint}; nor is there a folder {path.parent}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], 3)
    return f"{hint}; did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else hint


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unsafe(path: Path, error: Exception) -> str:
    try:
        refused = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # an older format, or a broken file: the error names the first class
        refused = re.findall(r"GLOBAL (\S+)", str(error))[:1]
    return (
        f"safe loading refuses objects that it holds: {', '.join(sorted(refused))}; save hyperparameters as plain "
        "values, or, if you trust the file, allow the class with torch.serialization.add_safe_globals or load the "
        "module yourself and pass it in place of the path"
    )
