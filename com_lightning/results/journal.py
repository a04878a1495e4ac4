"""The layers of an unfinished merge on disk, so that a merge that is killed goes on where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from lightning_utilities.core.rank_zero import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from com_lightning.core.sweep.context import Journal, Solved
from com_lightning.core.sweep.task import LayerRecord, SkippedBatch
from com_lightning.errors import MergeError
from com_lightning.experts.state_dicts import some
from com_lightning.results.atomic import write_text, write_whole

_FINGERPRINT = "fingerprint.json"


class FileJournal(Journal):
    """One safetensors file per merged layer: its record, and the values written, in the precision they are stored in.
    All files together are about as large as the merged model.

    Args:
        folder: for the files. It is made with the first layer.
    """

    keeps = True

    def __init__(self, folder: Path) -> None:
        self.folder, self.resumed = folder, 0
        self._files: dict[str, Path] = {}
        self._count = 0
        self._fingerprint: Mapping[str, str] = {}

    def bind(self, fingerprint: Mapping[str, str]) -> None:
        self._fingerprint = dict(fingerprint)
        path = self.folder / _FINGERPRINT
        if not path.is_file():
            shutil.rmtree(self.folder, ignore_errors=True)  # killed before it had a layer
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        names = dict.fromkeys([*before, *fingerprint])
        if differing := [name for name in names if before.get(name) != fingerprint.get(name)]:
            told = [_difference(name, before.get(name), fingerprint.get(name)) for name in differing]
            raise MergeError(
                [
                    f"output_dir: {self.folder} holds the layers of an unfinished merge that differs from this one: "
                    f"{some(told)}. Run that one again to finish it, name another output_dir, or set no_resume to drop "
                    "what is there"
                ]
            )
        while (file := self._file(self._count)).is_file():
            try:
                with safe_open(file, "pt") as content:
                    self._files[content.metadata()["layer"]] = file
            except (SafetensorError, OSError):  # what a disk has lost is merged again, as is all that comes after it
                break
            self._count += 1
        rank_zero_info(f"Going on with an unfinished merge: {self._count} layers are taken from {self.folder}.")

    def get(self, layer: str) -> Solved | None:
        if layer not in self._files:
            return None
        with safe_open(self._files[layer], "pt") as content:
            metadata = content.metadata()
            written = [(name, (first, last)) for name, first, last in json.loads(metadata["written"])]
            values = [content.get_tensor(str(number)) for number in range(len(written))]
        self.resumed += 1
        skipped = [SkippedBatch(**entry) for entry in json.loads(metadata["skipped"])]
        return Solved(LayerRecord(**json.loads(metadata["record"])), written, values, skipped)

    def add(self, layer: str, solved: Solved) -> None:
        try:
            if not self._count:
                self.folder.mkdir(parents=True, exist_ok=True)
                text = json.dumps(self._fingerprint, indent=1)
                write_text(self.folder / _FINGERPRINT, text)
            metadata = {
                "layer": layer,
                "record": json.dumps(asdict(solved.record)),
                "skipped": json.dumps([asdict(entry) for entry in solved.skipped]),
                "written": json.dumps([(name, *extent) for name, extent in solved.written]),
            }
            tensors = {str(n): value.detach().cpu().contiguous() for n, value in enumerate(solved.values)}
            write_whole(self._file(self._count), lambda path: save_file(tensors, path, metadata))
        except (OSError, SafetensorError) as error:
            raise MergeError(
                [
                    f"output_dir: layer '{layer}' could not be written to {self.folder} ({error}). {self._count} "
                    "layers are there: make room, and run the same again to go on"
                ]
            ) from error
        self._count += 1

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"


def _difference(name: str, before: str | None, now: str | None) -> str:
    if before is None or now is None:
        return f"{name} ({'not in this one' if now is None else 'only in this one'})"
    short = max(len(before), len(now)) <= 24  # or else it is a digest
    return f"{name} ({before}, now {now})" if short else name
