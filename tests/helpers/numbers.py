"""How far two tensors are apart."""

from __future__ import annotations

from importlib import metadata

from torch import Tensor

NAMES_OF_5 = int(metadata.version("transformers").split(".")[0]) >= 5
"""Whether layers of a ViT have the names that transformers 5 gave them."""


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().amax() / expected.abs().amax().clamp_min(1e-30))
