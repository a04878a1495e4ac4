"""The example of several processes: its commands, and what they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml
from safetensors.torch import load_file

from tests.helpers.classifier import make_experts
from tests.helpers.numbers import relative
from tests.helpers.running import ROOT, save_lightning

EXAMPLE = ROOT / "examples" / "ddp_merge"
TASKS = {"a": {"seed": 0, "classes": 3}, "b": {"seed": 1, "classes": 4}}


def make_project(folder: Path) -> Path:
    """A user's two configurations and two experts."""
    data = {name: {"class_path": "tests.helpers.PointsData", "init_args": args} for name, args in TASKS.items()}
    tasks = {
        "model": {"class_path": "tests.helpers.Classifier"},
        "data": {"class_path": "com_lightning.MergeDataModule", "init_args": {"num_samples": 40, "tasks": data}},
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": 64, "logger": False, "enable_progress_bar": False},
    }
    for name, expert in zip(TASKS, make_experts()):
        save_lightning(expert, folder / f"{name}.ckpt")
    merge = {"experts": {name: f"{name}.ckpt" for name in TASKS}}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(tasks))
    (folder / "merge.yaml").write_text(yaml.safe_dump(merge))
    return folder


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
