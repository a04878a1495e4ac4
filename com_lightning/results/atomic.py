"""Where a result is made before it appears, beside the folder that it will be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from com_lightning.errors import MergeError


class Workplace:
    """The hidden folder ``.<name>.partial`` beside a result folder ``<name>``: the journal of an unfinished merge, and
    the result while it is being written. One process at a time has it; a process that is killed loses it.

    Args:
        folder: where the result will be; of a link, what it points to.
        afresh: drop the journal of an unfinished merge.

    Raises:
        MergeError: if another process is at it, or nothing can be written there.
    """

    def __init__(self, folder: Path, afresh: bool = False) -> None:
        self.folder = folder = Path(os.path.realpath(folder))
        self.path = folder.parent / f".{folder.name}.partial"
        self.journal = self.path / "journal"
        self._lock = FileLock(self.path / "lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(NotImplementedError):  # a file system without locks
                self._lock.acquire()
            self._recover()
            if afresh:
                shutil.rmtree(self.journal, ignore_errors=True)
        except Timeout as error:
            raise MergeError(
                [f"output_dir: another merge is writing {folder}; wait for it, or name another"]
            ) from error
        except OSError as error:
            told = error.strerror or error
            raise MergeError([f"output_dir: {folder.parent} cannot be written to ({told}); name another"]) from error

    def publish(self, write: Callable[[Path], None]) -> None:
        """Write the result with ``write(folder)``, then put it in its place, at once. What was there is replaced."""
        made, old = self.path / "result", self.path / "replaced"
        made.mkdir()
        try:
            write(made)
            _sync(made)
            if self.folder.exists():
                os.replace(self.folder, old)
            os.replace(made, self.folder)
            _sync_folder(self.folder.parent)
        except BaseException:
            self._recover()
            raise

    def close(self, keep: bool = False) -> None:
        """Leave it to others. What is there is removed, unless a journal is to be kept and has something in it."""
        if not keep or not self.journal.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def _recover(self) -> None:
        """Undo what a process that was killed has left half done: a result half written, or about to be replaced."""
        made, old = self.path / "result", self.path / "replaced"
        if old.exists() and not self.folder.exists():
            os.replace(old, self.folder)
        for left in (made, old):
            shutil.rmtree(left, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file with ``write(temporary)`` so that under its own name it is there whole, or not at all, even after a
    power cut."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, likewise."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_whole(path, write)


def _sync(path: Path) -> None:
    """Have a file, or all files in a folder, on the disk rather than in memory."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    for folder in {file.parent for file in files}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
