"""What the command line answers at once, without importing PyTorch or Lightning."""

from __future__ import annotations

from collections.abc import Sequence

from com_lightning.completion import completion
from com_lightning.help import configurations, help_of, overview


def answer(args: Sequence[str], version: str) -> str | None:
    """What is answered at once: help, version and names. ``None``: these arguments ask for something else."""
    if list(args) in ([], ["--help"], ["-h"]):
        return overview()
    if list(args) == ["--version"]:
        return f"com_lightning {version}\n"
    if args[0] in ("merge", "compare") and list(args[1:]) in (["--help"], ["-h"]):
        return help_of(args[0])
    if args[0] == "configs":
        return configurations()
    if args[0] == "completion":
        return completion()
    return None
