"""What paused forwards hold is paged out and comes back, and nothing else is touched."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from com_lightning.core.chain import chain
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.lockstep import Forward, lockstep
from com_lightning.core.sweep.offload import Pager
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import named_tensors
from tests.helpers import built
from tests.helpers.pagers import recorded_pagers
from tests.helpers.zoo import averages

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture
def pagers(monkeypatch: pytest.MonkeyPatch) -> list[Pager]:
    return recorded_pagers(monkeypatch)


class Net(nn.Module):
    """Three layers, and something to hold in between."""

    def __init__(self, between: Callable[[Tensor], object] = lambda x: None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        self.between(first)
        second = first + self.b(first.relu())
        self.between(second)
        return first + self.c(second.relu())  # type: ignore[no-any-return]


class Branches(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = x + self.b(x) if x.sum() > 0 else 2 * x
        return self.c(x)  # type: ignore[no-any-return]


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3)
    )


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (convolutions, (3, 2, 8, 8)),
    "attention": (attention, (3, 5, 8)),
    "branches": (Branches, (6, 8)),
    "residual": (Net, (6, 8)),
}
RULES = {
    "two-sided": ChainOptions(),
    "corrected": ChainOptions(residual=True),
    "one-sided": ChainOptions(target="merged"),
    "RegMean": ChainOptions(inputs="expert", target="merged"),
}


def merge(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    budget: int | None,
    rule: ChainOptions | None = None,
    call: Callable[[nn.Module, Tensor, int], object] = lambda module, batch, index: module(batch),
    count: int = 4,
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    experts = built(make)
    every = [torch.randn(shape, generator=torch.Generator().manual_seed(n)) for n in range(2 * count)]
    batches = [every[:count], every[count:]]
    merged = averages(experts)
    before = [(t, t.untyped_storage().data_ptr()) for e in experts for _, t, _ in named_tensors(e)]
    before += [(t, t.untyped_storage().data_ptr()) for t in (*merged.values(), *every)]
    tasks = [Task(f"task{n}", e, b, call) for n, (e, b) in enumerate(zip(experts, batches))]
    records = merge_layers(tasks, merged, [0.5, 0.5], rule or ChainOptions(), Context(memory_budget=budget))
    assert all(tensor.untyped_storage().data_ptr() == address for tensor, address in before)  # none was emptied
    return merged, [replace(record, seconds=0.0, solving=0.0) for record in records]


def same(one: tuple[dict[str, Tensor], list[LayerRecord]], other: tuple[dict[str, Tensor], list[LayerRecord]]) -> bool:
    return one[1] == other[1] and all(torch.equal(value, other[0][name]) for name, value in one[0].items())


@pytest.mark.parametrize(
    ("model", "rule"),
    [*((model, "corrected") for model in MODELS), *(("residual", rule) for rule in RULES if rule != "corrected")],
)
def test_a_budget_changes_no_bit(model: str, rule: str, pagers: list[Pager], tmp_path: Path) -> None:
    expected = merge(*MODELS[model], None, RULES[rule])
    assert not pagers
    for budget in (0, 1000, 2**30):
        assert same(merge(*MODELS[model], budget, RULES[rule]), expected)
        assert (pagers[-1].written > 0) == (budget < 2**30)
    tight, medium, _ = pagers
    assert tight.written > medium.written
    assert not list(tmp_path.iterdir())


def test_to_host_memory_as_from_an_accelerator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    expected = merge(*MODELS["attention"], None)
    monkeypatch.setattr(chain, "Pager", lambda budget, device: Pager(budget, device, files=False))
    assert same(merge(*MODELS["attention"], 0), expected)
    assert not list(tmp_path.iterdir())


def test_autocast() -> None:
    def call(module: nn.Module, batch: Tensor, index: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            module(batch)

    assert same(merge(*MODELS["attention"], 0, call=call), merge(*MODELS["attention"], None, call=call))


def test_paused_forwards_hold_no_more_than_the_budget_and_the_pair_that_is_read(pagers: list[Pager]) -> None:
    merge(Net, (64, 8), 12_000)
    most = max(pagers[0].peak_by_forward().values())
    assert 3 * 64 * 8 * 4 <= most < 12_000
    assert pagers[0].peak <= 12_000 + 2 * most
    assert sum(pagers[0].peak_by_forward().values()) > 30_000


def test_what_hooks_keep_is_whole_after_the_merge() -> None:
    class Keeping:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def __call__(self, tensor: Tensor) -> None:
            self.seen.append(tensor)

    results = []
    for budget in (None, 0):
        keeping = Keeping()
        merge(lambda: Net(keeping), (6, 8), budget)  # noqa: B023
        results.append(keeping.seen)
    # Each expert has a copy of the hook, but what it refers to may be shared.
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(one, other) for one, other in zip(*results))


def shared_list(budget: int | None) -> list[Tensor]:
    seen: list[Tensor] = []
    net = Net(seen.append)
    forwards = [Forward(net, lambda n=n: net(torch.full((4, 8), float(n)))) for n in range(3)]  # type: ignore[misc]
    with torch.no_grad(), Pager(budget, CPU) as pager:
        for _ in lockstep(forwards, ["a", "b", "c"], pager=pager):
            assert budget is None or pager.held == 0
            if seen:
                assert budget is None or seen[0].untyped_storage().nbytes() == 0
    return seen


def test_what_outlives_its_forward_comes_back() -> None:
    torch.manual_seed(0)
    expected = shared_list(None)
    torch.manual_seed(0)
    assert all(torch.equal(one, other) for one, other in zip(shared_list(0), expected))
    assert len(expected) == 6


def test_whoever_reads_what_is_paged_out_fetches_it() -> None:
    """Another forward, which may write to it, and the consumer."""
    seen: list[Tensor] = []

    def between(x: Tensor) -> None:
        if seen:
            seen[0].add_(1)
        else:
            seen.append(x)

    net = Net(between)
    forwards = [Forward(net, lambda: net(torch.ones(4, 8))) for _ in range(3)]
    version = None
    with torch.no_grad(), Pager(0, CPU) as pager:
        for layer, _ in lockstep(forwards, ["a", "b", "c"], pager=pager):
            if layer == "b":
                first = net.a(torch.ones(4, 8))
                assert seen[0].untyped_storage().nbytes() == 0
                assert torch.allclose(seen[0], first + 2)
                pager.enforce_budget()
                assert seen[0].untyped_storage().nbytes() == 0
                version = seen[0]._version
    assert version == 2
    assert torch.allclose(seen[0], first + 5)


def test_what_numpy_looks_at_stays_where_it_is() -> None:
    views = []
    net = Net(lambda x: views.append((x.numpy(), x)))
    with torch.no_grad(), Pager(0, CPU) as pager:
        for _ in lockstep([Forward(net, lambda: net(torch.ones(4, 8)))], ["a", "b", "c"], pager=pager):
            assert all(x.untyped_storage().data_ptr() == array.ctypes.data for array, x in views)
    assert len(views) == 2


@pytest.mark.parametrize("how", ["forward", "consumer", "close"])
def test_nothing_is_left_after_an_error(how: str, tmp_path: Path) -> None:
    nets = [Net() for _ in range(3)]

    def fail(x: Tensor) -> None:
        if folders and how == "forward":
            raise LookupError("mine")

    folders: list[Path] = []
    nets[1].between = fail
    left: list[Tensor] = []

    def call(net: Net) -> None:
        x = net.a.weight.detach() + 1
        try:
            net(x)
        finally:
            left.append(x * 2)

    forwards = [Forward(net, lambda net=net: call(net), label=f"number {n}") for n, net in enumerate(nets)]  # type: ignore[misc]
    pager = Pager(0, CPU)
    steps = lockstep(forwards, ["a", "b", "c"], pager=pager)
    caught = contextlib.nullcontext() if how == "close" else pytest.raises(LookupError, match="mine")
    with torch.no_grad(), pager, caught, contextlib.closing(steps):
        for layer, _ in steps:
            folders += list(tmp_path.iterdir())
            assert pager.folder is not None
            assert list(pager.folder.iterdir())
            if layer == "b" and how == "consumer":
                raise LookupError("mine")
            if layer == "b" and how == "close":
                steps.close()
    assert len(left) == 3
    assert all(torch.equal(x, 2 * (net.a.weight + 1)) for x, net in zip(sorted_like(left, nets), nets))
    assert not list(tmp_path.iterdir())


def test_an_error_in_a_forward_of_a_merge_surfaces_as_itself(tmp_path: Path) -> None:
    def call(module: nn.Module, batch: Tensor, index: int) -> None:
        module(batch)
        if index == 2:
            assert list(tmp_path.iterdir())
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        merge(Net, (6, 8), 0, call=call)
    assert not list(tmp_path.iterdir())


def sorted_like(left: list[Tensor], nets: list[Net]) -> list[Tensor]:
    """Forwards end in any order."""
    return [min(left, key=lambda x: float((x - 2 * (net.a.weight.detach() + 1)).abs().sum())) for net in nets]


def test_a_full_disk_is_told_with_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(self: Pager, *args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("com_lightning.core.sweep.offload._memory", full)
    with pytest.raises(OSError, match="No space left") as caught:
        merge(Net, (6, 8), 0)
    if hasattr(caught.value, "__notes__"):
        assert "TMPDIR" in caught.value.__notes__[0]
    assert not list(tmp_path.iterdir())


def test_dispatch_modes_of_a_forward_are_its_own() -> None:
    class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen += 1
            return func(*args, **(kwargs or {}))

    modes: list[Counting] = []

    def call() -> None:
        with Counting() as mode:
            modes.append(mode)
            net(torch.ones(2, 8))
        assert torch._C._len_torch_dispatch_stack() == outside

    for budget in (None, 0):
        net, outside = Net(), int(budget is not None)
        pager = Pager(0, CPU)
        with torch.no_grad(), pager if outside else torch.no_grad():
            for _ in lockstep([Forward(net, call) for _ in range(2)], ["a", "b"], pager=pager if outside else None):
                counts = [mode.seen for mode in modes]
                assert torch._C._len_torch_dispatch_stack() == outside
                torch.ones(2) + 1
                assert [mode.seen for mode in modes] == counts
    assert len({mode.seen for mode in modes}) == 1
    assert modes[0].seen > 5
