"""Processes that are killed before they have joined the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import free_port
from tests.helpers.running import ROOT

_ALONE = """
from datetime import timedelta
from lightning.pytorch.strategies import DDPStrategy
from com_lightning import MergeDataModule, merge, strategies
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer

strategies.WAITING = 0.1
data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
strategy = DDPStrategy(timeout=timedelta(seconds=2), process_group_backend="gloo")
trainer = quiet_trainer(devices=2, strategy=strategy)
merge(Classifier(3), dict(zip("ab", make_experts((3, 3)))), data, trainer=trainer, output_dir="never")
"""

_PARENT = """
import subprocess, sys, os, time
from com_lightning import ChainOfMergesCallback
ChainOfMergesCallback({})
command = "import time, os; from com_lightning import ChainOfMergesCallback as C; C({}); print(os.getpid(), flush=True)"
child = subprocess.Popen([sys.executable, "-c", command + "; time.sleep(600)"], env={**os.environ, "LOCAL_RANK": "1"})
time.sleep(600)
"""


def test_a_process_that_is_left_alone_says_so_and_ends(tmp_path: Path) -> None:
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "TORCHELASTIC_RUN_ID": "1"}
    environment = {**os.environ, **names, **torchrun, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _ALONE], cwd=tmp_path, env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "com_lightning: process 0 of 2 waits for the others to start" in done.stderr
    assert "PeerError: process 0 of 2 could not join the others: one was not started, was killed" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot tie a process to its parent")
def test_a_process_that_lightning_started_ends_with_its_parent() -> None:
    """Also if the merge is a callback of a plain trainer, which starts its processes by itself."""
    environment = {name: value for name, value in os.environ.items() if name != "LOCAL_RANK"}
    environment["PYTHONPATH"] = str(ROOT)
    parent = subprocess.Popen([sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    end = time.monotonic() + 30
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, "the child outlives its parent"
        time.sleep(0.05)
