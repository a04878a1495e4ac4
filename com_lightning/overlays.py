"""Configurations that come with the package, and are found by name from any folder: ``--config accurate``.

They are the files in ``configs`` at the top of the repository, to which ``com_lightning/configs`` is a link. A wheel
holds copies of them.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from com_lightning.errors import MergeError

FOLDER = Path(__file__).parent / "configs"
_NAME = re.compile(r"[^\s{}\[\]:,]+")
"""What may be a name or a path. Configurations can be given as YAML, too."""


def overlays() -> dict[str, str]:
    """Name of each configuration -> what it chooses: the first sentence of its comment."""
    result = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        lines = itertools.takewhile(lambda line: re.match("# \\S", line), path.read_text("utf-8").splitlines())
        result[path.stem] = " ".join(line[2:] for line in lines).partition(". ")[0].rstrip(".")
    return result


def config_path(given: str) -> str:
    """Find a configuration. A file that exists comes before a name.

    Args:
        given: a path, the name of a configuration, or YAML.

    Returns:
        The path. YAML, addresses and what is no path at all are returned as they are.

    Raises:
        MergeError: for a path that does not exist and is no name, with the names that there are.
    """
    path = Path(given)
    # Unlike pathlib's, these functions take any text: a name may be too long for a file.
    if not _NAME.fullmatch(given) or "\0" in given or (os.path.exists(given) and not os.path.isdir(given)):
        return given
    if named := _named(given):
        return str(named)
    is_folder = os.path.isdir(given)
    problem = f"{given} is a folder, not a file" if is_folder else f"there is no file {given}"
    names = list(overlays())
    if nearest := difflib.get_close_matches(path.stem, names, 1):
        problem += f"; did you mean the configuration {nearest[0]!r}?"
    elif path.name == given or is_folder:
        problem += f"; configurations with a name are {', '.join(names)}"
    raise MergeError([f"config: {problem}"])


def with_config_paths(args: Sequence[str]) -> list[str]:
    """Arguments, with a path in place of each name of a configuration.

    Args:
        args: of the command line.

    Returns:
        The same number of arguments.

    Raises:
        MergeError: for a name that there is not, see :func:`config_path`.
    """
    return [f"{option}{config_path(value)}" if is_config else value for is_config, option, value in _split(args)]


def given_configs(args: Sequence[str]) -> list[Path]:
    """The files of the configurations that arguments give; they need not exist."""
    given = [value for is_config, _, value in _split(args) if is_config]
    return [Path(value) if os.path.isfile(value) else _named(value) or Path(value) for value in given]


def _named(given: str) -> Path | None:
    """The file of a configuration by its name, with or without its ending."""
    return next((path for path in FOLDER.glob("*.yaml") if given in (path.name, path.stem)), None)


def _split(args: Sequence[str]) -> Iterator[tuple[bool, str, str]]:
    """For each argument, whether it gives a configuration, ``--config=`` where it begins so, and the rest of it."""
    for before, arg in zip(["", *args], map(str, args)):
        option = "--config=" if arg.startswith("--config=") else ""
        yield bool(option) or before in ("--config", "-c"), option, arg.removeprefix(option)
