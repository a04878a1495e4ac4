"""Checks, before a merge, that the calibration forwards are those of the user's module.

Calibration forwards run in lockstep, on copies of the experts. What they compute must be what the module computes by
itself. So for each task, a few samples first run through the expert alone: a *plain forward*. It must not change the
expert's weights, use others, or wait for other processes. Then the samples of all tasks run in lockstep. At its first
call, each layer must get the same inputs as in the plain forward.

Forwards that differ share something that is no copy, such as a global variable, or draw random numbers from a source
that nobody can seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.layer import CalibrationForward
from com_lightning.core.sweep.lockstep import PausedCall
from com_lightning.core.sweep.models import Models
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.plain_forward import Trace, first_difference, plain_forward, record
from com_lightning.core.sweep.sweep import Sweep, Visitor
from com_lightning.core.sweep.task import BatchId, LayerRecord, Task, batch_ids
from com_lightning.core.tensors.state import State
from com_lightning.errors import MergeError

BATCHES = 2
"""Number of batches of the first task that run in the check. Of the others, which run the same class, one is enough."""
_ADVICE = "give the module a calibration_step(batch) that only runs the network"


@dataclass
class ForwardCheck:
    """What a check has found.

    Attributes:
        layers: number of layers whose inputs were compared.
        tasks: names of the tasks that were checked.
        unchecked: name of each other task -> why.
        held: name of each task -> bytes that a paused forward of one sample holds at most.
        warnings: for the report.
    """

    layers: int = 0
    tasks: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    held: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = len(self.tasks) + len(self.unchecked)
        share = f"all {count} tasks" if not self.unchecked else f"{len(self.tasks)} of {count} tasks"
        rest = "".join(f"; not of '{task}', {why}" for task, why in self.unchecked.items())
        return f"compared with plain forwards of {share}, at {self.layers} layers{rest}"


def check_forwards(
    tasks: Sequence[Task],
    merged: Mapping[str, Tensor],
    context: Context,
    shortened: Callable[[Any], Any] = lambda batch: batch,
) -> ForwardCheck:
    """Compare the forwards of a few samples in lockstep with those by themselves.

    Args:
        tasks: the experts and their calibration data.
        merged: full name of each shared parameter or buffer. Values are not read.
        context: how the merge is carried out. All processes have to call this.
        shortened: returns a batch with few samples of a batch. If the module does not run on it, the whole batch is
            taken.

    Returns:
        What was checked.

    Raises:
        MergeError: in all processes, if forwards differ, change weights, or communicate.
    """
    with context.peers.shares_failures():
        check = _Check(tasks, merged, context.peers.size > 1, shortened)
        check.run()
        everyone = context.peers.exchange((check.problems, check.result))
    if problems := list(dict.fromkeys(problem for problems, _ in everyone for problem in problems)):
        raise MergeError(problems)
    results = [result for _, result in everyone]
    names = [task.name for task in tasks]
    done = [name for name in names if any(name in result.tasks for result in results)]
    reasons = {name: why for result in reversed(results) for name, why in result.unchecked.items()}
    return ForwardCheck(
        max(result.layers for result in results),
        done,
        {name: reasons.get(name, "no batch") for name in names if name not in done},
        {name: max(result.held.get(name, 0.0) for result in results) for name in done},
        list(dict.fromkeys(warning for result in results for warning in result.warnings)),
    )


class _Check:
    def __init__(
        self, tasks: Sequence[Task], merged: Mapping[str, Tensor], has_peers: bool, shortened: Callable[[Any], Any]
    ) -> None:
        counts = [BATCHES, *[1] * len(tasks)]
        self.tasks = [task.with_batches(list(task.batch_numbers)[:count]) for task, count in zip(tasks, counts)]
        self.has_peers, self.shortened = has_peers, shortened
        self.models = Models(self.tasks, merged, ("expert",))
        self.result = ForwardCheck()
        self.result.warnings = [
            f"task '{task.name}': all calibration forwards share what is not copied: {why}. If a forward changes "
            f"it, {_ADVICE}"
            for task in tasks
            for why in State(task.expert).complaints()
        ]
        self.problems: list[str] = []

    def run(self) -> None:
        plain: dict[BatchId, Trace] = {}
        for number, task in enumerate(self.tasks):
            if task.batches:
                plain.update(self._plain(number, task))
        if self.problems or not plain:
            return
        if (together := self._in_lockstep(list(batch_ids(self.tasks)), list(plain))) is not None:
            self._compare(plain, together)
        self.result.tasks = [self.tasks[batch.task].name for batch in plain]
        self.result.layers = len({layer for trace in plain.values() for layer in trace})

    def _plain(self, number: int, task: Task) -> dict[BatchId, Trace]:
        """Run the first batch of a task by itself. If that fails, the task is not checked: the merge reports it."""
        batch, why = BatchId(number, 0, task.batch_numbers[0]), ""
        for shortened in (self.shortened, lambda batch: batch):
            self.tasks[number] = replace(task, batches=list(map(shortened, task.batches)))
            try:
                trace = self._alone(batch)
                self._look_at_validation(batch)
                return {batch: trace}
            except MergeError as error:
                self.problems += error.problems
                return {}
            except Exception as error:  # the user's module raises it
                why = f"batch {batch.number} raises {type(error).__name__}"
        self.result.unchecked[task.name] = why
        self.tasks[number] = task.with_batches([])
        return {}

    def _look_at_validation(self, batch: BatchId) -> None:
        """Warn of a validation with other weights, where calibration runs something else."""
        task = self.tasks[batch.task]
        if task.validation is None:
            return
        prepare, call = task.validation
        try:
            validated = replace(task, prepare=prepare, call=call)
            plain_forward(self.models, batch, validated, task.batches[batch.position], False, "validation")
        except MergeError as error:
            self.result.warnings += [
                f"{problem}. Until then, the metrics are those of other weights" for problem in error.problems
            ]
        except Exception as error:  # the user's module raises it
            self.result.warnings.append(
                f"task '{task.name}': it is not known whether validation_step computes with the expert's weights, "
                f"because it raises {type(error).__name__} on a calibration batch"
            )

    def _alone(self, batch: BatchId) -> Trace:
        task = self.tasks[batch.task]
        trace, written = plain_forward(self.models, batch, task, task.batches[batch.position], self.has_peers)
        if written:
            self.result.warnings.append(
                f"task '{task.name}': calibration forwards write to the buffers {', '.join(written[:4])}, which all "
                f"forwards and the merged modules share; {_ADVICE}"
            )
        return trace

    def _in_lockstep(self, batches: Sequence[BatchId], compared: Sequence[BatchId] = ()) -> dict[BatchId, Trace] | None:
        """Run batches in lockstep. If that fails, it may be for the batches that are not compared."""
        recorder, counter = _Recorder(self.models), Pager(None, self.models.device)
        try:
            Sweep(self.tasks, self.models, recorder, Context(), batches=batches, pager=counter).run()
        except Exception as error:  # the user's module raises it
            if len(compared) and len(compared) < len(batches):
                return self._in_lockstep(compared)
            where = "; ".join([str(error), *getattr(error, "__notes__", ())])
            self.problems.append(
                "calibration forwards disturb each other: by itself, none of them fails, but in lockstep there is "
                f"{type(error).__name__}: {where}. They share something that is no copy; {_ADVICE}"
            )
            return None
        for forward, size in counter.peak_by_forward().items():
            assert isinstance(forward, CalibrationForward)
            task = self.tasks[forward.id.batch.task]
            samples = max(task.size(task.batches[forward.id.batch.position]), 1)
            self.result.held[task.name] = max(size / samples, self.result.held.get(task.name, 0.0))
        return recorder.traces

    def _compare(self, plain: Mapping[BatchId, Trace], together: Mapping[BatchId, Trace]) -> None:
        for batch, trace in plain.items():
            layer = first_difference(trace, together[batch])
            if layer is None:
                continue
            task = self.tasks[batch.task]
            what = f"task '{task.name}': layer '{layer}' of {type(task.expert).__name__}"
            if first_difference(trace, self._alone(batch)) is not None:
                self.problems.append(
                    f"{what} gets other inputs when a calibration batch runs a second time, so that expert and merged "
                    "model cannot be compared. Draw random numbers from the generators of torch, numpy or random, "
                    "which are seeded, or from one that the module holds, and keep nothing in global variables; or "
                    f"{_ADVICE}"
                )
            elif (again := self._in_lockstep([batch])) and first_difference(again[batch], together[batch]) is None:
                self.result.warnings.append(
                    f"{what} gets other inputs in calibration than in a plain forward of the expert; to be sure what "
                    f"it is merged from, {_ADVICE}"
                )
            else:
                self.problems.append(
                    f"{what} gets the inputs of another calibration batch, task or model. Something that no copy of "
                    "the module owns, such as a global variable, keeps what a forward has computed; keep it in the "
                    f"module, or {_ADVICE}"
                )


class _Recorder(Visitor):
    """Records what layers are called with in lockstep."""

    def __init__(self, models: Models) -> None:
        self.models = models
        self.traces: dict[BatchId, Trace] = {}

    def on_forward(self, forward: CalibrationForward) -> None:
        self.traces[forward.id.batch] = Trace()
        record(forward.module, self.models, self.traces[forward.id.batch])

    def on_layer(self, sweep: Sweep, name: str, calls: Sequence[PausedCall]) -> LayerRecord:
        return LayerRecord(name, "", note="not solved in a check")
