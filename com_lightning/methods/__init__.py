"""Merging rules, one class each, all with one interface. A new rule is a new file here, and nothing else."""

from importlib import import_module
from pkgutil import iter_modules

from com_lightning.methods.actmat import TACT, ACTMat
from com_lightning.methods.adamerging import AdaMerging
from com_lightning.methods.averaging import Average
from com_lightning.methods.base import MergeJob, MergingMethod, ParameterRecord
from com_lightning.methods.chain import ChainOfMerges, RegMean, RegMeanPlusPlus
from com_lightning.methods.combined import Combined
from com_lightning.methods.esm import ESM
from com_lightning.methods.featcal import FeatCal
from com_lightning.methods.fisher import Fisher
from com_lightning.methods.larv import LARV
from com_lightning.methods.lot import LOT
from com_lightning.methods.refitted import Refitted
from com_lightning.methods.spectral import TSVM, IsoC, IsoCTS
from com_lightning.methods.spherical import SLERP, KarcherMean
from com_lightning.methods.svc import SVC
from com_lightning.methods.task_adapters import TaskAdapters
from com_lightning.methods.task_vectors import DARE, DELLA, TIES, Breadcrumbs, TaskArithmetic
from com_lightning.methods.wudi import WUDI

__all__ = [
    "ACTMat",
    "AdaMerging",
    "Average",
    "Breadcrumbs",
    "ChainOfMerges",
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
    "MergeJob",
    "MergingMethod",
    "ParameterRecord",
    "RegMean",
    "RegMeanPlusPlus",
    "Refitted",
    "SLERP",
    "TaskAdapters",
    "TaskArithmetic",
    "SVC",
    "TACT",
    "TIES",
    "TSVM",
    "WUDI",
]

# The names above are for type checkers. All files here are imported, so that rules that are not named above are found
# as well: by `com_lightning.<name>`, and by the command line.
for _file in iter_modules(__path__):
    for _name, _class in vars(import_module(f"{__name__}.{_file.name}")).items():
        if isinstance(_class, type) and issubclass(_class, MergingMethod):
            globals()[_name] = _class
