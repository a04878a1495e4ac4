"""The input of a sweep (tasks and batches), and its output (records of layers)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from com_lightning.core.layers import RowMask
from com_lightning.core.layers.base import Layout
from com_lightning.core.tensors.placement import Move, Offload

Stream = Literal["merged", "expert"]
"""The model that a forward runs in: the model as merged so far, or the expert."""


SEEDS_OF_TASK = 100_003
"""Number of seeds that the forwards of a task may have."""


class BatchId(NamedTuple):
    """A calibration batch of this process.

    Attributes:
        task: position of the task.
        position: position of the batch among those that this process has of the task.
        number: number of the batch among those that all processes have of the task.
    """

    task: int
    position: int
    number: int


class ForwardId(NamedTuple):
    """A calibration forward: a batch, and the model that it runs in."""

    batch: BatchId
    stream: Stream


@dataclass
class Padding:
    """Which positions of a batch are data.

    Attributes:
        mask: ``(samples, positions)`` or another shape that inputs of layers have, ``True`` at data.
        is_certain: whether to use it where only its shape shows to which layers it belongs. If not, the layers have to
            be known.
    """

    mask: Tensor
    is_certain: bool = True


class Cut(NamedTuple):
    """A small copy of a calibration batch, with fewer samples or positions.

    Attributes:
        batch: the copy.
        samples: number of its samples.
        positions: name of each mask -> number of its positions in the copy.
    """

    batch: Any
    samples: int
    positions: Mapping[str, int]


class Place(NamedTuple):
    """What small copies of a batch have shown about the input or output of a layer.

    Attributes:
        layouts: name of each mask whose positions it has -> how they lie in it.
        constants: those of its first two sizes that were the same in both copies.
    """

    layouts: Mapping[str, Layout]
    constants: frozenset[int]


Role = Literal["input", "output"]
Places = Mapping[tuple[Role, str], Place]
"""Input or output of a layer -> its place."""


@dataclass
class Task:
    """One task: its expert and its calibration data.

    Args:
        name: name of the task.
        expert: the fine-tuned module, in eval mode.
        batches: the calibration batches of this process.
        call: ``call(module, batch, index)`` runs the calibration forward of one batch on a copy of the expert.
        masks: returns the padding of a batch, by names that all batches have in common.
        numbers: number of each batch among those of all processes. ``None``: there is one process.
        move: moves a module to the device and the precision of its forwards. The expert itself stays where it is
            stored, for instance in a mapped file. Layers are solved in its stored precision.
        offload: which models have each weight moved only while a forward uses it.
        prepare: ``prepare(module)`` runs what comes once before all forwards, on a copy of the expert or of the merged
            model. Each forward runs on a copy of that copy. Layers are not merged from what is called there.
        validation: what validates the module, as :attr:`prepare` and :attr:`call`, if that is something else.
        loss: ``loss(module, batch, index)`` returns the training loss, for rules that differentiate it.
        predict: ``predict(module, batch, index)`` returns logits, ``(n, classes)``, for rules that read predictions.
        size: returns the number of samples in a batch.
        cuts: returns pairs of small copies of one of these batches, whose sizes differ. The first pair that runs shows
            which layers have the positions of which mask.
        places: where the positions of each mask lie. ``None``: shapes alone tell.
    """

    name: str
    expert: nn.Module
    batches: Sequence[Any]
    call: Callable[[nn.Module, Any, int], object] = lambda module, batch, index: module(batch)
    masks: Callable[[Any], Mapping[str, Padding]] = lambda batch: {}
    numbers: Sequence[int] | None = None
    move: Move = lambda module: module
    offload: Offload = None
    prepare: Callable[[nn.Module], object] | None = None
    validation: tuple[Callable[[nn.Module], object], Callable[[nn.Module, Any, int], object]] | None = None
    loss: Callable[[nn.Module, Any, int], Tensor] | None = None
    predict: Callable[[nn.Module, Any, int], Tensor] | None = None
    size: Callable[[Any], int] = lambda batch: 1
    cuts: Callable[[Sequence[Any]], Iterable[tuple[Cut, Cut]]] = lambda batches: ()
    places: Places | None = None

    @property
    def batch_numbers(self) -> Sequence[int]:
        """The number of each batch among those of all processes."""
        return range(len(self.batches)) if self.numbers is None else self.numbers

    @property
    def has_masks(self) -> bool:
        """Whether a batch has padding masks."""
        return any(map(self.masks, self.batches))

    def with_batches(self, numbers: Sequence[int]) -> Task:
        """The same task with only the batches of these numbers."""
        batches = dict(zip(self.batch_numbers, self.batches))
        return replace(self, batches=[batches[number] for number in numbers], numbers=numbers)

    def row_mask(self, batch: Any, layer: str, role: Role = "input") -> RowMask | None:
        """Return the masks that apply to a layer.

        Args:
            batch: one of the batches.
            layer: name of the layer.
            role: whether they are for the rows of its input or of its output.

        Returns:
            The masks; ``None`` if there are none.
        """
        masks = self.masks(batch)
        if not masks:
            return None
        place = None if self.places is None else self.places.get((role, layer))
        if place and place.layouts:
            return RowMask([(masks[name].mask, layout) for name, layout in place.layouts.items() if name in masks])
        certain = [padding.mask for padding in masks.values() if padding.is_certain]
        if place is None:
            return RowMask([(mask, None) for mask in certain])
        # The small copies had no such positions here. A model that pads its inputs to a multiple of something may have
        # them nonetheless. If not, a size of the model is by chance the number of positions.
        layouts: tuple[Layout, ...] = ("samples first", "flat", "positions first")
        is_uncertain = any(not place.constants.isdisjoint(mask.shape[1:]) for mask in certain)
        return RowMask([(mask, layout) for mask in certain for layout in layouts], is_uncertain)


def batch_ids(tasks: Sequence[Task]) -> Iterator[BatchId]:
    """All batches of this process, task by task."""
    for number, task in enumerate(tasks):
        for position in range(len(task.batches)):
            yield BatchId(number, position, task.batch_numbers[position])


@dataclass
class LayerRecord:
    """What happened at one layer. Sums and ratios are over the calibration rows.

    Attributes:
        name, layer_type: of the layer.
        task: the task that it belongs to, if it is private.
        parameters: full name of each parameter that was solved -> how many of its values were.
        buffers: full names of the buffers that were re-estimated (running statistics).
        distance, cosine: for each task, relative distance and mean cosine between the merged model's and the expert's
            input: the drift on arrival.
        of_tasks: full name of each tensor of which every task has its own values -> how many values each task keeps. A
            correction of low rank has as many as its two factors.
        rank: of each task's correction of the weight; 0 if there is none.
        gains: how much less the predictions err with each further rank, if that was asked for.
        similarity: of each task's inputs to each other, if importance follows from it, see
            :mod:`~com_lightning.core.solve.similarity`. Without those of normalisations and embeddings, whose
            regressions have one input each.
        importance: of each task, where it differs between layers.
        residual: relative squared error of the layer's output after the merge. A two-sided merge compares it with the
            expert's output on the expert's input, a one-sided merge on the merged model's input. Where the layer
            repairs a residual stream, it is the error of the sum of output and stream.
        ridge: with which it was solved.
        condition, jitter: of the factorisation, see :class:`~com_lightning.core.solve.ridge.Factor`.
        rows: number of rows of each task.
        masked: tasks whose padding masks apply to the layer's inputs.
        doubtful: those of them whose masks fit, but may belong to other rows.
        groups: number of independent regressions (rows of a table, experts of a mixture, channels).
        groups_without_data: how many of them no data reached. They keep the average.
        groups_of_zeros: how many others had only zeros as inputs. Their weights keep the average.
        kept: full name of each parameter that has such weights -> how many of its values these are.
        calls: how often a forward calls the layer, at most. It is merged from the inputs of the first call.
        late: forwards that came to the layer only after it was merged, so that their inputs do not count.
        groups_kept_average: how many others keep the average because their solution is no better. Only rounding causes
            this.
        cg_steps: of conjugate gradients, where errors count by their effect on predictions.
        unpaired: calls whose rows could not be matched with those of the expert. They were merged one-sided.
        permuted: how many of them have the same rows in another order, such as proposals that a detector sorts.
        corrected_for: the tensors that the output is added to, and whose drift the layer repairs.
        uncorrected: calls where that drift was not known, because these tensors were gone, changed, or of other shapes.
        shared_with: the earlier layer whose statistics were used, because both have the same input.
        seconds: for gathering and solving.
        solving: how many of these seconds were for solving.
        note: why it was not solved, if it was not.
    """

    name: str
    layer_type: str
    parameters: dict[str, int] = field(default_factory=dict)
    buffers: list[str] = field(default_factory=list)
    distance: dict[str, float] = field(default_factory=dict)
    cosine: dict[str, float] = field(default_factory=dict)
    of_tasks: dict[str, int] = field(default_factory=dict)
    rank: int = 0
    gains: list[float] = field(default_factory=list)
    similarity: dict[str, float] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    residual: float | None = None
    ridge: float | None = None
    condition: float | None = None
    jitter: float | None = None
    rows: dict[str, int] = field(default_factory=dict)
    masked: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    groups: int = 0
    groups_without_data: int = 0
    groups_of_zeros: int = 0
    kept: dict[str, int] = field(default_factory=dict)
    calls: int = 1
    late: int = 0
    groups_kept_average: int = 0
    cg_steps: int | None = None
    unpaired: int = 0
    permuted: int = 0
    corrected_for: list[str] = field(default_factory=list)
    uncorrected: int = 0
    shared_with: str | None = None
    task: str | None = None
    seconds: float = 0.0
    solving: float = 0.0
    note: str | None = None


@dataclass(frozen=True)
class SkippedBatch:
    """A calibration batch that was skipped.

    Attributes:
        task, batch: its task, and its number among those of all processes.
        layer: the first layer whose statistics do not include it.
        why: what is wrong with its inputs of that layer.
    """

    task: str
    batch: int
    layer: str
    why: str

    def __str__(self) -> str:
        return f"task '{self.task}', batch {self.batch}, from layer '{self.layer}' on: its inputs {self.why}"


class NonFiniteError(ValueError):
    """There is NaN or infinity in an expert's weights, in the inputs of a layer, or in the solution of a layer."""
