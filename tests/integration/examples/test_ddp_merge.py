"""The example of several processes: what it starts merges as one process does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from tests.helpers import free_port, make_experts, quiet_trainer, relative

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "ddp_merge"
TASKS = {"a": {"seed": 0, "classes": 3}, "b": {"seed": 1, "classes": 4}}
SRUN = """#!/usr/bin/env bash
for rank in 0 1; do SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" & done
wait -n && wait -n
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's two configurations and two experts."""
    data = {name: {"class_path": "tests.helpers.PointsData", "init_args": args} for name, args in TASKS.items()}
    tasks = {
        "model": {"class_path": "tests.helpers.Classifier"},
        "data": {"class_path": "com_lightning.MergeDataModule", "init_args": {"num_samples": 40, "tasks": data}},
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": 64, "logger": False, "enable_progress_bar": False},
    }
    for name, expert in zip(TASKS, make_experts()):
        trainer = quiet_trainer()
        trainer.strategy.connect(expert)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only=True)
    merge = {"experts": {name: f"{name}.ckpt" for name in TASKS}}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(merge))
    return tmp_path


def start(project: Path, output: str, *command: str, **variables: object) -> subprocess.Popen[str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    here = os.pathsep.join([str(project / "bin"), str(Path(sys.executable).parent), known["PATH"]])
    known |= {"PATH": here, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--config=tasks.yaml", "--config=merge.yaml", f"--output_dir={output}"],
        cwd=project,
        env=known | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_all_merge_as_one(project: Path, *processes: subprocess.Popen[str]) -> None:
    """What they have written into `several` is what one process writes."""
    one = start(project, "one", sys.executable, "-m", "com_lightning", "merge")
    try:
        told = [process.communicate(timeout=600)[0] for process in (one, *processes)]
    finally:
        for process in (one, *processes):
            process.kill()
    assert [process.returncode for process in (one, *processes)] == [0] * len(told), "\n".join(told)
    ours, theirs = (load_file(project / name / "merged.safetensors") for name in ("several", "one"))
    assert ours.keys() == theirs.keys()
    assert all(relative(ours[name], value) < 1e-6 for name, value in theirs.items())
    assert "| mean |" in told[1]


def test_two_processes_by_torchrun(project: Path) -> None:
    command = ("bash", str(EXAMPLE / "torchrun.sh"))
    assert_all_merge_as_one(project, start(project, "several", *command, GPUS=2, PORT=free_port()))


@pytest.mark.slow
def test_two_machines_by_torchrun(project: Path) -> None:
    command, common = ("bash", str(EXAMPLE / "torchrun.sh")), {"MACHINES": 2, "GPUS": 1, "PORT": free_port()}
    assert_all_merge_as_one(
        project, *(start(project, "several", *command, MACHINE=machine, **common) for machine in range(2))
    )


@pytest.mark.slow
def test_two_machines_by_slurm(project: Path) -> None:
    """`srun` is one that starts both processes here."""
    (project / "bin").mkdir()
    (project / "bin" / "srun").write_text(SRUN)
    (project / "bin" / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": 1, "SLURM_JOB_NAME": "merge", "SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": free_port()}
    size = {"SLURM_NNODES": 2, "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1}
    assert_all_merge_as_one(project, start(project, "several", "bash", str(EXAMPLE / "merge.sbatch"), **job, **size))


def test_what_the_readme_names_is_there() -> None:
    text = (EXAMPLE / "README.md").read_text()
    named = set(re.findall(r"(?:configs|examples)/[\w/.]+\w", text))
    assert {"configs/ddp.yaml", "examples/ddp_merge/torchrun.sh", "examples/ddp_merge/merge.sbatch"} <= named
    assert all((ROOT / name).is_file() for name in named)
