"""The command line in several processes, as Lightning, torchrun and SLURM start them: results, and what ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.helpers import free_port, make_experts, relative
from tests.helpers.running import save_lightning

ROOT = Path(__file__).parents[2]
PROJECT = '''
import os, signal, time
from pathlib import Path

from com_lightning.core.sweep.lockstep import running
from tests.helpers import Classifier, PointsData


class Mine(Classifier):
    """Waits for the test, if asked to, in its first calibration forward."""

    def validation_step(self, batch, batch_idx):
        rank = os.environ.get("LOCAL_RANK", "0")
        marks = Path(os.environ.get("MARKS", "."))
        if running() is not None and os.environ.get("WAITS") == rank and not (marks / rank).exists():
            (marks / rank).write_text(str(os.getpid()))
            time.sleep(120)
        elif "WAITS" in os.environ:
            (marks / rank).write_text(str(os.getpid()))
        super().validation_step(batch, batch_idx)


class MyData(PointsData):
    """Says that it was prepared; lacks a file where it is told to."""

    def prepare_data(self):
        names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
        rank = next((os.environ[name] for name in names if name in os.environ), "0")
        if os.environ.get("LACKS") == rank:
            raise FileNotFoundError("points.csv")
        Path(os.environ["MARKS"], f"prepared{rank}").touch()
'''


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's folder: a module, its data, two experts; and a folder for each host."""
    (tmp_path / "mine.py").write_text(PROJECT)
    for task, expert in zip("ab", make_experts()):
        save_lightning(expert, tmp_path / f"{task}.ckpt")
    for host in range(2):
        (tmp_path / f"host{host}").mkdir()
    (tmp_path / "marks").mkdir()
    return tmp_path


def options(project: Path, *more: str, output: str = "merged") -> list[str]:
    data = [f"--data.tasks.{task}=mine.MyData" for task in "ab"]
    return [
        *("merge", "--model=mine.Mine", "--data=com_lightning.MergeDataModule", "--data.num_samples=40", *data),
        *("--data.tasks.b.seed=1", "--data.tasks.b.classes=4", "--trainer.accelerator=cpu", "--trainer.logger=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.precision=64", f"--output_dir={output}"),
        *(f"--experts.{task}={project / task}.ckpt" for task in "ab"),
        *more,
    ]


def environment(project: Path, **more: Any) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PYTEST_"))}
    paths = os.pathsep.join([str(project), str(ROOT)])
    return {**known, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MARKS": str(project / "marks")} | {
        name: str(value) for name, value in more.items()
    }


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes, each with a group of its own, of which nothing is left when a test ends."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        process.wait()


def start(started: list[subprocess.Popen[str]], command: list[str], folder: Path, known: dict[str, str]) -> Any:
    out = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=folder, env=known, stdout=out, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    started.append(process)
    return process


def hosts(
    kind: str, project: Path, started: list[subprocess.Popen[str]], **more: str
) -> tuple[list[subprocess.Popen[str]], list[str]]:
    """Two processes that take each other for another machine, each in a folder of its own; and what they printed."""
    port = free_port()
    overlay = (ROOT / "configs" / "ddp.yaml").read_text()
    edited = overlay.replace("devices: 2", "devices: 1").replace("num_nodes: 1", "num_nodes: 2")  # the two places
    (project / "ddp.yaml").write_text(edited)
    merge = ["-m", "com_lightning", *options(project), f"--config={project / 'ddp.yaml'}", "--trainer.accelerator=cpu"]
    processes = []
    for rank in range(2):
        if kind == "torchrun":
            launcher = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}", "--master_addr=127.0.0.1"]
            command = ["-m", "torch.distributed.run", *launcher, f"--master_port={port}", *merge]
            known = environment(project, **more)
        else:
            command = merge
            known = environment(
                project,
                SLURM_JOB_ID=1,
                SLURM_JOB_NAME="merge",
                SLURM_NTASKS=2,
                SLURM_NTASKS_PER_NODE=1,
                SLURM_NNODES=2,
                SLURM_NODELIST="127.0.0.1",
                SLURM_PROCID=rank,
                SLURM_LOCALID=0,
                SLURM_NODEID=rank,
                MASTER_PORT=port,
                **more,
            )
        processes.append(start(started, [sys.executable, *command], project / f"host{rank}", known))
    return processes, [process.communicate(timeout=300)[0] for process in processes]


