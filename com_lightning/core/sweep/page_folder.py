"""A temporary folder for pages that outlives no merge, or only until the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where pages of a killed merge stay until the system removes them
    fcntl = None  # type: ignore[assignment]

_PREFIX = "com_lightning-"
_LOCK = "lock"


class PageFolder:
    """A folder in the system's temporary folder.

    A process that is killed cannot remove it, but the system then releases the lock that the process holds on a file in
    it. The next merge that needs such a folder removes all whose lock is free.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        _remove_abandoned()
        self._temporary = tempfile.TemporaryDirectory(prefix=_PREFIX)
        self.path = Path(self._temporary.name)
        self._lock: int | None = None
        if fcntl is not None:
            self._lock = os.open(self.path / "new", os.O_CREAT | os.O_RDWR, 0o600)
            with suppress(OSError):  # this file system has no locks: the folder has none, and stays if it is abandoned
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.rename(self.path / "new", self.path / _LOCK)  # it appears as a lock only once it is held

    def remove(self) -> None:
        """Remove the folder with its files."""
        self._temporary.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _remove_abandoned() -> None:
    if fcntl is None:
        return
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it is in use, has no lock, or belongs to somebody else
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
