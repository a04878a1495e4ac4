"""Validates each fine-tuned model on its task.

python -m examples.existing_project.validate
"""

from lightning import Trainer

from .data import TASKS, DigitsData
from .model import DigitClassifier
from .train import FOLDER

if __name__ == "__main__":
    for task in TASKS:
        model = DigitClassifier.load_from_checkpoint(f"{FOLDER}/{task}.ckpt")
        Trainer(logger=False).validate(model, datamodule=DigitsData(task))
