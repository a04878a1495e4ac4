"""With ``offload="layers"``, one layer at a time is where forwards run, and merged weights are in mapped files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import com_lightning as com
from com_lightning import MergeDataModule, MergeError, MergeResult
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.forward_check import check_forwards
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.mapped import mapped_copy
from com_lightning.core.tensors.modules import tied_names
from com_lightning.core.tensors.placement import Offload
from com_lightning.core.tensors.private_torch import WeakStorage
from com_lightning.core.tensors.tracked import Target
from com_lightning.errors import MergeWarning
from com_lightning.experts import load
from com_lightning.experts.construction import empty_parameters, meta_tensors, without_memory
from com_lightning.experts.load import load_expert
from com_lightning.memory_estimate import offload_advice
from com_lightning.plan import make_plan
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer
from tests.helpers.zoo import averages

WIDTH, BLOCKS, ROWS = 64, 8, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(x))


class Device:
    """Counts the weights that are on a device. The device is float64, to which weights are converted to run there.

    Attributes:
        peak: the most weights that were there at a time.
    """

    def __init__(self) -> None:
        self.there: dict[int, WeakStorage] = {}
        self.peak = 0

    def count(self, tensor: Tensor) -> None:
        self.there = {key: storage for key, storage in self.there.items() if storage.get() is not None}
        storage = WeakStorage(tensor.untyped_storage())
        self.there[id(storage)] = storage
        self.peak = max(self.peak, len(self.there))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Every weight that is converted to float64, by a model that runs or by what places it."""
    device, original = Device(), Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = original(self, *args, **kwargs)
        is_weight = self.shape == (WIDTH, WIDTH) and self.dtype == torch.float32
        if is_weight and result.dtype == torch.float64 and torch.device("cpu") in args:
            device.count(result)
        return result

    monkeypatch.setattr(Tensor, "to", to)
    return device


