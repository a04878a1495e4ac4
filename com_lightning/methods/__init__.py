"""Merging rules, one class each, all with one interface."""

from com_lightning.methods.adamerging import AdaMerging
from com_lightning.methods.averaging import Average
from com_lightning.methods.base import MergeJob, MergingMethod, ParameterRecord
from com_lightning.methods.chain import ChainOfMerges, RegMean, RegMeanPlusPlus
from com_lightning.methods.combined import Combined
from com_lightning.methods.fisher import Fisher
from com_lightning.methods.lot import LOT
from com_lightning.methods.refitted import Refitted
from com_lightning.methods.spectral import TSVM, IsoC, IsoCTS
from com_lightning.methods.spherical import SLERP, KarcherMean
from com_lightning.methods.task_vectors import DARE, DELLA, TIES, Breadcrumbs, TaskArithmetic
from com_lightning.methods.wudi import WUDI

__all__ = [
    "AdaMerging",
    "Average",
    "Breadcrumbs",
    "ChainOfMerges",
    "Combined",
    "DARE",
    "DELLA",
    "Fisher",
    "IsoC",
    "IsoCTS",
    "KarcherMean",
    "LOT",
    "MergeJob",
    "MergingMethod",
    "ParameterRecord",
    "RegMean",
    "RegMeanPlusPlus",
    "Refitted",
    "SLERP",
    "TaskArithmetic",
    "TIES",
    "TSVM",
    "WUDI",
]
