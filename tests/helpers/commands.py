"""Arguments of the command line."""

from __future__ import annotations

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
