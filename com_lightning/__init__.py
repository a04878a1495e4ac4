"""Merge fine-tuned checkpoints into one model with PyTorch Lightning, by Chain of Merges (arXiv 2508.21421)."""

from com_lightning.callback import ChainOfMergesCallback
from com_lightning.cli import MergeCLI
from com_lightning.datamodule import MergeDataModule, TaskLoaders
from com_lightning.experts import MergeError
from com_lightning.methods import Average, ChainOfMerges, MergingMethod, RegMean
from com_lightning.report import MergeReport
from com_lightning.trainer import MergeTrainer

__all__ = [
    "Average",
    "ChainOfMerges",
    "ChainOfMergesCallback",
    "MergeCLI",
    "MergeDataModule",
    "MergeError",
    "MergeReport",
    "MergeTrainer",
    "MergingMethod",
    "RegMean",
    "TaskLoaders",
]
__version__ = "0.1.0"
