"""What modules do and hold besides layers with a closed form: random parts, and buffers that nobody can average."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from com_lightning import ChainOfMergesCallback, MergeDataModule
from tests.helpers import Classifier, make_data, perturb, quiet_trainer, relative


class Dropped(Classifier):
    """Dropout and stochastic depth, which leave little in train mode."""

    def __init__(self, probability: float = 0.9) -> None:
        super().__init__()
        self.dropout, self.depth = nn.Dropout(probability), StochasticDepth(probability, "row")
        self.residual = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.body(x))
        return self.head(x + self.depth(self.residual(x)))  # type: ignore[no-any-return]


class WithBuffers(Classifier):
    """Complex and whole numbers and truth values, in modules whose layers are solved."""

    rotation: Tensor
    steps: Tensor
    open: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rotation", torch.polar(torch.ones(4), torch.arange(4.0)))
        self.register_buffer("steps", torch.arange(8))
        self.register_buffer("open", torch.tensor([True] * 4 + [False] * 4))
        self.register_buffer("scale", torch.ones(8))
        self.body[1].register_buffer("phase", torch.full((8,), 1j))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)[:, self.steps] * self.open * self.scale
        turned = torch.view_as_complex(x.reshape(-1, 4, 2)) * self.rotation
        return self.head(torch.view_as_real(turned).flatten(1))  # type: ignore[no-any-return]


def merge(first: Classifier, second: Classifier, model: Classifier) -> ChainOfMergesCallback:
    merger = ChainOfMergesCallback({"a": first, "b": second}, baselines=False, private=[])
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=tasks, verbose=False)
    return merger


def test_dropout_and_stochastic_depth_are_off_during_calibration() -> None:
    merged = []
    for probability in (0.9, 0.0):
        torch.manual_seed(0)
        base = Dropped(probability)
        experts = [Dropped(probability) for _ in range(2)]
        for seed, expert in enumerate(experts):
            expert.load_state_dict(base.state_dict())
            perturb(expert, 0.3, seed=seed).train()
        model = Dropped(probability)
        merger = merge(experts[0], experts[1], model)
        assert {record.name for record in merger.report.layers} == {"body.0", "body.1", "body.3", "residual", "head"}
        merged.append(model.state_dict())
        assert all(module.training for expert in experts for module in expert.modules())
    assert all(torch.equal(merged[0][name], merged[1][name]) for name in merged[0])


def test_buffers_that_are_no_numbers_to_average_are_left_alone(tmp_path: Path) -> None:
    experts = [WithBuffers(), WithBuffers()]
    experts[1].load_state_dict(experts[0].state_dict())
    for seed, expert in enumerate(experts):
        perturb(expert.body, 0.3, seed=seed)
        expert.scale.fill_(1.0 + seed)
    model = WithBuffers()
    merger = merge(experts[0], experts[1], model)
    assert {record.name for record in merger.report.layers if record.parameters} == {
        *("body.0", "body.1", "body.3", "head")
    }
    for name in ("rotation", "steps", "open", "body.1.phase"):
        assert torch.equal(model.get_buffer(name), experts[0].get_buffer(name)), name
        assert model.get_buffer(name).dtype == experts[0].get_buffer(name).dtype
        assert str(merger.report.parameters[name]) == "buffer"
    assert relative(model.scale, torch.full((8,), 1.5)) < 1e-6
    merger.save(tmp_path / "merged")
    loaded = WithBuffers.load_from_checkpoint(tmp_path / "merged" / "merged.ckpt", weights_only=True)
    assert torch.equal(loaded.rotation, model.rotation)
