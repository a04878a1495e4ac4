"""A calibration forward calls a module's hooks as Lightning does."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.data.steps import Batch, CalibrationStep, _copied, shortened
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer, relative


class Short(Classifier):
    """The hooks' signature since Lightning 2, for one loader."""

    seen: tuple[Any, ...] = ()

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.seen = (batch, batch_idx)


class Long(Classifier):
    seen: tuple[Any, ...] = ()

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.seen = (batch, batch_idx, dataloader_idx)


@pytest.mark.parametrize(("module", "count"), [(Short(), 2), (Long(), 3)])
def test_hooks_of_both_signatures(module: LightningModule, count: int) -> None:
    batch = next(iter(make_data(0).val_dataloader()))
    CalibrationStep(quiet_trainer())(module, Batch(batch, 1), 5)
    seen = module.seen
    assert isinstance(seen, tuple)
    assert seen[1:] == (5, 1)[: count - 1]


class Graph:
    """A batch object of the user's own, as those of graph libraries."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.notes = x, {"seen": 0}


class InPlace(Classifier):
    def calibration_step(self, batch: Any) -> None:
        batch.x = batch.x * 2
        batch.x += 1
        batch.notes["seen"] += 1


def test_batch_objects_that_a_step_changes_stay_as_they_were() -> None:
    graph = Graph(torch.ones(2, 6))
    for _ in range(2):
        CalibrationStep(quiet_trainer())(InPlace(), Batch(graph, 0), 0)
    assert torch.equal(graph.x, torch.ones(2, 6))
    assert graph.notes == {"seen": 0}


def test_a_batch_that_cannot_be_copied_is_told_of() -> None:
    batch = {"x": torch.ones(2), "lock": threading.Lock()}
    with pytest.warns(UserWarning, match="cannot be copied .*lock"):
        copied = _copied(batch)
    assert copied["x"] is not batch["x"]


def test_of_a_large_storage_only_the_batch_is_copied() -> None:
    batch = _copied([torch.zeros(1_000_000)[:2]])
    assert batch[0].untyped_storage().nbytes() == 8


def merge(module_class: type[Classifier], **kwargs: Any) -> ChainOfMergesCallback:
    """Experts in memory, built by the class itself."""
    experts: dict[str, Any] = {}
    for task, expert in zip("ab", make_experts((3, 3))):
        experts[task] = module_class()
        experts[task].load_state_dict(expert.state_dict())
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
    merger = ChainOfMergesCallback(experts, private=[], **kwargs)
    quiet_trainer(callbacks=[merger]).validate(module_class(), datamodule=data, verbose=False)
    return merger


def difference(one: ChainOfMergesCallback, other: ChainOfMergesCallback) -> float:
    expected = dict(other.modules["a"].named_parameters())
    return max(relative(tensor, expected[name]) for name, tensor in one.modules["a"].named_parameters())


class Bank(Classifier):
    """Runs the network once before validation, as nearest neighbours do, and needs what it has computed."""

    epochs: tuple[int, ...] = ()
    runs: ClassVar[list[bool]] = []

    def on_validation_start(self) -> None:
        self.epochs = (*self.epochs, 1)

    def on_validation_epoch_start(self) -> None:
        self.epochs = (*self.epochs, 2)
        self.bank = self.body(torch.full((5, 6), 9.0))
        self.runs.append("log" in vars(self))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        assert self.epochs[-2:] == (1, 2)
        assert self.bank.shape == (5, 8)
        super().validation_step(batch, batch_idx)


def test_a_network_that_runs_before_validation_is_merged_from_the_validation_data() -> None:
    Bank.runs.clear()
    merged = merge(Bank, baselines=False)
    assert difference(merged, merge(Classifier, baselines=False)) == 0
    assert {layer.rows["a"] for layer in merged.report.layers} == {40}
    # The check: by itself and in lockstep; the search for residuals, in one task; the merge, in two models
    assert Bank.runs.count(True) == 2 * 2 + 1 + 2 * 2


class Kept(Classifier):
    """Keeps features by a closure over itself, and counts samples in an object."""

    def __init__(self, classes: int = 3, width: int = 8) -> None:
        super().__init__(classes, width)
        self.features: dict[str, Tensor] = {}
        self.body[0].register_forward_hook(lambda layer, args, output: self.features.update(first=output))
        self.counter = Counter()

    def forward(self, x: Tensor) -> Tensor:
        z = self.body(x)
        return self.head(z + self.features["first"])  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.counter.samples += len(batch[0])
        super().validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        self.log("count", float(self.counter.samples))
        self.counter.samples = 0


class Counter:
    samples = 0


class Local(Classifier):
    """The same network, with its features in a local variable."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.body[0](x)
        return self.head(self.body[1:](first) + first)  # type: ignore[no-any-return]


