"""Small models of every shape, and merges of them by the chain alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    ViTConfig,
    ViTModel,
)

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, Padding, Task
from com_lightning.core.tensors.modules import average, named_tensors, tied_names
from tests.helpers.classifier import built
from tests.helpers.numbers import relative

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def ids(seed: int) -> Tensor:
    """Tokens; every ten seeds are a task, with a vocabulary of its own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 15, (4, 6), generator=generator) + 15 * (seed // 10 % 2)


def spread(seed: int, *shape: int) -> Tensor:
    """Noise; every ten seeds are a task, with a mean and a scale of its own for each feature."""
    task = torch.Generator().manual_seed(1000 + seed // 10)
    mean, scale = torch.randn(shape[1:], generator=task), 2 * torch.rand(shape[1:], generator=task)
    return mean + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(seed: int) -> Tensor:
    """Noise under stripes, which lie in even tasks and stand in odd ones."""
    stripes = 3 * spread(seed, 4, 1, 12, 1).expand(4, 1, 12, 12)
    return (stripes if seed // 10 % 2 else stripes.mT) + 0.3 * spread(seed, 4, 1, 12, 12)


def images_as_rows(seed: int) -> Tensor:
    return images(seed)[:, 0]


def normalised(*layers: nn.Module) -> nn.Module:
    """Layers whose running statistics are those of some data."""
    module = nn.Sequential(*layers)
    for layer in module:
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    with torch.no_grad():
        module(images(0))
    return module.eval()


def points(seed: int) -> Tensor:
    return spread(seed, 24, 5)


class Pair(nn.Module):
    """Two inputs that share a layer's first argument, and differ in the second."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 4)
        self.one, self.other = nn.Bilinear(3, 4, 6), nn.Bilinear(3, 4, 6)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x)
        return self.one(left, right).tanh() + self.other(left, right.flip(1))  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), points),
    "cnn": (lambda: nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=2), nn.Flatten()), images),
    "batch-norm": (
        lambda: normalised(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2, 2)),
        images,
    ),
    "bilinear": (Pair, points),
    "attention": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 24, batch_first=True), 2),
        images_as_rows,
    ),
    "vit": (lambda: ViTModel(ViTConfig(**SMALL, image_size=12, patch_size=4, num_channels=1)), images),
    "bert": (lambda: BertModel(BertConfig(**SMALL, vocab_size=30)), ids),
    "llama": (lambda: LlamaModel(LlamaConfig(**SMALL, vocab_size=30)), ids),
    "gpt2": (lambda: GPT2Model(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30)), ids),
}


def merge(
    experts: list[nn.Module],
    batches: list[list[Any]],
    rule: ChainOptions | None = None,
    importance: list[float] | None = None,
    call: Callable[[nn.Module, Any, int], object] = lambda module, batch, index: module(batch),
    mask: Callable[[Any], Tensor | None] = lambda batch: None,
    context: Context | None = None,
    base: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    importance = importance or [1 / len(experts)] * len(experts)
    states = [{n: t for n, t, _ in named_tensors(e)} for e in experts]
    ties = tied_names(experts[0])
    merged: dict[str, Tensor] = {}
    for name in states[0]:
        if states[0][name].is_floating_point():
            value = nn.Parameter(average([s[name] for s in states], importance), False)
            merged[name] = merged.get(ties[name], value)
    tasks = [Task(f"task{i}", e, b, call, only(mask)) for i, (e, b) in enumerate(zip(experts, batches))]
    return merged, merge_layers(tasks, merged, importance, rule or ChainOptions(), context, base)


def only(mask: Callable[[Any], Tensor | None]) -> Callable[[Any], dict[str, Padding]]:
    """The masks of a task that has one, or none."""
    return lambda batch: {} if (value := mask(batch)) is None else {"mask": Padding(value)}


def case(name: str, count: int = 2) -> tuple[list[nn.Module], list[list[Tensor]]]:
    make, data = MODELS[name]
    return built(make, count), [[data(10 * task + batch) for batch in range(2)] for task in range(count)]


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor, _ in named_tensors(module)}


def worst(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(relative(actual[name], expected[name]) for name in actual)


class Block(nn.Module):
    """A stream, and a layer that writes to it in some way."""

    def __init__(self, way: Callable[[Any, Tensor, Tensor], Tensor] | None = None, ends: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 3) if ends else nn.Identity()
        self.dropout, self.depth = nn.Dropout(0.5), StochasticDepth(0.5, "row")
        self.scale = nn.Parameter(torch.ones(5))
        self.way = way or (lambda self, stream, output: stream + output)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        return self.last(self.way(self, stream, self.second(stream.relu())))  # type: ignore[no-any-return]
