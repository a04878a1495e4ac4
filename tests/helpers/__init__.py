"""What most tests use; each topic has a module of its own here. Helpers hold no tests, and no test imports another."""

from tests.helpers.classifier import (
    FEATURES,
    Classifier,
    PointsData,
    SavedPointsData,
    built,
    make_data,
    make_experts,
    perturb,
)
from tests.helpers.numbers import NAMES_OF_5, relative
from tests.helpers.running import free_port, quiet_trainer, run_apart

__all__ = [
    "FEATURES",
    "NAMES_OF_5",
    "Classifier",
    "PointsData",
    "SavedPointsData",
    "built",
    "free_port",
    "make_data",
    "make_experts",
    "perturb",
    "quiet_trainer",
    "relative",
    "run_apart",
]
