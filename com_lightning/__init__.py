"""Merge fine-tuned checkpoints into one model with PyTorch Lightning, by Chain of Merges (arXiv 2508.21421)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from com_lightning.callback import ChainOfMergesCallback
    from com_lightning.cli import MergeCLI
    from com_lightning.data.datamodule import MergeDataModule, TaskLoaders
    from com_lightning.errors import MergeError
    from com_lightning.execution import MergeResult
    from com_lightning.merging import merge
    from com_lightning.methods import (
        DARE,
        DELLA,
        ESM,
        LARV,
        LOT,
        SLERP,
        SVC,
        TACT,
        TIES,
        TSVM,
        WUDI,
        ACTMat,
        AdaMerging,
        Average,
        Breadcrumbs,
        ChainOfMerges,
        Combined,
        FeatCal,
        Fisher,
        IsoC,
        IsoCTS,
        KarcherMean,
        MergingMethod,
        Refitted,
        RegMean,
        RegMeanPlusPlus,
        TaskAdapters,
        TaskArithmetic,
    )
    from com_lightning.options import MergeOptions
    from com_lightning.results.report import MergeReport
    from com_lightning.trainer import MergeTrainer

__version__ = "0.2.0"
__all__ = [
    "ACTMat",
    "AdaMerging",
    "Average",
    "Breadcrumbs",
    "ChainOfMerges",
    "ChainOfMergesCallback",
    "Combined",
    "DARE",
    "DELLA",
    "ESM",
    "FeatCal",
    "Fisher",
    "IsoC",
    "IsoCTS",
    "KarcherMean",
    "LARV",
    "LOT",
    "MergeCLI",
    "MergeDataModule",
    "MergeError",
    "MergeOptions",
    "MergeReport",
    "MergeResult",
    "MergeTrainer",
    "MergingMethod",
    "RegMean",
    "RegMeanPlusPlus",
    "Refitted",
    "SLERP",
    "SVC",
    "TACT",
    "TaskArithmetic",
    "TaskLoaders",
    "TIES",
    "TaskAdapters",
    "TSVM",
    "WUDI",
    "merge",
]
# Imported when first asked for, so that `com_lightning.core` needs nothing but torch.
_HOMES = {
    "ChainOfMergesCallback": "callback",
    "MergeCLI": "cli",
    "MergeDataModule": "data.datamodule",
    "MergeError": "errors",
    "MergeOptions": "options",
    "MergeReport": "results.report",
    "MergeResult": "execution",
    "MergeTrainer": "trainer",
    "TaskLoaders": "data.datamodule",
    "merge": "merging",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES or name[:1].isupper():  # all other classes are rules
        home = import_module(f"com_lightning.{_HOMES.get(name, 'methods')}")
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"module 'com_lightning' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
