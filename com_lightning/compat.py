"""What differs between the versions and packages of Lightning, and between versions of this library itself."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Callable, Container, Mapping
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from lightning.pytorch import LightningModule

Module = TypeVar("Module", bound=LightningModule)
Function = TypeVar("Function", bound=Callable[..., Any])

LOADS_SAFELY = "weights_only" in signature(LightningModule.load_from_checkpoint).parameters  # Lightning 2.6


class Renamed(NamedTuple):
    """The new name of an option, and how an old value becomes a new one."""

    new: str
    convert: Callable[[Any], Any] = lambda value: value


RENAMED_OPTIONS: dict[str, Renamed] = {
    "metric": Renamed("monitor"),
    "no_resume": Renamed("resume", lambda value: not value),
    "experts_device": Renamed("offload", lambda value: "experts" if value == "cpu" else None),
    "offload_experts": Renamed("offload", lambda value: "experts" if value else None),
    "grow_vocabulary": Renamed("resize_embeddings"),
    "samples": Renamed("num_samples"),
    "source": Renamed("split"),
    "refit_private": Renamed("refit_heads"),
    "balance": Renamed("balance", lambda value: {"worst": True, "mean": False, None: False}.get(value, value)),
}
"""Old name -> its successor. Old names work until version 0.3."""


def with_new_names(options: Mapping[str, Any], known: Container[str], stacklevel: int = 2) -> dict[str, Any]:
    """Give old options their new names and values, and warn of each.

    Args:
        options: name -> value.
        known: the names that are taken today. An old name that is among them means something else, and stays.
        stacklevel: of the warning, seen from the caller.

    Returns:
        New name -> new value.

    Raises:
        TypeError: if an option is given under both names.
    """
    result: dict[str, Any] = {}
    for name, value in options.items():
        renamed = RENAMED_OPTIONS.get(name, Renamed(name))
        if renamed.new not in known or (name != renamed.new and name in known):
            renamed = Renamed(name)
        new, converted = renamed.new, renamed.convert(value)
        if (name, value) != (new, converted):
            if name != new and new in options:
                raise TypeError(f"{name} is the old name of {new}; give only one of them")
            message = f"the option {name}={value!r} is now {new}={converted!r}; the old one will stop working"
            warnings.warn(message, FutureWarning, stacklevel=stacklevel + 1)
        result[new] = converted
    return result


def renamed_options(function: Function) -> Function:
    """Return a function or an ``__init__`` that also takes old names of its options, see :data:`RENAMED_OPTIONS`.

    Example::

        >>> @renamed_options
        ... def merge(monitor=None, resume=True):
        ...     return monitor, resume
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     merge(metric="val_acc", no_resume=True)
        ('val_acc', False)
    """
    known = signature(function).parameters

    @functools.wraps(function)
    def renamed(*args: Any, **options: Any) -> Any:
        return function(*args, **with_new_names(options, known, stacklevel=2))

    return renamed  # type: ignore[return-value]


def of_other_package(label: str, thing: object) -> list[str]:
    """Find out whether an object is of the package ``pytorch_lightning``, whose classes are not those of ``lightning``.

    A module of one package cannot be run by a trainer of the other.

    Args:
        label: what messages call the object.
        thing: a module, datamodule or trainer.

    Returns:
        One sentence if it is, which says what to change; nothing otherwise.
    """
    classes = [kind for kind in type(thing).__mro__ if kind.__module__.partition(".")[0] == "pytorch_lightning"]
    if not classes:
        return []
    return [
        f"{label}: {type(thing).__name__} is a pytorch_lightning.{classes[0].__name__}, which com_lightning and the "
        "package lightning do not know. Both packages have the same code, so in your project write\n"
        "       import lightning.pytorch as pl        instead of  import pytorch_lightning as pl\n"
        "       from lightning.pytorch... import ...  instead of  from pytorch_lightning... import ...\n"
        "     Checkpoints stay as they are."
    ]


def load_module(
    module_class: type[Module], content: Mapping[str, Any], path: Path | None = None, strict: bool | None = None
) -> Module:
    """Call ``module_class.load_from_checkpoint`` so that nothing is unpickled, in any version of Lightning.

    Args:
        module_class: of the module.
        content: of the checkpoint, as safe loading has read it.
        path: of the checkpoint. Weights are read from it where that is safe; otherwise from ``content``.
        strict: as for ``load_from_checkpoint``.

    Returns:
        The loaded module.
    """
    if LOADS_SAFELY and path is not None:
        return module_class.load_from_checkpoint(path, map_location="cpu", weights_only=True, strict=strict)
    file = io.BytesIO()
    torch.save(dict(content), file)
    file.seek(0)
    options: dict[str, Any] = {"weights_only": True} if LOADS_SAFELY else {}
    return module_class.load_from_checkpoint(file, map_location="cpu", strict=strict, **options)