def test_features_and_counters_of_calibration_stay_in_calibration() -> None:
    merged = merge(Kept)
    assert difference(merged, merge(Local)) == 0
    for metrics in merged.report.metrics.values():
        assert {values["count"] for values in metrics.values()} == {60.0}
    assert merged.report.checks[0] == "calibration forwards: compared with plain forwards of all 2 tasks, at 4 layers"


def test_a_batch_is_shortened_as_far_as_it_is_tensors_and_lists() -> None:
    x, names = torch.arange(8.0).view(4, 2), ["a", "b", "c", "d"]
    batch = Batch({"x": x, "names": names, "pair": (x, 1), "one": torch.ones(3)}, 1)
    short = shortened(batch)
    assert torch.equal(short.content["x"], x[:2])
    assert short.content["names"] == ["a", "b"]
    assert torch.equal(short.content["pair"][0], x[:2])
    assert len(short.content["one"]) == 3
    graph = Batch(Graph(x), 0)
    assert shortened(graph) is graph  # nobody knows how to take a part of it
    assert short.dataloader_idx == 1


class Warming(Classifier):
    """Runs its network in a hook of the batch, and again in the step."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.body(torch.zeros(1, 6))


class Early(Classifier):
    """Runs its body in a hook of the batch, and only its head in the step."""

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        self.features = self.body(batch[0])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mean", self.head(self.features).mean())


def test_a_layer_that_a_hook_of_the_batch_calls_first_is_an_error() -> None:
    with pytest.raises(MergeError) as caught:
        merge(Warming, baselines=False)
    assert caught.value.problems[0].startswith("Warming: on_validation_batch_start calls body.0, body.1, body.3, and")
    assert difference(merge(Early, baselines=False), merge(Classifier, baselines=False)) == 0


class Swapping(Classifier):
    """Validates with other weights, which it takes back afterwards."""

    def on_validation_epoch_start(self) -> None:
        self.kept = self.head.weight.detach().clone()
        self.head.weight.data.mul_(2)

    def on_validation_epoch_end(self) -> None:
        self.head.weight.data.copy_(self.kept)


def test_weights_that_are_swapped_for_validation_are_an_error() -> None:
    with pytest.raises(MergeError, match="weight' is changed before its calibration"):
        merge(Swapping, baselines=False)


class SwappingCalibrated(Swapping):
    """The same, calibrated with its own weights."""

    def calibration_step(self, batch: Any) -> None:
        self(batch[0])


def test_weights_that_are_swapped_for_validation_alone_are_a_warning() -> None:
    merged = merge(SwappingCalibrated, baselines=False)
    assert difference(merged, merge(Classifier, baselines=False)) == 0
    (first, second) = (warning for warning in merged.report.warnings if "averaged weights" in warning)
    assert first.startswith("task 'a': SwappingCalibrated computes with other weights than the expert's: 'head.weight'")
    assert "is changed before its validation forwards" in first
    assert second.startswith("task 'b'")
