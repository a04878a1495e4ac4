"""The example of several processes: what it starts merges as one process does. Two machines: tests/slow."""

from __future__ import annotations

import re
from pathlib import Path

from tests.helpers import free_port
from tests.helpers.machines import EXAMPLE, assert_all_merge_as_one, make_project, start
from tests.helpers.running import ROOT


def test_two_processes_by_torchrun(tmp_path: Path) -> None:
    project, command = make_project(tmp_path), ("bash", str(EXAMPLE / "torchrun.sh"))
    assert_all_merge_as_one(project, start(project, "several", *command, GPUS=2, PORT=free_port()))


def test_what_the_readme_names_is_there() -> None:
    text = (EXAMPLE / "README.md").read_text()
    named = set(re.findall(r"(?:configs|examples)/[\w/.]+\w", text))
    assert {"configs/ddp.yaml", "examples/ddp_merge/torchrun.sh", "examples/ddp_merge/merge.sbatch"} <= named
    assert all((ROOT / name).is_file() for name in named)
