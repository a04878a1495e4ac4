"""What a merge ran on: date, command line, peak memory, and versions of packages."""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch


def date() -> str:
    """The time now, in UTC, to the minute."""
    return f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def command_line() -> str | None:
    """The command line of ``com-lightning``; ``None`` in other programs."""
    program = Path(sys.argv[0] if sys.argv else "")
    is_ours = program.stem == "com-lightning" or (program.name == "__main__.py" and program.parent.stem == __package__)
    return shlex.join(["com-lightning", *sys.argv[1:]]) if is_ours else None


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
