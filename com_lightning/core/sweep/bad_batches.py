"""Batches that hold NaN or infinity: an error that names them, or left out from the layer on where they are met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.layer import forward_id
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.task import BatchId, NonFiniteError, SkippedBatch, Task

_HINT = "on_bad_batch='skip' leaves such batches out"


@dataclass(frozen=True)
class BadBatch:
    """A batch whose rows at a layer cannot be counted.

    Attributes:
        id: which batch.
        label: names task, batch and model.
        why: what is wrong with the inputs; continues "the inputs of layer ...".
    """

    id: BatchId
    label: str
    why: str


class BatchSkipped(BaseException):
    """Ends a calibration forward whose batch was left out. An ``except Exception`` of the model does not catch it."""


class BadBatches:
    """Leaves bad batches out of a sweep, in step with other processes.

    Attributes:
        left_out: the batches of this process that were left out so far.
    """

    def __init__(self, tasks: Sequence[Task], context: Run) -> None:
        self.tasks, self.context = tasks, context
        self.skipped: set[BatchId] = set()

    @property
    def is_skipping(self) -> bool:
        """Whether they are left out rather than an error."""
        return self.context.on_bad_batch == "skip"

    def good(self, calls: Sequence[PausedCall]) -> list[PausedCall]:
        """The arrivals whose batch was not left out."""
        return [call for call in calls if forward_id(call).batch not in self.skipped]

    def skip(self, bad: Sequence[BadBatch], layer: str) -> list[SkippedBatch]:
        """Leave out the bad batches of a layer. All processes meet here, also those without any.

        Returns:
            The bad batches of all processes.

        Raises:
            NonFiniteError: if they are not to be left out, or if a task loses its last batch.
        """
        if not self.is_skipping:
            for batch in bad[:1]:
                raise NonFiniteError(f"the inputs of layer '{layer}' {batch.why}: {batch.label}; {_HINT}")
            return []
        self.skipped |= {batch.id for batch in bad}
        mine = [SkippedBatch(self.tasks[batch.id.task].name, batch.id.number, layer, batch.why) for batch in bad]
        lost = Counter(batch.task for batch in self.skipped)
        left = [len(task.batches) - lost[number] for number, task in enumerate(self.tasks)]
        everyone = self.context.peers.exchange((mine, left))
        skipped = sorted((entry for theirs, _ in everyone for entry in theirs), key=lambda e: (e.task, e.batch))
        self.context.skipped += skipped
        for number, task in enumerate(self.tasks):
            of_task = [entry for entry in skipped if entry.task == task.name]
            if of_task and not sum(counts[number] for _, counts in everyone):
                raise NonFiniteError(
                    f"task '{task.name}': none of its calibration batches is left. All had to be skipped, the last at "
                    f"layer '{layer}', whose inputs {of_task[-1].why}. Look at the data of this task and at its "
                    "expert, or leave the task out of the merge"
                )
        return skipped

    def skip_again(self, skipped: Sequence[SkippedBatch]) -> set[BatchId]:
        """Leave out again what an earlier run left out at a layer. Returns the batches of this process among them."""
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
        """Run a forward. It ends early, without an error, once its batch was left out."""
        try:
            call()
        except BatchSkipped:
            pass
        except Exception:  # a model may raise anything when it is given NaN
            if batch not in self.skipped:
                raise

    def check(self, batch: BatchId) -> None:
        """End the forward that is running if its batch was left out."""
        if batch in self.skipped:
            raise BatchSkipped
