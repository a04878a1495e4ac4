"""What shapes the outputs of a module without being a parameter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import LlamaConfig, LlamaForCausalLM

from com_lightning.experts.parameters import sort_parameters
from com_lightning.experts.settings import described, differences_of_experts, differing, settings_of


def llama(**settings: Any) -> nn.Module:
    sizes = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_labels": 2}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **{**sizes, **settings}))


class Scaled(nn.Module):
    """It computes with one of its attributes, and keeps others for the record."""

    def __init__(self, scale: float = 1.0, note: str = "") -> None:
        super().__init__()
        self.linear, self.scale, self.note = nn.Linear(2, 2), scale, note

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale  # type: ignore[no-any-return]


class Chosen(LightningModule):
    """A forward that asks the hyperparameters; of the others, none acts on what layers compute."""

    def __init__(self, activation: str = "relu", lr: float = 0.1, classes: int = 2, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.body, self.mean = Scaled(scale), MeanMetric()
        self.head = nn.Linear(2, classes)
        self.classes = classes
        self.register_buffer("table", torch.full((3,), scale), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = getattr(torch, self.hparams["activation"])(self.body(x))
        return self.head(x)[:, : self.classes]  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), self.hparams["lr"])


def found(one: nn.Module, other: nn.Module) -> list[str]:
    return list(differing({"a": settings_of(one), "b": settings_of(other)}))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rms_norm_eps": 0.05}, ["config.rms_norm_eps"]),
        ({"hidden_act": "relu"}, ["config.hidden_act"]),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 2e7}}, ["config.rope_parameters.rope_theta"]),
        ({"attention_dropout": 0.5, "use_cache": False, "num_labels": 3, "architectures": ["Other"]}, []),
    ],
)
def test_configurations_of_transformers(settings: dict[str, Any], expected: list[str]) -> None:
    assert found(llama(), llama(**settings)) == expected


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda other: nn.LayerNorm(2, eps=1e-3 if other else 1e-5), ["eps"]),
        (lambda other: nn.Conv2d(2, 2, 3, stride=1 + other), ["stride"]),
        (lambda other: nn.Sequential(nn.Linear(2, 2), nn.GELU() if other else nn.ReLU()), ["1"]),
        (lambda other: nn.Sequential(nn.Linear(2, 2), nn.GELU("tanh" if other else "none")), ["1.approximate"]),
        (lambda other: nn.TransformerEncoderLayer(4, 2, 4, activation="gelu" if other else "relu"), ["activation"]),
        (lambda other: nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5) if other else nn.Identity()), []),
        (lambda other: nn.BatchNorm1d(2, momentum=0.5 if other else 0.1), []),
        (lambda other: Scaled(2.0 if other else 1.0), ["scale"]),
        (lambda other: Scaled(note="b" if other else "a"), []),
        (lambda other: Chosen("tanh" if other else "relu"), ["hparams.activation"]),
        (lambda other: Chosen(lr=1.0 if other else 0.1), []),
        (lambda other: Chosen(scale=2.0 if other else 1.0), ["body.scale", "table"]),
    ],
)
def test_plain_modules(make: Callable[[bool], nn.Module], expected: list[str]) -> None:
    one, other = make(False), make(True)
    assert [name for name in found(one, other) if "activation_relu" not in name] == expected
    assert not found(one, make(False))


def test_what_acts_on_private_layers_alone_is_no_difference_of_experts() -> None:
    experts = {"a": Chosen(classes=2), "b": Chosen(classes=3)}
    private = {task: ["head.weight", "head.bias"] for task in experts}
    assert not differences_of_experts(experts, private)
    experts["b"].body.scale = 2.0
    text = described(differences_of_experts(experts, private))
    assert text == "body.scale is 1.0 in 'a' and 2.0 in 'b'"


def test_buffers_that_are_computed_are_never_averaged() -> None:
    experts = {"a": Chosen(scale=1.0), "b": Chosen(scale=2.0)}
    parameters = sort_parameters(Chosen(), experts, [])
    assert parameters.private == {"a": ["table"], "b": ["table"]}
    assert any("body.scale is 1.0 in 'a' and 2.0 in 'b'" in warning for warning in parameters.warnings)
    assert "table" in sort_parameters(Chosen(), {"a": Chosen(), "b": Chosen()}, []).shared