def merge(offload: Offload, options: ChainOptions, budget: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(*[Block() for _ in range(BLOCKS)]).eval()
    experts = [perturb(base, 0.3, seed=number) for number in range(2)]
    batches = [torch.randn(ROWS, WIDTH).double() for _ in range(3)]
    tasks = [Task(str(n), e, batches, move=lambda m: m.double(), offload=offload) for n, e in enumerate(experts)]
    merged = averages(experts)
    merge_layers(tasks, merged, [0.5, 0.5], options, Context(memory_budget=budget))
    return merged


@pytest.mark.parametrize(("offload", "most"), [(None, 3 * BLOCKS), ("experts", BLOCKS + 4), ("layers", 6)])
def test_one_layer_at_a_time_is_on_the_device(device: Device, offload: Offload, most: int) -> None:
    merge(offload, ChainOptions())
    assert 0 < device.peak <= most
    if offload != "layers":
        assert device.peak >= BLOCKS


@pytest.mark.parametrize(
    "options",
    [
        ChainOptions(),
        ChainOptions(target="merged"),
        ChainOptions(sensitivity="probabilities"),
        ChainOptions(residual=False),
    ],
)
@pytest.mark.parametrize("budget", [None, 0])
def test_the_result_is_the_same_to_the_last_bit(options: ChainOptions, budget: int | None) -> None:
    one, other = (merge(offload, options, budget) for offload in (None, "layers"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("offload", ["experts", "layers"])
def test_packed_attention_is_compared_with_plain_forwards(offload: Offload) -> None:
    torch.manual_seed(0)
    base = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    experts = [perturb(base, 0.3, seed=number) for number in range(2)]
    batches = [torch.randn(2, 3, 8).double()]
    tasks = [Task(str(n), e, batches, move=lambda m: m.double(), offload=offload) for n, e in enumerate(experts)]
    check = check_forwards(tasks, averages(experts), Context())
    assert not check.unchecked
    assert check.layers >= 5


# The whole merge


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    """Lightning checkpoints of two experts."""
    paths = {task: tmp_path / f"{task}.ckpt" for task in "ab"}
    for task, expert in zip("ab", make_experts()):
        trainer = quiet_trainer()
        trainer.strategy.connect(expert)
        trainer.save_checkpoint(paths[task], weights_only=True)
    return paths


def merged(model: Any, paths: Any, folder: Path | None = None, method: Any = None, **options: Any) -> MergeResult:
    tasks = {"a": make_data(0), "b": make_data(1, 4)}
    data = MergeDataModule(tasks, num_samples=40) if method is None else None
    output = None if folder is None else str(folder)
    return com.merge(model, paths, data, method, quiet_trainer(), output_dir=output, **options)


@pytest.mark.parametrize("method", [None, com.TSVM])
def test_a_model_without_values_is_enough(paths: Any, method: Any, tmp_path: Path) -> None:
    """The experts' files have all values; the base is one of them here."""
    base = {} if method is None else {"base": paths["a"]}
    with torch.device("meta"):
        model = Classifier(3)
    one = merged(Classifier(3), paths, tmp_path / "one", method, **base)
    other = merged(model, paths, tmp_path / "other", method, offload="layers", **base)
    assert one.report.metrics == other.report.metrics
    ours, theirs = (load_file(tmp_path / name / "merged.safetensors") for name in ("one", "other"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert all(p.untyped_storage().is_shared() for n, p in other.modules["a"].named_parameters() if n in other.shared)
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():  # the result is as writable as any other
        other.modules["a"].get_parameter(other.shared[0]).add_(1)


def test_what_has_no_values_anywhere_is_named(paths: Any) -> None:
    with torch.device("meta"):
        model = Classifier(3)
    state = make_experts()[0].body.state_dict()
    with pytest.raises(MergeError, match=r"expert 'a': head.*not in its source.*build Classifier in memory"):
        merged(model, {"a": state, "b": paths["b"]}, offload="layers")
    with pytest.raises(MergeError, match=r"base: .* on the meta device; name a checkpoint as `base`"):
        merged(model, paths, method=com.TSVM, offload="layers")


class Fixed(Classifier):
    """Computes with its parameters while it is built."""

    def __init__(self, *args: Any, how: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.save_hyperparameters()
        if how == "number":
            self.start = float(self.head.weight.sum())
        elif how == "list":
            self.anchors = [self.head.weight.detach().clone()]
        elif how == "buffer":
            self.register_buffer("anchor", self.head.weight.detach().clone(), persistent=False)


@pytest.mark.parametrize(("how", "is_lean"), [("", True), ("number", False), ("list", False), ("buffer", False)])
def test_a_class_that_needs_values_gets_them(
    how: str, is_lean: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expert = Fixed(3, how=how)
    trainer = quiet_trainer()
    trainer.strategy.connect(expert)
    trainer.save_checkpoint(tmp_path / "expert.ckpt", weights_only=True)
    calls, original = list[Any](), load._rebuilt_from

    def counted(*args: Any) -> Any:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(load, "_rebuilt_from", counted)
    loaded = load_expert("a", tmp_path / "expert.ckpt", Fixed(3), lean=True)
    assert len(calls) == (1 if is_lean else 2)
    assert not meta_tensors(loaded)
    assert all(torch.equal(value, expert.state_dict()[name]) for name, value in loaded.state_dict().items())


@pytest.mark.parametrize(
    ("how", "why"), [("number", "meta"), ("list", "anchors are computed"), ("buffer", "anchor are computed")]
)
def test_a_model_that_needs_values_is_built_with_memory(how: str, why: str) -> None:
    assert all(p.is_meta for p in without_memory(lambda: Fixed(3), "Fixed").parameters())
    with pytest.warns(MergeWarning, match=f"offload: Fixed is built with memory for its parameters.*{why}"):
        model = without_memory(lambda: Fixed(3, how=how), "Fixed")
    assert not meta_tensors(model)


def test_a_parameter_with_several_names_stays_one() -> None:
    def build() -> nn.ModuleDict:
        net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
        shared = nn.Parameter(torch.zeros(2, 2))
        net["a"].weight = net["b"].weight = shared
        net["c"].weight = net["a"].weight
        net.register_buffer("table", torch.arange(3))
        return net

    with empty_parameters():
        net = build()
    assert all(parameter.is_meta for parameter in net.parameters())
    assert net.get_buffer("table").tolist() == [0, 1, 2]
    assert tied_names(net) == tied_names(build())
    assert not any(parameter.is_meta for parameter in nn.Linear(2, 2).parameters())


def test_what_has_the_address_of_another_tensor_is_moved_anew() -> None:
    """A forward frees copies that it has selected, and the next ones may lie where they were, or be written to."""
    target = Target(torch.device("cpu"), torch.float64)
    for number in range(20):
        tensor = torch.full((1000,), float(number))
        assert target.move(tensor)[0] == number
        tensor += 0.5
        assert target.move(tensor)[0] == number + 0.5
        del tensor


# Mapped copies


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_mapped_copy_is_a_copy(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = torch.arange(6).to(dtype).view(2, 3).T
    copy = mapped_copy(tensor, str(tmp_path))
    assert torch.equal(copy, tensor)
    assert copy.dtype == dtype
    copy[0, 0] = 7
    assert tensor[0, 0] == 0
    assert not list(tmp_path.iterdir()), "the file has no name"
    assert mapped_copy(torch.empty(0, 3)).shape == (0, 3)


def test_a_full_disk_is_an_error_that_says_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        mapped_copy(torch.ones(3), str(tmp_path))
    assert "TMPDIR" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_makes_it_fit(paths: Any) -> None:
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 4)})
    data.setup("validate")
    plan = make_plan(Classifier(3), dict(paths), data, com.ChainOfMerges())
    memory = plan.memory()
    everything = sum(memory.values())
    assert offload_advice(plan, 2, None, everything) == ""
    assert offload_advice(plan, 2, None, everything - 1).endswith("; add --offload experts")
    assert offload_advice(plan, 1, None, everything - memory["experts"]) == "", "experts do not run"
    less = memory["merged model"] + memory["largest layer"] - 1
    for offload in (None, "experts"):
        assert offload_advice(plan, 2, offload, less).endswith("; add --offload layers")
    assert offload_advice(plan, 2, "layers", less) == ""
    assert "no offload changes that" in offload_advice(plan, 2, None, 10)
