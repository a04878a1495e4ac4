"""Layers whose weight is computed from other parameters (``torch.nn.utils.parametrize``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, weight_norm

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers import layer_type_of, stored_parameters
from com_lightning.core.layers.embedding import Embedding
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from tests.helpers import built, relative

Merged = tuple[nn.Module, list[LayerRecord]]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Shifted(nn.Module):
    """Its inverse keeps what it needs in a buffer, which is not merged."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift

    def right_inverse(self, x: Tensor) -> Tensor:
        self.shift.copy_(x.mean())
        return x - self.shift


def parametrised(layer: nn.Module, *parts: nn.Module, name: str = "weight") -> nn.Module:
    for part in parts:
        parametrize.register_parametrization(layer, name, part)
    return layer


def linear() -> nn.Linear:
    return nn.Linear(5, 5)


HELD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "weight norm": (lambda: parametrizations.weight_norm(linear()), (12, 5)),
    "weight norm of columns": (lambda: parametrizations.weight_norm(linear(), dim=1), (12, 5)),
    "grouped": (
        lambda: parametrizations.weight_norm(nn.Conv1d(4, 6, 3, padding=1, groups=2), dim=2),  # as in Wav2Vec2
        (6, 4, 9),
    ),
    "transposed": (lambda: parametrizations.weight_norm(nn.ConvTranspose2d(2, 3, 2, stride=2)), (4, 2, 5, 5)),
    "two in a row": (lambda: parametrised(linear(), Doubled(), Doubled()), (12, 5)),
    "bias": (lambda: parametrised(linear(), Doubled(), name="bias"), (12, 5)),
}
NOT_HELD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "spectral norm": (lambda: parametrizations.spectral_norm(linear()), "SpectralNorm"),
    "orthogonal": (lambda: parametrizations.orthogonal(linear()), "Orthogonal"),
    "householder": (lambda: parametrizations.orthogonal(linear(), orthogonal_map="householder"), "Orthogonal"),
    "no inverse": (lambda: parametrised(linear(), Symmetric()), "does not implement right_inverse"),
    "kept in a buffer": (lambda: parametrised(linear(), Shifted()), "Shifted"),
}


def data(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Noise; every seed is a task, with a mean and a scale of its own for each feature."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = (torch.randn(shape[1:], generator=generator) for _ in range(2))
    return mean + scale * torch.randn(shape, generator=generator)


def merge(experts: list[nn.Module], batches: list[list[Tensor]]) -> Merged:
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
    merged = {n: nn.Parameter(average([s[n] for s in states]), False) for n in states[0]}
    tasks = [Task(str(n), expert, part) for n, (expert, part) in enumerate(zip(experts, batches))]
    records = merge_layers(tasks, merged, [1 / len(experts)] * len(experts), ChainOptions())
    return copy_module(experts[0], {id(t): merged[n] for n, t, _ in named_tensors(experts[0])}), records


def plain(module: nn.Module) -> nn.Module:
    """The same layer without parametrisations (torch's own removal would change all copies of the layer)."""
    cls: Any = type(module).__mro__[1]
    layer: nn.Module = cls.__new__(cls)
    layer.__dict__.update(vars(module), _modules={}, _parameters={})
    for name in ("weight", "bias"):
        layer.register_parameter(name, nn.Parameter(getattr(module, name).detach()))
    return layer


@pytest.mark.parametrize("name", HELD)
def test_the_weight_is_solved_as_if_it_were_a_parameter(name: str) -> None:
    make, shape = HELD[name]
    experts, batches = built(make), [[data(seed, shape)] for seed in range(2)]
    module, records = merge(experts, batches)
    reference, _ = merge([plain(expert) for expert in experts], batches)
    assert records[0].note is None
    assert (
        set(records[0].parameters)
        == set(stored_parameters(experts[0]))
        == {n for n, _, p in named_tensors(module) if p}
    )
    for own in ("weight", "bias"):
        assert relative(getattr(module, own), getattr(reference, own)) < 1e-4
    start = average([getattr(expert, "weight") for expert in experts])  # noqa: B009
    assert relative(getattr(module, "weight"), start) > 1e-2  # noqa: B009


@pytest.mark.parametrize("name", NOT_HELD)
def test_a_weight_that_the_parametrisation_cannot_express_is_averaged(name: str) -> None:
    make, reason = NOT_HELD[name]
    experts, batches = built(make), [[data(seed, (12, 5))] for seed in range(2)]
    module, records = merge(experts, batches)
    solved, refused = records
    assert solved.parameters == {"bias": 5}  # by itself, as what is added to the product
    assert (refused.name, refused.parameters) == ("", {})
    assert reason in str(refused.note)
    tensors = [{n: t for n, t, _ in named_tensors(expert)} for expert in experts]
    for own, tensor, _ in named_tensors(module):
        assert torch.equal(tensor, average([each[own] for each in tensors])) == (own != "bias"), own


@pytest.mark.parametrize("name", [*HELD, *NOT_HELD])
def test_identical_experts_are_given_back(name: str) -> None:
    make, shape = HELD[name] if name in HELD else (NOT_HELD[name][0], (12, 5))
    expert = built(make, 1)[0]
    module, records = merge([expert, copy.deepcopy(expert)], [[data(seed, shape)] for seed in range(2)])
    assert records[0].parameters
    expected = {n: t for n, t, _ in named_tensors(expert)}
    assert all(relative(tensor, expected[own]) < 1e-5 for own, tensor, _ in named_tensors(module))


def test_a_layer_within_a_parametrisation_is_no_layer_of_the_model() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    experts = built(lambda: nn.Sequential(parametrised(linear(), Projected())))
    _, records = merge(experts, [[data(seed, (12, 5))] for seed in range(2)])
    assert [record.name for record in records] == ["0.bias", "0"]
    assert "right_inverse" in str(records[1].note)


def test_weight_normalisation_of_old_is_averaged() -> None:
    with pytest.warns(FutureWarning):
        experts: list[nn.Module] = [nn.Sequential(weight_norm(linear()), linear()).eval() for _ in range(2)]
    assert layer_type_of(experts[0].get_submodule("0")) is None
    module, records = merge(experts, [[data(seed, (12, 5))] for seed in range(2)])
    assert [record.name for record in records if record.parameters] == ["0.bias", "1"]
    assert {record.name for record in records if record.note} == {"0.weight_v", "0.weight_g"}
    assert bool(module(data(0, (12, 5))).isfinite().all())


def test_a_parametrised_embedding_is_no_table() -> None:
    table = parametrised(nn.Embedding(9, 4), Doubled())
    assert not Embedding().matches(table)
    assert layer_type_of(table) is None
