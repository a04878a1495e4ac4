"""Packages that come with an extra of the installation, and what is said where one is missing."""

from __future__ import annotations

from importlib import import_module

from com_lightning.errors import MergeError

EXTRAS = {"matplotlib": "plots", "transformers": "text", "huggingface_hub": "text", "peft": "lora", "regex": "lora"}
"""Package -> the extra that brings it. All of them are imported where they are used, after a check."""


def missing(package: str, what: str) -> str:
    """Say how to install a package, if it is missing or broken.

    Args:
        package: one of :data:`EXTRAS`.
        what: needs it, in the plural.

    Returns:
        One sentence, or nothing if the package can be imported.
    """
    try:
        import_module(package)
    except ImportError as error:
        broken = "" if isinstance(error, ModuleNotFoundError) and error.name == package else f" ({error})"
        return f'{what} need {package}: pip install "com_lightning[{EXTRAS[package]}]"{broken}'
    return ""


def check_installed(package: str, what: str) -> None:
    """Make sure that a package is installed.

    Args:
        package: one of :data:`EXTRAS`.
        what: needs it, in the plural.

    Raises:
        MergeError: if it is not, with how to install it.
    """
    if problem := missing(package, what):
        raise MergeError([problem])
