"""Whatever precision forwards run in: statistics in float32 or better, results in the precision of the checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins.precision import BitsandbytesPrecision
from safetensors.torch import load_file
from torch import Tensor, nn

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.solve.statistics import InputSums
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.core.tensors.placement import Offload, Placement
from com_lightning.strategies import require_mergeable
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer, relative
from tests.helpers.zoo import averages
from tests.helpers.zoo import make_experts as zoo_experts
from tests.helpers.zoo import run as zoo_run

TASKS = ("a", "b")

WORST = {"32-true": 1e-5, "64-true": 0.0, "bf16-mixed": 0.15, "bf16-true": 0.15, "16-mixed": 0.15, "16-true": 0.015}
"""Bounds on the worst relative difference from float64, over all parameters, in the merge of :func:`merged`; measured:
1.7e-6, 0, 0.059, 0.059, 0.059 (which on a CPU is bf16-mixed) and 0.0047."""


def merged(precision: Any, experts: list[Any] | None = None, **kwargs: Any) -> ChainOfMergesCallback:
    callback = ChainOfMergesCallback(dict(zip(TASKS, experts or make_experts())), baselines=False, **kwargs)
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, classes=4)}, num_samples=40)
    trainer = quiet_trainer(precision=precision, callbacks=[callback])
    trainer.validate(Classifier(3), datamodule=data, verbose=False)
    return callback


def worst(ours: LightningModule, theirs: LightningModule) -> float:
    return max(relative(p, q) for p, q in zip(ours.parameters(), theirs.parameters()))


@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU.*")
@pytest.mark.parametrize("precision", WORST)
def test_precision(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each comes close to float64, gathers in float32 or better, and returns what the experts are stored in."""
    reference = merged("64-true")
    dtypes = set()
    original = InputSums.update

    def update(self: InputSums, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        dtypes.update({tensor.dtype for tensor in (self.gram, self.drift) if tensor is not None})

    monkeypatch.setattr(InputSums, "update", update)
    callback = merged(precision)
    assert dtypes == {torch.float64 if precision == "64-true" else torch.float32}
    difference = worst(callback.modules["a"], reference.modules["a"])
    print(f"{precision}: {difference:.1e}")
    assert difference <= WORST[precision]
    assert {p.dtype for module in callback.modules.values() for p in module.parameters()} == {torch.float32}


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="PyTorch has one setting for all")
@pytest.mark.usefixtures("low")
def test_statistics_are_not_gathered_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    original = InputSums.update

    def update(self: InputSums, *args: Any, **kwargs: Any) -> None:
        seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision))  # type: ignore[attr-defined]
        original(self, *args, **kwargs)

    monkeypatch.setattr(InputSums, "update", update)
    callback = merged("32-true")
    assert seen == {("ieee", "ieee")}
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert worst(callback.modules["a"], merged("64-true").modules["a"]) <= 0.15


# Where and how models are stored

OFFLOADS: list[Offload] = [None, "experts", "layers"]


