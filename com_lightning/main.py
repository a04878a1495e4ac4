"""Where the command line starts: help and version at once, all else by :mod:`com_lightning.cli`."""

from __future__ import annotations

import sys

from com_lightning import __version__
from com_lightning.answers import answer


def main() -> None:
    """Run ``com-lightning`` with the arguments of the process."""
    args = sys.argv[1:]
    if (text := answer(args, __version__)) is not None:
        print(text, end="")
        sys.exit(0 if args else 2)
    from com_lightning import cli  # with PyTorch and Lightning

    cli.main()
