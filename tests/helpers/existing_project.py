"""The example of an existing project, with merging added to a copy of it."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.running import ROOT

EXAMPLE = ROOT / "examples" / "existing_project"
DIFF = EXAMPLE / "with_merging.diff"
OUTPUTS = Path("outputs/existing_project")


@contextlib.contextmanager
def patched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project as package `patched`, with merging, where nothing else is."""
    folder = tmp_path / "patched"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run(["git", "apply", "-p3", str(DIFF)], cwd=folder, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "patched"]:
        del sys.modules[name]
