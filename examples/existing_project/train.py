"""Trains a base on MNIST, then fine-tunes it on each task.

python -m examples.existing_project.train
"""

from lightning import Trainer, seed_everything

from .data import TASKS, DigitsData
from .model import DigitClassifier

FOLDER = "outputs/existing_project"


def fit(task: str, base: str | None = None) -> None:
    """Train on a task, from scratch or from a checkpoint, and write `<task>.ckpt`."""
    model = DigitClassifier.load_from_checkpoint(base, learning_rate=1e-3) if base else DigitClassifier()
    trainer = Trainer(max_epochs=2, limit_val_batches=0, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=DigitsData(task))
    trainer.save_checkpoint(f"{FOLDER}/{task}.ckpt", weights_only=True)


if __name__ == "__main__":
    seed_everything(0)
    fit("mnist")
    for task in TASKS:
        fit(task, base=f"{FOLDER}/mnist.ckpt")
