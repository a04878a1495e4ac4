"""A copy of a module owns what a forward may change, and works on nothing of the original."""

from __future__ import annotations

import pickle
import random
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from com_lightning.core.tensors.modules import copy_module, copy_with_tensors
from com_lightning.core.tensors.state import State


class SaveFeatures:
    """Keeps the output of a layer, as fastai's does."""

    def __init__(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self.keep)
        self.kept: Any = None

    def keep(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.kept = output


def keep_in(owner: Any, layer: nn.Module, args: Any, output: Any) -> None:
    owner.kept = output


class Hooked(nn.Module):
    """Features of a layer, kept in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept: Any = None
        self.read: Callable[[], Any] = lambda: self.kept
        if way == "object":
            saved = SaveFeatures(self.layer)
            self.read = lambda: saved.kept
        elif way == "closure over self":
            self.layer.register_forward_hook(lambda layer, args, output: setattr(self, "kept", output))
        elif way == "default":
            self.layer.register_forward_hook(lambda layer, args, output, me=self: setattr(me, "kept", output))
        elif way == "partial":
            self.layer.register_forward_hook(partial(keep_in, self))
        elif way == "dictionary":
            features: dict[str, Any] = {"kept": None}
            self.layer.register_forward_hook(lambda layer, args, output: features.update(kept=output))
            self.read = lambda: features["kept"]
        elif way == "variable":
            kept = None

            def hook(layer: nn.Module, args: Any, output: Any) -> None:
                nonlocal kept
                kept = output

            self.layer.register_forward_hook(hook)
            self.read = lambda: kept
        elif way == "attribute of the hook":

            def itself(layer: nn.Module, args: Any, output: Any) -> None:
                itself.kept = output  # type: ignore[attr-defined]

            self.layer.register_forward_pre_hook(lambda layer, args: None)
            self.layer.register_forward_hook(itself)
            self.read = lambda: getattr(itself, "kept", None)
        elif way == "weak reference":
            me = weakref.ref(self)
            self.me = me
            self.layer.register_forward_hook(lambda layer, args, output: setattr(me(), "kept", output))
        elif way == "method":
            self.layer.register_forward_hook(self.hook)

    def hook(self, layer: nn.Module, args: Any, output: Any) -> None:
        self.kept = output


WAYS = ["object", "closure over self", "default", "partial", "dictionary", "variable", "attribute of the hook"]


@pytest.mark.parametrize("copies", [copy_module, copy_with_tensors])
@pytest.mark.parametrize("way", [*WAYS, "weak reference", "method"])
def test_what_a_hook_keeps_is_the_copys_own(way: str, copies: Callable[[nn.Module], nn.Module]) -> None:
    module = Hooked(way)
    one, other = copies(module), copies(copies(module))
    assert isinstance(one, Hooked)
    assert isinstance(other, Hooked)
    for number, copied in enumerate((one, other)):
        copied.layer(torch.full((1, 3), float(number)))
    assert module.read() is None
    for number, copied in enumerate((one, other)):
        assert torch.equal(copied.read(), copied.layer(torch.full((1, 3), float(number))))


class Meter:
    def __init__(self) -> None:
        self.total, self.history = 0.0, [1.0]


class Stateful(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.meter, self.confusion = Meter(), numpy.zeros((2, 2))
        self.meters = {"a": (Meter(), Meter())}
        self.bank = torch.zeros(4, 2)
        self.row = self.bank[1]
        self.torch, self.numpy, self.random = torch.Generator(), numpy.random.default_rng(0), random.Random(0)

    def draw(self) -> tuple[float, ...]:
        return float(torch.rand((), generator=self.torch)), self.numpy.random(), self.random.random()


def test_meters_arrays_and_tensors_are_copied() -> None:
    module = Stateful()
    copied = copy_module(module)
    assert isinstance(copied, Stateful)
    copied.meter.total += 1
    copied.meter.history.append(2.0)
    copied.meters["a"][1].total += 1
    copied.confusion += 1
    copied.bank += 1
    assert (module.meter.total, module.meter.history, module.meters["a"][1].total) == (0.0, [1.0], 0.0)
    assert not module.confusion.any()
    assert not module.bank.any()
    assert copied.row.tolist() == [1.0, 1.0]  # still a row of it
    module.bank += 2
    assert copied.bank.tolist() == [[1.0, 1.0]] * 4


def test_copies_draw_the_same_random_numbers() -> None:
    module = Stateful()
    copies = [copy_module(module) for _ in range(2)]
    drawn = [[copied.draw() for _ in range(2)] for copied in copies if isinstance(copied, Stateful)]
    assert drawn[0] == drawn[1]
    assert drawn[0][0] == module.draw()
    assert drawn[0][0] != drawn[0][1]


class MyTokenizer:
    def __init__(self) -> None:
        self.vocabulary = {"a": 1}


def test_data_and_tokenizers_are_shared_wherever_they_are() -> None:
    module: Any = nn.Linear(2, 2)
    data = TensorDataset(torch.zeros(3))
    module.loader, module.tokenizer, module.holder = DataLoader(data), MyTokenizer(), Meter()
    module.holder.data = data
    copied: Any = copy_module(module)
    assert copied.loader is module.loader
    assert copied.tokenizer is module.tokenizer
    assert copied.holder is not module.holder
    assert copied.holder.data is data


def test_what_cannot_be_copied_is_shared_and_named() -> None:
    module: Any = nn.Sequential(nn.Linear(2, 2))
    module[0].meter = Meter()
    module[0].meter.lock = [threading.Lock()]
    copies: list[Any] = [copy_module(module) for _ in range(2)]
    first, second = (copied[0].meter for copied in copies)
    assert first is not second
    assert first.lock[0] is second.lock[0]
    ((_, why),) = State(module).uncopyable().values()
    assert why.startswith("0.meter.lock[0] (a lock): cannot pickle")


def test_large_tensors_and_arrays_are_shared_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = nn.Linear(2, 2)
    module.bank, module.seen = {"features": torch.zeros(100)}, numpy.zeros(10)
    for limit, shares in ((480, False), (479, True)):
        monkeypatch.setattr("com_lightning.core.tensors.state.LARGE", limit)
        copied: Any = copy_module(module)
        assert (copied.bank["features"] is module.bank["features"]) is shares
        assert (copied.seen is module.seen) is shares
        assert bool(State(module).complaints()) is shares
        own: Any = copy_with_tensors(module)
        assert own.bank["features"] is not module.bank["features"]
    assert "bank['features'], seen: more than" in State(module).complaints()[0]


def test_pickled_copies_do_not_crash() -> None:
    """A lazy copy of a storage, as PyTorch has it, ends the process when it is pickled."""
    module: Any = nn.Linear(2, 2)
    module.weights = torch.ones(3)
    for copied in (copy_module(copy_module(module)), module):
        assert pickle.loads(pickle.dumps(copied)).weights.tolist() == [1, 1, 1]


def test_computed_tensors_anywhere_are_shared() -> None:
    module: Any = nn.Linear(2, 2)
    module.kept = {"a": [module(torch.zeros(1, 2))]}
    copied: Any = copy_module(module)
    assert copied.kept["a"] is not module.kept["a"]
    assert copied.kept["a"][0] is module.kept["a"][0]


def test_parameters_are_shared_or_copied() -> None:
    module = nn.Linear(2, 2)
    assert copy_module(module).weight is module.weight
    apart = copy_with_tensors(module)
    assert torch.equal(apart.weight, module.weight)
    assert apart.weight.data_ptr() != module.weight.data_ptr()


def test_functions_without_state_are_left_alone() -> None:
    def relu(x: Tensor) -> Tensor:
        return x.relu()

    module: Any = nn.Linear(2, 2)
    module.activation = relu
    assert copy_module(module).activation is relu
