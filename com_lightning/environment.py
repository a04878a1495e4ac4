"""What a merge ran on: peak memory, and versions of packages."""

from __future__ import annotations

import sys
from importlib import metadata

import torch


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: of the process on a CPU, else what was allocated on the device."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def package_versions() -> dict[str, str]:
    """Name -> version of Python and of the packages that a result depends on, if they are installed."""
    found = {"python": sys.version.split()[0]}
    for package in ("com_lightning", "torch", "lightning", "torchmetrics", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
