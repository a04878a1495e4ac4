"""Datamodules that a stock LightningCLI has made inside of another one, with hyperparameters that are not theirs."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import Context
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule


def with_own_hyperparameters(
    tasks: Mapping[str, LightningDataModule], owner: type[LightningDataModule]
) -> dict[str, LightningDataModule]:
    """Make those datamodules anew whose ``save_hyperparameters`` has saved the owner's arguments instead of their own.

    LightningCLI gives the arguments of ``data`` to all datamodules that it makes for it. Those of the tasks are among
    them. The new ones save what they are given, as outside of LightningCLI.

    Args:
        tasks: task -> its datamodule.
        owner: class of the datamodule that holds them.

    Returns:
        Task -> its datamodule. Those with their own hyperparameters, or with none, are the same objects.

    Raises:
        TypeError: if the arguments of a task's datamodule are not among those of the owner.
    """
    result = dict(tasks)
    for name, data in tasks.items():
        saved: Any = getattr(data, "hparams", {})
        if saved.get("_class_path", "").rpartition(".")[2] != owner.__name__ or isinstance(data, owner):
            continue
        arguments = (saved.get("tasks") or {}).get(name)
        if not isinstance(arguments, Mapping) or "class_path" not in arguments:
            raise TypeError(
                f"task '{name}': LightningCLI gave its datamodule the hyperparameters of {owner.__name__} in place of "
                "its own; use com_lightning.MergeCLI, which does not"
            )
        # In a context of its own, in which LightningCLI has given nothing.
        result[name] = Context().run(_make, dict(arguments))
    return result


def _make(arguments: dict[str, Any]) -> LightningDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data", fail_untyped=False)
    made: LightningDataModule = parser.instantiate_classes(parser.parse_object({"data": arguments})).data
    return made