@pytest.mark.parametrize("name", ["BERT", "ViT", "resnet18", "Gemma", "Mamba"])  # the last two cast parameters
def test_models_that_stay_give_the_same_bits(name: str) -> None:
    """Their weights are converted where they are used, here to another precision, as to another device."""
    experts, batches = zoo_experts(name)
    cast = [[{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in part] for part in batches]
    results = []
    for offload in OFFLOADS:
        tasks = [
            Task(f"task{n}", e, b, zoo_run, move=lambda module: module.double(), offload=offload)
            for n, (e, b) in enumerate(zip(experts, cast))
        ]
        results.append(averages(experts))
        records = merge_layers(tasks, results[-1], [0.5, 0.5], ChainOptions())
        assert any(record.parameters for record in records)
    for result in results[1:]:
        for (own, first), second in zip(results[0].items(), result.values()):
            assert first.dtype == second.dtype
            assert torch.equal(first, second), own
    assert {t.dtype for e in experts for _, t, _ in named_tensors(e) if t.is_floating_point()} == {torch.float32}


def test_a_model_that_stays_claims_to_be_where_it_runs() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            assert self.first.weight.dtype == x.dtype
            assert self.scale[0].dtype == x.dtype
            assert self.scale.new_zeros(1).dtype == x.dtype
            assert torch.zeros_like(self.scale).dtype == x.dtype
            assert self.first.weight.device == x.device
            assert not self.first.weight.is_cuda
            x = torch.cat([self.first(x), x * self.scale[0], torch.stack([self.scale[1]]).expand(len(x), 4)], 1)
            return x @ torch.cat([self.first.weight.t(), self.scale.t()], 1).repeat(3, 1)

    torch.manual_seed(0)
    base = Asks().eval()
    experts = [perturb(copy.deepcopy(base), 0.3, seed=n) for n in range(2)]
    batches = [torch.randn(8, 4).double()]
    tasks = [Task(str(n), e, batches, move=lambda m: m.double(), offload="layers") for n, e in enumerate(experts)]
    result = averages(experts)
    merge_layers(tasks, result, [0.5, 0.5], ChainOptions())
    assert all(tensor.isfinite().all() for tensor in result.values())


def test_a_placement_copies_only_what_it_converts() -> None:
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.BatchNorm1d(2), "c": nn.Linear(2, 2)})
    module["c"].weight = module["a"].weight
    assert Placement(module).module().get_parameter("a.weight") is module.get_parameter("a.weight")
    placed = Placement(module, lambda m: m.to(torch.bfloat16)).module()
    assert placed.get_parameter("a.weight") is placed.get_parameter("c.weight")
    assert placed.get_buffer("b.num_batches_tracked") is module.get_buffer("b.num_batches_tracked")
    assert {p.dtype for p in placed.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def half(experts: list[Classifier], folder: Path) -> dict[str, Path]:
    """Lightning checkpoints of experts in bfloat16."""
    paths: dict[str, Path] = {}
    for task, expert in zip(TASKS, experts):
        trainer = quiet_trainer()
        expert.to(torch.bfloat16)
        trainer.strategy.connect(expert)
        trainer.save_checkpoint(paths.setdefault(task, folder / f"{task}.ckpt"), weights_only=True)
    return paths


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_results_are_stored_as_the_experts_are(precision: Any, tmp_path: Path) -> None:
    paths: Any = half(make_experts(), tmp_path)
    callback = merged(precision, list(paths.values()), output_dir=str(tmp_path / "merged"))
    shared = load_file(tmp_path / "merged" / "merged.safetensors")
    assert {tensor.dtype for tensor in shared.values()} == {torch.bfloat16}
    for task, module in callback.modules.items():
        state = torch.load(tmp_path / "merged" / f"{task}.ckpt", weights_only=True)["state_dict"]
        assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16}
        assert {p.dtype for p in module.parameters()} == {torch.float32}  # as the user's class has them
        for name, value in module.state_dict().items():  # and what was validated is what is stored
            assert torch.equal(state[name].float(), value), name
        loaded = Classifier.load_from_checkpoint(tmp_path / "merged" / f"{task}.ckpt", weights_only=True)
        assert torch.equal(loaded.head.weight, module.get_parameter("head.weight"))


def test_experts_of_mixed_precision_are_stored_in_the_higher(tmp_path: Path) -> None:
    experts: list[Any] = make_experts()
    experts[1] = half([experts[1]], tmp_path)["a"]
    callback = merged("32-true", experts)
    callback.save(tmp_path / "merged")
    assert {t.dtype for t in load_file(tmp_path / "merged" / "merged.safetensors").values()} == {torch.float32}
    states = {t: torch.load(tmp_path / "merged" / f"{t}.ckpt", weights_only=True)["state_dict"] for t in TASKS}
    assert states["a"]["head.weight"].dtype == torch.float32  # private ones as their own expert has them
    assert states["b"]["head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["memory", "file"])
def test_experts_are_left_as_they_are(where: str, tmp_path: Path) -> None:
    experts: list[Any] = make_experts()
    before = copy.deepcopy(experts)
    given = list(half(copy.deepcopy(experts), tmp_path).values()) if where == "file" else experts
    content = [path.read_bytes() for path in given] if where == "file" else []
    merged("bf16-true", given)
    for ours, theirs in zip(experts, before):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            assert p.dtype == q.dtype == torch.float32
            assert torch.equal(p, q), name
    assert content == ([path.read_bytes() for path in given] if where == "file" else [])


def test_plugins_that_replace_layers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = quiet_trainer()
    monkeypatch.setattr(trainer.strategy, "_precision_plugin", object.__new__(BitsandbytesPrecision))
    with pytest.raises(MergeError, match="precision: BitsandbytesPrecision puts other layers in the place"):
        require_mergeable(trainer, None)
