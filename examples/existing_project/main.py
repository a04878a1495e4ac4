"""The project on Lightning's command line.

python -m examples.existing_project.main validate --data examples.existing_project.data.DigitsData --data.task optical \
    --ckpt_path outputs/existing_project/optical.ckpt
"""

from lightning.pytorch.cli import LightningCLI

from .model import DigitClassifier

if __name__ == "__main__":
    LightningCLI(DigitClassifier)
