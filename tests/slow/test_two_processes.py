"""The command line in two processes, which Lightning starts, gives what it gives in one.

``ddp`` runs the command anew for each process, so that it has to be a command.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers import relative
from tests.helpers.commands import DATA, MODEL, QUIET, base_file, expert_files
from tests.helpers.running import ROOT

GRID = "{class_path: TaskArithmetic, init_args: {scale: 0.2}}"
PROCESSES = {"one": [], "two": ["--trainer.devices=2", "--trainer.strategy=ddp"]}


def reports(folder: Path, command: str, *options: str) -> list[dict[str, Any]]:
    """The reports of one process and of two."""
    common = [*MODEL, *DATA, *QUIET, *expert_files(folder), base_file(folder), "--trainer.precision=64", *options]
    for name, several in PROCESSES.items():
        run = [sys.executable, "-m", "com_lightning", command, *common, *several, f"--output_dir={folder / name}"]
        subprocess.run(run, check=True, timeout=300, cwd=ROOT)
    return [json.loads((folder / name / "report.json").read_text()) for name in PROCESSES]


@pytest.mark.parametrize("method", ["ChainOfMerges", "TIES"])
def test_merge(method: str, tmp_path: Path) -> None:
    one, two = reports(tmp_path, "merge", f"--method={method}")
    tensors, theirs = (load_file(tmp_path / name / "merged.safetensors") for name in PROCESSES)
    bound = 0 if method == "TIES" else 1e-6  # parameters are shared out among the processes
    assert all(relative(theirs[name], value) <= bound for name, value in tensors.items())
    for task in "ab":
        assert two["metrics"]["merged"][task] == pytest.approx(one["metrics"]["merged"][task], rel=1e-9)


def test_compare(tmp_path: Path) -> None:
    one, two = reports(tmp_path, "compare", f"--methods=[{GRID}, TaskArithmetic, RegMean, ChainOfMerges]")
    for mine, theirs in zip(one["outcomes"], two["outcomes"], strict=True):
        assert mine["label"] == theirs["label"]
        for task in "ab":
            assert mine["metrics"]["report"][task] == pytest.approx(theirs["metrics"]["report"][task], rel=1e-9)
    for (layer, mine), (other, theirs) in zip(one["average_drift"], two["average_drift"], strict=True):
        assert layer == other
        assert mine == pytest.approx(theirs, rel=1e-6, abs=1e-9)
