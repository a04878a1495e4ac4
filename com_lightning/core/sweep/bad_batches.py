"""Batches that hold NaN or infinity: named, or left out from the layer on where that was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.lockstep import Arrival
from com_lightning.core.sweep.task import NonFiniteError, SkippedBatch, Task

_HINT = "on_bad_batch='skip' leaves such batches out"


@dataclass(frozen=True)
class BadBatch:
    """A batch whose rows at a layer cannot be counted.

    Attributes:
        task, batch: their positions in this process.
        label: names task, batch and model.
        why: what is wrong with the inputs, after "the inputs of layer ...".
    """

    task: int
    batch: int
    label: str
    why: str


class LeftOut(BaseException):
    """Ends a calibration forward whose batch has been left out; not to be caught by an ``except Exception``."""


class BadBatches:
    """What becomes of bad batches in a chain, in step with other processes."""

    def __init__(self, tasks: Sequence[Task], run: Run) -> None:
        self.tasks, self.run = tasks, run
        self.places: set[tuple[int, int]] = set()
        """Task and batch of each that has been left out in this process."""

    @property
    def skip(self) -> bool:
        """Whether they are left out, rather than an error."""
        return self.run.on_bad_batch == "skip"

    def good(self, arrivals: Sequence[Arrival]) -> list[Arrival]:
        """Those whose batch has not been left out."""
        return [a for a in arrivals if (a.forward.task, a.forward.batch) not in self.places]  # type: ignore[attr-defined]

    def leave_out(self, bad: Sequence[BadBatch], layer: str) -> list[SkippedBatch]:
        """Leave out what was found at a layer, and return it. All processes meet here, whatever they have found.

        Raises:
            NonFiniteError: if they are not to be left out, or if nothing is left of a task.
        """
        if not self.skip:
            for batch in bad[:1]:
                raise NonFiniteError(f"the inputs of layer '{layer}' {batch.why}: {batch.label}; {_HINT}")
            return []
        self.places |= {(batch.task, batch.batch) for batch in bad}
        mine = []
        for batch in bad:
            task = self.tasks[batch.task]
            number = task.batch_numbers[batch.batch]
            mine.append(SkippedBatch(task.name, number, layer, batch.why))
        lost = Counter(task for task, _ in self.places)
        left = [len(task.batches) - lost[number] for number, task in enumerate(self.tasks)]
        found = self.run.peers.exchange((mine, left))
        skipped = sorted((entry for part, _ in found for entry in part), key=lambda e: (e.task, e.batch))
        self.run.skipped += skipped
        for number, task in enumerate(self.tasks):
            if not sum(counts[number] for _, counts in found) and any(e.task == task.name for e in skipped):
                last = next(e for e in reversed(skipped) if e.task == task.name)
                raise NonFiniteError(
                    f"task '{task.name}': none of its calibration batches is left. All had to be skipped, the last at "
                    f"layer '{layer}', whose inputs {last.why}. Look at the data of this task and at its expert, or "
                    "leave the task out of the merge"
                )
        return skipped

    def recall(self, skipped: Sequence[SkippedBatch]) -> set[tuple[int, int]]:
        """Leave out what was left out at a layer in an earlier run, and return task and batch of what is here of it."""
        self.run.skipped += skipped
        names, lost = {(entry.task, entry.batch) for entry in skipped}, set()
        for number, task in enumerate(self.tasks):
            lost |= {(number, n) for n, batch in enumerate(task.batch_numbers) if (task.name, batch) in names}
        self.places |= lost
        return lost

    def ending(self, task: int, batch: int, run: Callable[[], object]) -> None:
        """Run a forward that ends early, without an error, once its batch has been left out."""
        try:
            run()
        except LeftOut:
            pass
        except Exception:  # what a model raises when it is given NaN is nobody's concern any more
            if (task, batch) not in self.places:
                raise

    def check(self, task: int, batch: int) -> None:
        """Called where a forward goes on: end it if its batch has been left out."""
        if (task, batch) in self.places:
            raise LeftOut