@pytest.mark.parametrize("kind", ["torchrun", "slurm"])
def test_two_machines_without_a_common_folder_merge_as_one(
    kind: str, project: Path, started: list[subprocess.Popen[str]]
) -> None:
    both, told = hosts(kind, project, started)
    assert [process.returncode for process in both] == [0, 0], told
    one = start(started, [sys.executable, "-m", "com_lightning", *options(project)], project, environment(project))
    alone = one.communicate(timeout=300)[0]
    assert one.returncode == 0, alone
    assert sorted(path.name for path in (project / "host0").iterdir()) == ["merged"]
    assert not list((project / "host1").iterdir())  # only the first writes
    assert (project / "marks" / "prepared0").exists()
    assert (project / "marks" / "prepared1").exists()  # each machine prepares its own data
    ours, theirs = (load_file(folder / "merged" / "merged.safetensors") for folder in (project / "host0", project))
    assert ours.keys() == theirs.keys()
    assert all(relative(ours[name], value) < 1e-6 for name, value in theirs.items())
    files = [folder / "merged" / "report.json" for folder in (project / "host0", project)]
    ours, theirs = (json.loads(path.read_text()) for path in files)
    for model in ("expert", "average", "merged"):
        for task in "ab":
            assert ours["metrics"][model][task] == pytest.approx(theirs["metrics"][model][task], rel=1e-9)
            assert ours["metrics"][model][task]["val_acc"] == theirs["metrics"][model][task]["val_acc"]
    assert "| mean |" in told[0]
    assert "| mean |" not in told[1]


@pytest.mark.parametrize("kind", ["torchrun", "slurm"])
def test_what_one_machine_lacks_ends_both(kind: str, project: Path, started: list[subprocess.Popen[str]]) -> None:
    """It is found out before the merge, and before the processes would have met."""
    both, told = hosts(kind, project, started, LACKS="1")
    assert all(process.returncode for process in both)
    assert "process 1 of 2 failed: FileNotFoundError: points.csv" in told[0]
    assert "FileNotFoundError: points.csv" in told[1]
    assert not list((project / "host0").iterdir())


def test_what_one_of_the_processes_on_a_machine_lacks_ends_all(
    project: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Lightning ends the first process, which waits for the other to join, without a word: the other has told."""
    parent = start(started, two_processes(project), project, environment(project, LACKS=1))
    out = parent.communicate(timeout=180)[0]
    assert parent.returncode
    assert "FileNotFoundError: points.csv" in out
    assert not running(project)


def two_processes(project: Path) -> list[str]:
    """The command for two processes, which Lightning starts."""
    several = ["--trainer.strategy=ddp", "--trainer.devices=2"]
    return [sys.executable, "-m", "com_lightning", *options(project, *several)]


def running(project: Path) -> list[int]:
    """Processes of this test, by their environment."""
    found = []
    mark = f"MARKS={project / 'marks'}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="asks Linux which processes run")
def test_a_process_does_not_wait_for_the_one_that_started_it(
    project: Path, started: list[subprocess.Popen[str]]
) -> None:
    """That one is killed before the processes have met: the other would knock for half an hour."""
    parent = start(started, two_processes(project), project, environment(project))
    limit = time.time() + 180
    while len(running(project)) < 2:
        assert time.time() < limit
        time.sleep(0.02)
    parent.kill()
    at = time.time()
    while running(project) and time.time() < at + 60:
        time.sleep(0.05)
    out = parent.communicate(timeout=60)[0]
    print(f"parent killed while the other starts: all ended after {time.time() - at:.1f} s\n{out[-1500:]}")
    assert not running(project)


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="asks Linux which processes run")
@pytest.mark.parametrize(
    ("waits", "killed", "sign"),
    [
        (0, "child", signal.SIGKILL),
        (1, "child", signal.SIGKILL),
        (0, "parent", signal.SIGKILL),
        (1, "parent", signal.SIGKILL),
        (1, "all", signal.SIGINT),
    ],
)
def test_nothing_is_left_running(
    waits: int, killed: str, sign: signal.Signals, project: Path, started: list[subprocess.Popen[str]]
) -> None:
    """Of two processes that Lightning starts, one is in a forward and the other waits for it, or for a layer."""
    parent = start(started, two_processes(project), project, environment(project, WAITS=waits))
    marks = [project / "marks" / str(rank) for rank in range(2)]
    limit = time.time() + 180
    while not all(mark.exists() and mark.read_text() for mark in marks):
        assert time.time() < limit, "the processes did not get to their forwards"
        assert parent.poll() is None, parent.communicate()[0]
        time.sleep(0.1)
    time.sleep(0.5)
    pids = [int(mark.read_text()) for mark in marks]
    assert pids[0] == parent.pid
    at = time.time()
    if killed == "all":  # as Ctrl-C in a terminal
        os.killpg(parent.pid, sign)
    else:
        os.kill(pids[killed == "child"], sign)
    while running(project) and time.time() < at + 60:  # half an hour without us; FAILURE_TIMEOUT at most with us
        time.sleep(0.05)
    assert not running(project)
    out = parent.communicate(timeout=60)[0]
    print(f"{killed} gets {sign.name}, process {waits} in a forward:\n{out[-1500:]}")
    assert parent.returncode
    assert "terminate called" not in out
    assert not (project / "merged").exists()
