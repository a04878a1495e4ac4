"""What an unfinished run has written to disk, so that a run that is killed goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from com_lightning.core.sweep.context import Journal, Solved
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, SkippedBatch
from com_lightning.core.tensors.digest import digest
from com_lightning.errors import MergeError, reason
from com_lightning.experts.state_dicts import some
from com_lightning.results.atomic import write_whole

_FINGERPRINT = "fingerprint.json"


class FileStore:
    """The files of an unfinished run. Each of them is there whole, or not at all.

    Args:
        folder: for the files. It is made with the first one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, write: Callable[[Path], Any], label: str) -> None:
        """Write a file with ``write(path)``.

        Args:
            name: of the file.
            write: writes to the path that it is given.
            label: what the file holds, for the error.

        Raises:
            MergeError: if the disk is full, or the folder cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_whole(self.folder / name, write)
        except (OSError, SafetensorError) as error:
            message = f"output_dir: {label} could not be written to {self.folder} ({error})"
            raise MergeError([f"{message}. Make room, and run the same again: it goes on from there"]) from error


class ResultStore(FileStore):
    """Results of an unfinished comparison: one JSON file each. Other processes get what the first one reads.

    Args:
        folder: for the files; it matters in the first process only.
        peers: the processes.
        context: all that the results depend on, beside their keys.
    """

    def __init__(self, folder: Path, peers: Peers, context: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.peers, self.context = peers, dict(context)

    def get(self, key: Any) -> Any:
        """The result of this key and context, or ``None``."""
        result = None
        if self.peers.rank == 0:
            with suppress(OSError, ValueError, KeyError, TypeError):  # a disk has damaged it: it is computed again
                content = json.loads((self.folder / self._name(key)).read_text(encoding="utf-8"))
                result = content["found"] if content["checksum"] == digest(json.dumps(content["found"])) else None
        return self.peers.exchange(result)[0]

    def add(self, key: Any, result: Any) -> Any:
        """Write down a result, and return it as :meth:`get` will."""
        if self.peers.rank == 0:
            found = json.loads(json.dumps(result, default=str))
            text = json.dumps({"key": key, "found": found, "checksum": digest(json.dumps(found))}, default=str)
            self.write(self._name(key), lambda path: path.write_text(text, encoding="utf-8"), "a result")
        return json.loads(json.dumps(result, default=str))

    def _name(self, key: Any) -> str:
        return f"{digest([self.context, json.dumps(key, sort_keys=True, default=str)])}.json"


class FileJournal(FileStore, Journal):
    """One safetensors file per merged layer: its record, and the values written, in the precision they are stored in.

    All files together are about as large as the merged model.

    Args:
        folder: for the files. It is made with the first layer.
    """

    keeps = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.resumed = 0
        self._files: dict[str, Path] = {}
        self._count = 0
        self._fingerprint: Mapping[str, str] = {}

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        self._fingerprint = dict(fingerprint)
        path = self.folder / _FINGERPRINT
        if not path.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)  # killed before it had a layer
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(before, dict):
                raise ValueError("it is no dictionary")
        except (OSError, ValueError) as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            rank_zero_warn(f"{path} is damaged ({error}): all layers are merged again")
            return
        names = dict.fromkeys([*before, *fingerprint])
        if differing := [name for name in names if before.get(name) != fingerprint.get(name)]:
            differences = [_difference(name, before.get(name), fingerprint.get(name)) for name in differing]
            raise MergeError(
                [
                    f"output_dir: {self.folder} holds the layers of an unfinished merge that differs from this one: "
                    f"{some(differences)}. Run that one again to finish it, name another output_dir, or set "
                    "resume=False to drop what is there"
                ]
            )
        while (file := self._file(self._count)).is_file():
            try:
                layer, _ = _read(file, self._fingerprint)
            except _UNREADABLE as error:  # later layers were solved on top of this one
                rank_zero_warn(f"{file} is damaged ({reason(error)}): this layer and all later ones are merged again")
                break
            self._files[layer] = file
            self._count += 1
        rank_zero_info(f"Going on with an unfinished merge: {self._count} layers are taken from {self.folder}.")

    def get(self, layer: str) -> Solved | None:
        if layer not in self._files:
            return None
        self.resumed += 1
        return _read(self._files[layer], self._fingerprint)[1]

    def add(self, layer: str, solved: Solved) -> None:
        if not self._count:
            text = json.dumps(self._fingerprint, indent=1)
            self.write(_FINGERPRINT, lambda path: path.write_text(text, encoding="utf-8"), "the journal")
        metadata = {
            "layer": layer,
            "record": json.dumps(asdict(solved.record)),
            "skipped": json.dumps([asdict(entry) for entry in solved.skipped]),
            "written": json.dumps([(name, *extent) for name, extent in solved.written]),
        }
        tensors = {str(n): value.detach().cpu().contiguous() for n, value in enumerate(solved.values)}
        metadata["checksum"] = _checksum(metadata, list(tensors.values()), self._fingerprint)
        label = f"layer '{layer}' (after {self._count} others)"
        self.write(self._file(self._count).name, lambda path: save_file(tensors, path, metadata), label)
        self._count += 1

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


_UNREADABLE = (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError)
"""What reading a damaged file may raise."""


def _read(file: Path, fingerprint: Mapping[str, str]) -> tuple[str, Solved]:
    """A layer, and how it was solved. The file has to be as it was written, in a merge of this fingerprint."""
    with safe_open(file, "pt") as content:
        metadata = dict(content.metadata())
        values = [content.get_tensor(str(number)) for number in range(len(content.keys()))]
    if metadata.pop("checksum") != _checksum(metadata, values, fingerprint):
        raise ValueError("its checksum differs")
    written = [(name, (first, last)) for name, first, last in json.loads(metadata["written"])]
    skipped = [SkippedBatch(**entry) for entry in json.loads(metadata["skipped"])]
    return metadata["layer"], Solved(LayerRecord(**json.loads(metadata["record"])), written, values, skipped)


def _checksum(metadata: Mapping[str, str], values: Sequence[Tensor], fingerprint: Mapping[str, str]) -> str:
    return digest([sorted(metadata.items()), sorted(fingerprint.items()), *values])


def _difference(name: str, before: str | None, now: str | None) -> str:
    if before is None or now is None:
        return f"{name} ({'not in this one' if now is None else 'only in this one'})"
    short = max(len(before), len(now)) <= 24  # or else it is a digest
    return f"{name} ({before}, now {now})" if short else name
