"""Merging on a GPU gives what merging on the CPU gives. Skipped where there is none.

``COM_LIGHTNING_TEST_DEVICE=cpu`` runs the same on the CPU, so that this file is known to run.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from com_lightning import ChainOfMergesCallback, MergeDataModule, TaskLoaders
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.lockstep import Forward, lockstep
from com_lightning.core.sweep.task import LayerRecord, Task
from tests.helpers import Classifier, make_experts, quiet_trainer, relative
from tests.helpers.zoo import averages, run
from tests.helpers.zoo import make_experts as zoo_experts

DEVICE = os.environ.get("COM_LIGHTNING_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU")

ARCHITECTURES = ["resnet18", "convnext_tiny", "swin_t", "BERT", "Llama", "T5", "CLIP", "ViT", "U-Net"]


def merged(name: str, device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    experts, batches = zoo_experts(name)
    tasks = []
    for number, (expert, part) in enumerate(zip(experts, batches)):
        cast = [{k: v.to(device, dtype if v.is_floating_point() else None) for k, v in b.items()} for b in part]
        tasks.append(Task(f"task{number}", expert.to(device, dtype), cast, run))
    values = averages([task.expert for task in tasks])
    records = merge_layers(tasks, values, [0.25, 0.75], ChainOptions())
    return {own: value.cpu() for own, value in values.items()}, records


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=["64", "32"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_device_merges_as_the_cpu(name: str, dtype: torch.dtype, most: float) -> None:
    expected, records = merged(name, "cpu", dtype)
    values, theirs = merged(name, DEVICE, dtype)
    assert [(r.name, r.parameters, r.rows) for r in theirs] == [(r.name, r.parameters, r.rows) for r in records]
    for own, value in expected.items():
        assert relative(values[own], value) < most, own


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_trainer_on_the_device(precision: Any, workers: int) -> None:
    """Pinned batches that are copied while the host goes on, autocast, and what is left behind."""
    if DEVICE == "cpu" and precision.startswith("16"):
        pytest.skip("the CPU has no such autocast")
    how: dict[str, Any] = {"num_workers": workers, "pin_memory": DEVICE == "cuda"}
    values = {}
    for device, kind in (("cpu", "64-true"), (DEVICE, precision)):
        torch.manual_seed(1)
        data = {
            task: TaskLoaders(val=DataLoader(TensorDataset(torch.randn(64, 6), torch.arange(64) % 3), 8, **how))
            for task in "ab"
        }
        merger = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3)))), private=["head"])
        trainer = quiet_trainer(callbacks=[merger], precision=kind, accelerator="gpu" if device == "cuda" else device)
        trainer.validate(Classifier(3), datamodule=MergeDataModule(data, num_samples=64), verbose=False)
        assert merger.report.metrics["merged"].keys() == {"a", "b"}
        assert merger.report.peak_memory > 0
        values[device, kind] = {name: p.detach().cpu() for name, p in merger.modules["a"].named_parameters()}
    expected, actual = values["cpu", "64-true"], values[DEVICE, precision]
    most = {"64-true": 1e-6, "32-true": 1e-4}.get(precision, 0.1)
    for name, value in expected.items():
        assert relative(actual[name], value) < most, name


@pytest.mark.parametrize("less", ["high", "medium"])
def test_less_precise_products_are_not_for_statistics(less: str) -> None:
    """Lightning advises them on GPUs that have tensor cores, and CPUs know them too."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(200, 64, generator=generator).to(DEVICE) for _ in range(2)]
    torch.manual_seed(0)
    experts = [nn.Linear(64, 64).to(DEVICE) for _ in data]

    def weight() -> Tensor:
        values = averages(experts)
        merge_layers(
            [Task(str(n), e, [x]) for n, (e, x) in enumerate(zip(experts, data))], values, [0.5, 0.5], ChainOptions()
        )
        return values["weight"]

    expected, before = weight(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(less)
    try:
        assert relative(weight(), expected) < 1e-6  # its inputs are the data themselves
        assert torch.get_float32_matmul_precision() == less
    finally:
        torch.set_float32_matmul_precision(before)


class Drawing(nn.Module):
    """Draws on the device, on either side of a layer, and looks at what device is the current one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.first, self.last):
            self.drawn.append(torch.rand(3, device=x.device))
            x = layer(nn.functional.dropout(x, 0.5))
        self.drawn.append(torch.rand(3, device=x.device))
        return x


def test_forwards_have_a_random_state_each_and_the_callers_stays() -> None:
    torch.zeros(1, device=DEVICE)  # the device is in use
    nets = [Drawing().to(DEVICE) for _ in range(3)]
    seeds = [5, 5, 6]
    x = torch.ones(2, 4, device=DEVICE)
    forwards = [Forward(net, lambda net=net: net(x), seed=seed) for net, seed in zip(nets, seeds)]  # type: ignore[misc]
    torch.manual_seed(3)
    outside = torch.rand(3, device=DEVICE)
    torch.manual_seed(3)
    device = torch.cuda.current_device() if DEVICE == "cuda" else None
    for _ in lockstep(forwards, ["first", "last"]):
        assert device is None or torch.cuda.current_device() == device
    assert torch.equal(torch.rand(3, device=DEVICE), outside)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].drawn, nets[1].drawn))
    assert not any(torch.equal(a, b) for a, b in zip(nets[0].drawn, nets[2].drawn))


def test_a_merge_on_a_stream_of_its_own() -> None:
    if DEVICE == "cpu":
        pytest.skip("the CPU has no streams")
    expected, _ = merged("ViT", DEVICE, torch.float64)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(stream):
        values, _ = merged("ViT", DEVICE, torch.float64)
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    for own, value in expected.items():
        assert relative(values[own], value) < 1e-9, own


def test_a_merged_module_is_trained_on_the_device() -> None:
    experts = make_experts((3, 3))
    data = {
        task: TaskLoaders(val=DataLoader(TensorDataset(torch.randn(32, 6), torch.arange(32) % 3), 8)) for task in "ab"
    }
    merger = ChainOfMergesCallback(dict(zip("ab", experts)), private=["head"], baselines=False)
    trainer = quiet_trainer(callbacks=[merger], accelerator="gpu" if DEVICE == "cuda" else DEVICE)
    trainer.validate(Classifier(3), datamodule=MergeDataModule(data, num_samples=16), verbose=False)
    module = copy.deepcopy(merger.modules["a"]).to(DEVICE)
    module(torch.randn(2, 6, device=DEVICE)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
