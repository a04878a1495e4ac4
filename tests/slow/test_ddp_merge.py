"""The example of several processes, on one machine and on two."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import free_port
from tests.helpers.machines import EXAMPLE, assert_all_merge_as_one, make_project, start

SRUN = """#!/usr/bin/env bash
for rank in 0 1; do SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" & done
wait -n && wait -n
"""


def test_two_processes_by_torchrun(tmp_path: Path) -> None:
    project, command = make_project(tmp_path), ("bash", str(EXAMPLE / "torchrun.sh"))
    assert_all_merge_as_one(project, start(project, "several", *command, GPUS=2, PORT=free_port()))


def test_two_machines_by_torchrun(tmp_path: Path) -> None:
    project, command = make_project(tmp_path), ("bash", str(EXAMPLE / "torchrun.sh"))
    common = {"MACHINES": 2, "GPUS": 1, "PORT": free_port()}
    machines = [start(project, "several", *command, MACHINE=machine, **common) for machine in range(2)]
    assert_all_merge_as_one(project, *machines)


def test_two_machines_by_slurm(tmp_path: Path) -> None:
    """`srun` is one that starts both processes here."""
    project = make_project(tmp_path)
    (project / "bin").mkdir()
    (project / "bin" / "srun").write_text(SRUN)
    (project / "bin" / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": 1, "SLURM_JOB_NAME": "merge", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}
    size = {"SLURM_NNODES": 2, "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1}
    assert_all_merge_as_one(project, start(project, "several", "bash", str(EXAMPLE / "merge.sbatch"), **job, **size))
