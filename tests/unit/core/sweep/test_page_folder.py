"""Folders of pages do not outlive the merges that they belong to."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from com_lightning.core.sweep.page_folder import PageFolder

_OWNER = """
import sys, time
from com_lightning.core.sweep.page_folder import PageFolder
folder = PageFolder()
(folder.path / "0").write_bytes(b"page")
print(folder.path, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no such locks")
def test_the_folder_of_a_killed_process_is_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "com_lightning-of somebody").mkdir()
    with subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        theirs = Path(owner.stdout.readline().strip())
        try:
            first = PageFolder()
            assert (theirs / "0").is_file()  # its owner lives
        finally:
            owner.send_signal(signal.SIGKILL)
    second = PageFolder()
    assert not theirs.exists()
    assert first.path.is_dir()
    for folder in (first, second):
        folder.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["com_lightning-of somebody"]
