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
    """Checkpoints of two experts and of their base."""
    for task, expert in zip("ab", make_experts()):
        save_lightning(expert, folder / f"{task}.ckpt")
    torch.manual_seed(0)  # what make_experts starts from
    torch.save(Classifier().state_dict(), folder / "base.pt")
    return [*[f"--experts.{task}={folder / task}.ckpt" for task in "ab"], f"--base={folder / 'base.pt'}"]
