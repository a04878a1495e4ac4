"""Arguments of the command line."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.classifier import Classifier, make_experts
from tests.helpers.running import save_lightning

MODEL = ["--model=tests.helpers.Classifier"]
DATA = [
    "--data=com_lightning.MergeDataModule",
    "--data.num_samples=40",
    "--data.tasks.a=tests.helpers.PointsData",
    "--data.tasks.b=tests.helpers.PointsData",
    "--data.tasks.b.seed=1",
    "--data.tasks.b.classes=4",
]
QUIET = ["--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]


def expert_files(folder: Path) -> list[str]:
    """Options that name checkpoints of two experts."""
    files = [save_lightning(expert, folder / f"{task}.ckpt") for task, expert in zip("ab", make_experts())]
    return [f"--experts.{task}={file}" for task, file in zip("ab", files)]


def base_file(folder: Path) -> str:
    """The option that names what these experts were made from."""
    torch.manual_seed(0)
    return f"--base={save_lightning(Classifier(), folder / 'base.ckpt')}"
