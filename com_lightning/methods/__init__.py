"""Merging rules, one class each, all with one interface."""

from com_lightning.methods.averaging import Average
from com_lightning.methods.base import MergeJob, MergingMethod
from com_lightning.methods.chain import ChainOfMerges, RegMean

__all__ = ["Average", "ChainOfMerges", "MergeJob", "MergingMethod", "RegMean"]
