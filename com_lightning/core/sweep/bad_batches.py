"""Batches with NaN or infinity. They raise an error, or are skipped from the layer on at which they are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.layer import forward_id
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.task import BatchId, NonFiniteError, SkippedBatch, Task

_HINT = "on_bad_batch='skip' skips such batches"


@dataclass(frozen=True)
class BadBatch:
    """A batch whose inputs of a layer are not finite.

    Attributes:
        id: the batch.
        label: names task, batch and model.
        why: what is wrong with the inputs. It continues "the inputs of layer ...".
    """

    id: BatchId
    label: str
    why: str


class BatchSkipped(BaseException):
    """Ends a calibration forward whose batch was skipped. An ``except Exception`` in the model does not catch it."""


class BadBatches:
    """The bad batches of a sweep. If they are skipped, the other processes skip theirs at the same layer.

    Args:
        tasks: the experts and their calibration data.
        context: how the sweep is carried out.

    Attributes:
        skipped: the batches of this process that were skipped so far.
    """

    def __init__(self, tasks: Sequence[Task], context: Context) -> None:
        self.tasks, self.context = tasks, context
        self.skipped: set[BatchId] = set()

    @property
    def is_skipping(self) -> bool:
        """Whether bad batches are skipped. Otherwise they raise an error."""
        return self.context.on_bad_batch == "skip"

    def good(self, calls: Sequence[PausedCall]) -> list[PausedCall]:
        """The calls whose batch was not skipped."""
        return [call for call in calls if forward_id(call).batch not in self.skipped]

    def skip(self, bad: Sequence[BadBatch], layer: str) -> list[SkippedBatch]:
        """Skip the bad batches of a layer. All processes must call this, also those without bad batches.

        Args:
            bad: the bad batches of this process.
            layer: the layer at which they were found.

        Returns:
            The bad batches of all processes.

        Raises:
            NonFiniteError: if bad batches are not skipped, or if a task loses its last batch.
        """
        if not self.is_skipping:
            for batch in bad[:1]:
                raise NonFiniteError(f"the inputs of layer '{layer}' {batch.why}: {batch.label}; {_HINT}")
            return []
        self.skipped |= {batch.id for batch in bad}
        found = [SkippedBatch(self.tasks[batch.id.task].name, batch.id.number, layer, batch.why) for batch in bad]
        num_skipped = Counter(batch.task for batch in self.skipped)
        num_left = [len(task.batches) - num_skipped[number] for number, task in enumerate(self.tasks)]
        everyone = self.context.peers.exchange((found, num_left))
        skipped = sorted((entry for theirs, _ in everyone for entry in theirs), key=lambda e: (e.task, e.batch))
        self.context.skipped += skipped
        for number, task in enumerate(self.tasks):
            of_task = [entry for entry in skipped if entry.task == task.name]
            if of_task and not sum(counts[number] for _, counts in everyone):
                raise NonFiniteError(
                    f"task '{task.name}': none of its calibration batches is left. All were skipped, the last one at "
                    f"layer '{layer}', whose inputs {of_task[-1].why}. Check the data and the expert of this task, or "
                    "leave the task out of the merge"
                )
        return skipped

    def skip_again(self, skipped: Sequence[SkippedBatch]) -> set[BatchId]:
        """Skip the batches that an earlier run skipped at a layer. Returns those of this process."""
        self.context.skipped += skipped
        names = {(entry.task, entry.batch) for entry in skipped}
        again = {
            BatchId(number, position, batch)
            for number, task in enumerate(self.tasks)
            for position, batch in enumerate(task.batch_numbers)
            if (task.name, batch) in names
        }
        self.skipped |= again
        return again

    def run(self, batch: BatchId, call: Callable[[], object]) -> None:
        """Run a forward. If its batch is skipped, it ends early and without an error."""
        try:
            call()
        except BatchSkipped:
            pass
        except Exception:  # a model may raise anything when it is given NaN
            if batch not in self.skipped:
                raise

    def check(self, batch: BatchId) -> None:
        """End the running forward if its batch was skipped."""
        if batch in self.skipped:
            raise BatchSkipped
