"""Files and folders that appear whole or not at all, even if the process is killed or the power fails.

The usual trick: write under another name on the same file system, flush to the disk, then rename, which is atomic.
:class:`Workplace` does this for the folder of a result, :func:`write_whole` for a file.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from com_lightning.errors import MergeError, MergeWarning


class Workplace:
    """The hidden folder ``.<name>.partial`` beside a result folder ``<name>``.

    It holds the journal of an unfinished merge, and the result while it is being written. One process at a time may use
    it; the lock of a killed process is free again.

    Args:
        folder: The result folder. If it is a link, its target counts.
        discard_journal: Whether to drop the journal of an unfinished merge.

    Raises:
        MergeError: If another process uses it, or it cannot be written.
    """

    def __init__(self, folder: Path, discard_journal: bool = False) -> None:
        self.folder = folder = Path(os.path.realpath(folder))
        self.path = folder.parent / f".{folder.name}.partial"
        self.journal = self.path / "journal"
        self._made, self._replaced = self.path / "result", self.path / "replaced"
        self._lock = FileLock(self.path / "lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except NotImplementedError:
                told = (
                    f"output_dir: the file system of {folder.parent} has no locks; see that no other merge writes there"
                )
                warnings.warn(told, MergeWarning, stacklevel=2)
            self._recover()
            if discard_journal:
                shutil.rmtree(self.journal, ignore_errors=True)
        except Timeout as error:
            problem = f"output_dir: another merge is writing {folder}; wait for it, or name another"
            raise MergeError([problem]) from error
        except OSError as error:
            problem = f"output_dir: {folder.parent} cannot be written to ({error.strerror or error}); name another"
            raise MergeError([problem]) from error

    def publish(self, write: Callable[[Path], None]) -> None:
        """Write the result and put it in its place. An earlier result there is replaced.

        Args:
            write: ``write(folder)`` writes all files of the result.
        """
        self._made.mkdir()
        try:
            write(self._made)
            _sync(self._made)
            if self.folder.exists():
                os.replace(self.folder, self._replaced)
            os.replace(self._made, self.folder)
            _sync_folder(self.folder.parent)
        except BaseException:
            self._recover()
            raise

    def close(self, keep: bool = False) -> None:
        """Give it up, and remove it.

        Args:
            keep: Whether to leave it there if it has a journal.
        """
        if not keep or not self.journal.is_dir():
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()

    def _recover(self) -> None:
        """Undo what a killed process left half done: put a replaced result back, and remove what is incomplete."""
        if self._replaced.exists() and not self.folder.exists():
            os.replace(self._replaced, self.folder)
        for leftover in (self._made, self._replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that it exists completely or not at all, even after a power cut.

    Args:
        path: Where the file will be.
        write: ``write(temporary)`` writes its content to another path.
    """
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
    """Write a text file with :func:`write_whole`."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _sync(path: Path) -> None:
    """Flush a file, or all files in a folder, from memory to the disk."""
    files = [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]
    for file in files:
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())
    for folder in {file.parent for file in files}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
