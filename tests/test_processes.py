"""Several processes merge as one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_several_processes_merge_as_one() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/processes.py"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, env=environment, timeout=900, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
