"""Sharded checkpoints, as FSDP, ModelParallelStrategy and ``torch.distributed.checkpoint`` write them.

They are read by PyTorch's own reader, tensor by tensor, into mapped files. Their index is a pickle, of which only the
classes of an index are let through.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from com_lightning.core.tensors.mapped import mapped_empty
from com_lightning.core.tensors.private_torch import index_class
from com_lightning.errors import MergeError, reason

INDEX = ".metadata"
"""The file that makes a folder a sharded checkpoint."""
_EXTRA = "meta.pt"
"""The file with all that a Lightning checkpoint holds beside tensors."""
_SLACK = 2**24
"""Bytes that tensors may have more than their files."""


def is_sharded(path: Path) -> bool:
    """Whether a folder is a sharded checkpoint."""
    return (path / INDEX).is_file()


def read_sharded(path: Path, label: str = "") -> dict[str, Any]:
    """The content of a sharded checkpoint, without optimizer states. Tensors are in mapped files.

    These files are in the system's temporary folder, and take as much room there as the tensors.

    Args:
        path: the folder.
        label: names it in messages; its path by default.

    Returns:
        A dictionary with a ``"state_dict"``, and what else a Lightning checkpoint holds.

    Raises:
        MergeError: if it cannot be read, is not safe, or holds no tensors of a model.
    """
    label = label or str(path)
    try:
        reader = _Reader(path)
        index = reader.read_metadata()
        names = _names_of_model(index)
        if problem := _problem(index, names, path):
            raise MergeError([f"{label}: {problem}"])
        state: dict[str, Tensor] = {}
        for key in names:
            entry = index.state_dict_metadata[key]
            assert isinstance(entry, TensorStorageMetadata)
            state[key] = mapped_empty(entry.size, entry.properties.dtype)
        # Processes read for themselves, whichever of them reads what.
        alone: dict[str, Any] = {"no_dist": True} if "no_dist" in inspect.signature(load).parameters else {}
        load(state, storage_reader=reader, **alone)
        extra = torch.load(path / _EXTRA, map_location="cpu", weights_only=True) if (path / _EXTRA).is_file() else {}
    except MergeError:
        raise
    except (Exception, CheckpointException) as error:  # anything can be in a file
        # PyTorch wraps what a process has raised.
        cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
        why = reason(cause) if isinstance(cause, Exception) else type(cause).__name__
        raise MergeError([f"{label}: not a readable sharded checkpoint ({why})"]) from error
    return {**(extra if isinstance(extra, dict) else {}), "state_dict": {names[key]: state[key] for key in names}}


class _Reader(FileSystemReader):
    """PyTorch's reader, with an index that is unpickled safely."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        content = (Path(self.path) / INDEX).read_bytes()
        index = _Unpickler(io.BytesIO(content)).load()
        if not isinstance(index, Metadata):
            raise ValueError(f"{INDEX} holds a {type(index).__name__}")
        if index.storage_meta is None:
            index.storage_meta = StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (known := index_class(module, name)) is not None:
            return known
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module.partition(".")[0] == "pathlib":
            return PurePosixPath
        raise pickle.UnpicklingError(f"{INDEX} names {module}.{name}, which no index needs")


def _names_of_model(index: Metadata) -> dict[str, str]:
    """Key of each tensor of the model -> its name there. Checkpoints nest it in dictionaries, beside optimizers."""
    places = index.planner_data if isinstance(index.planner_data, Mapping) else {}
    paths = {
        key: tuple(map(str, places.get(key, (key,))))
        for key, entry in index.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    while True:
        paths = {key: path for key, path in paths.items() if len(path) == 1 or not path[0].startswith("optim")}
        first = {path[0] for path in paths.values() if len(path) > 1}
        likely = ("state_dict", "model", *(first if len(first) == 1 else ()))
        inner = next((name for name in likely if name in first), None)
        if inner is None:
            return {key: ".".join(path) for key, path in paths.items()}
        paths = {key: path[1:] for key, path in paths.items() if path[0] == inner and len(path) > 1}


def _problem(index: Metadata, names: Mapping[str, str], path: Path) -> str:
    """Why it must not be read; empty if it may be."""
    if not names:
        return "a sharded checkpoint without tensors of a model"
    files = {str(info.relative_path) for info in (index.storage_data or {}).values()}
    if outside := sorted(name for name in files if name in ("", ".", "..") or name != Path(name).name):
        return f"{INDEX} names files outside of the folder: {', '.join(outside[:5])}"
    if missing := sorted(name for name in files if not (path / name).is_file()):
        return f"{INDEX} names files that are not there: {', '.join(missing[:5])}"
    entries = [entry for key in names if isinstance(entry := index.state_dict_metadata[key], TensorStorageMetadata)]
    claimed = sum(entry.size.numel() * entry.properties.dtype.itemsize for entry in entries)
    there = sum((path / name).stat().st_size for name in files)
    if claimed > there + _SLACK:
        return f"its tensors claim {claimed:,} bytes, and its files have {there:,}"
    return ""
