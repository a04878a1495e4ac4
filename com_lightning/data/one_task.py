"""The data of one task of a merge, as Lightning validates a model on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden

if TYPE_CHECKING:
    from com_lightning.data.datamodule import MergeDataModule

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class OneTask(LightningDataModule):
    """One task of a :class:`MergeDataModule`, with the transfer hooks that the task's own datamodule overrides."""

    def __init__(self, tasks: MergeDataModule, name: str) -> None:
        super().__init__()
        self._tasks, self._name = tasks, name
        lend_hooks(tasks.tasks[name], self)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the task's own datamodule, which modules read as ``self.trainer.datamodule``."""
        if name.startswith("_") or "_name" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self._tasks.tasks[self._name], name)

    def setup(self, stage: str) -> None:
        self._tasks.trainer = self._tasks.trainer or self.trainer
        self._tasks.setup(stage)

    def val_dataloader(self) -> Any:
        return self._tasks.validation_loaders(self._name)

    def test_dataloader(self) -> Any:
        return self._tasks.given(self._name, "test")


class UnpreparedTask(OneTask):
    """One task, whose data Lightning prepares."""

    def prepare_data(self) -> None:
        self._tasks.trainer = self._tasks.trainer or self.trainer
        self._tasks.prepare_data()


def lend_hooks(lender: LightningDataModule, borrower: LightningDataModule) -> None:
    """Give a datamodule the transfer hooks that another one overrides."""
    for hook in TRANSFER_HOOKS:
        # Only hooks that are overridden: for the others Lightning uses those of the module.
        if is_overridden(hook, lender):
            setattr(borrower, hook, getattr(lender, hook))
