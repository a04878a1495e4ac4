"""Trainers that say nothing, ports, and tests in an interpreter of their own."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

ROOT = Path(__file__).parents[2]


def quiet_trainer(**kwargs: Any) -> Trainer:
    """A trainer that says and writes nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**defaults, **kwargs})


def save_lightning(module: LightningModule, path: Path) -> Path:
    """What a ``ModelCheckpoint`` writes."""
    trainer = quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def free_port() -> int:
    """A port that nobody listens at, and that the system will not hand out for a connection of its own meanwhile."""
    for port in random.SystemRandom().sample(range(10_000, 30_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def run_apart(tests: str, timeout: float) -> None:
    """Run a file of tests that fork processes in an interpreter that has started no threads."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", tests]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
