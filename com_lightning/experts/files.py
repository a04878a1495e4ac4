"""Read checkpoints safely: nothing in a file is executed."""

from __future__ import annotations

import difflib
import json
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from com_lightning.errors import MergeError, reason
from com_lightning.experts.sharded import is_sharded, read_sharded

_SMALL = 2**24
"""Bytes that are never too many."""
LONGEST_JSON = 2**26
"""Bytes that a JSON file may have."""
TOKENIZER_FOLDERS = ("additional_chat_templates", "*processor*", "*tokenizer*")
"""Names of folders in the folder of a model whose files are read and copied, too."""


def read_checkpoint(path: Path, label: str = "") -> dict[str, Any]:
    """The content of a checkpoint, memory-mapped if its format allows it.

    Args:
        path: of the file, or of the folder of a sharded checkpoint.
        label: names the file in messages; its path by default.

    Returns:
        A dictionary with a ``"state_dict"``. A file that holds nothing else (safetensors) becomes one.

    Raises:
        MergeError: if the file is missing, is not a checkpoint, or holds more than tensors and plain values.
    """
    label = label or str(path)
    if is_sharded(path):
        return read_sharded(path, label)
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


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration.

    Args:
        path: of a JSON file.

    Returns:
        Its content.

    Raises:
        MergeError: if it cannot be read, or holds anything but an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MergeError([f"{path.name} cannot be read ({reason(error)})"]) from error
    if not isinstance(content, dict):
        names = {"NoneType": "null", "bool": "true or false", "list": "a list", "str": "text"}
        kind = names.get(type(content).__name__, "a number")
        raise MergeError([f"{path.name} holds {kind}, not an object with settings"])
    return content


def leads_out(path: Path, folder: Path) -> bool:
    """Find out whether a file in a folder is a link to something outside of it.

    Args:
        path: of the file.
        folder: of a model. In the cache of the Hugging Face Hub it holds links to that model's ``blobs``, which are
            taken to be inside.

    Returns:
        Whether it is such a link.
    """
    if not path.is_symlink():
        return False
    inside = [home := Path(os.path.realpath(folder))]
    if home.parent.name == "snapshots":
        inside.append(home.parent.parent / "blobs")
    target = Path(os.path.realpath(path))
    return not any(target.is_relative_to(place) for place in inside)


def folder_problems(folder: Path) -> list[str]:
    """Returns what in a folder must not be read.

    These are pipes, links and lists of files that lead out of the folder, archives that unpack to far more than they
    have, and huge JSON files.
    """
    problems = []
    inner = [path for path in folder.iterdir() if any(fnmatchcase(path.name, name) for name in TOKENIZER_FOLDERS)]
    for path in sorted([*folder.iterdir(), *(p for i in inner if i.is_dir() for p in i.iterdir())]):
        name = path.relative_to(folder).as_posix()
        if leads_out(path, folder) and (path in inner or not path.is_dir()):
            target = os.readlink(path)
            problems.append(f"{name} is a link that leads out of the folder, to {target}; put the file itself there")
        elif path.exists() and not (path.is_file() or path.is_dir()):
            problems.append(f"{name} is neither a file nor a folder")
        elif path.suffix == ".bin" and (problem := archive_problem(path)):
            problems.append(f"{name}: {problem}")
        elif path.suffix == ".json" and path.is_file() and path.stat().st_size > LONGEST_JSON:
            problems.append(f"{name} has {path.stat().st_size:,} bytes; at most {LONGEST_JSON:,} are read")
    for path in () if problems else sorted(folder.glob("*.index.json")):
        try:
            files = {str(name) for name in read_json(path)["weight_map"].values()}
        except MergeError as error:
            problems += error.problems
            continue
        except (LookupError, AttributeError) as error:
            problems.append(f"{path.name} cannot be read ({reason(error)})")
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
            if (
                value.is_nested
                or value.layout != torch.strided
                or value.is_meta
                or value.is_quantized
                or value.is_complex()
            ):
                layout = "meta" if value.is_meta else "quantized" if value.is_quantized else str(value.layout)
                layout = "nested" if value.is_nested else layout
                layout = "complex" if value.is_complex() else layout.removeprefix("torch.")
                problems.append(f"{name} is {layout}; give plain tensors")
            elif value.numel() * value.element_size() > limit:
                problems.append(f"{name} claims {value.numel():,} values, more than the file has room for")
    return problems[:5]


def _folder(path: Path) -> str:
    """Why a folder cannot be read as an expert."""
    if (path / "checkpoint").is_dir():  # written by DeepSpeed
        return (
            "a sharded checkpoint; make it one file with `convert_zero_checkpoint_to_fp32_state_dict` of "
            "lightning.pytorch.utilities.deepspeed, and give that"
        )
    weights = {p.name for p in path.iterdir() if p.name.startswith(("adapter_model.", "model.", "pytorch_model."))}
    for config, start in (("adapter_config.json", "adapter_model."), ("config.json", ("model.", "pytorch_model."))):
        if beside := sorted(name for name in weights if name.startswith(start)):
            missing = "no file" if os.path.lexists(path / config) else "missing"
            return f"{config} is {missing} beside {beside[0]}; save_pretrained writes both"
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
