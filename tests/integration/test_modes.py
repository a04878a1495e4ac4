"""A merge computes alike, whatever modes of PyTorch are on where it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule, merge
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:every parameter is shared")


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: torch.device("meta"),
}


def merged(mode: Callable[[], AbstractContextManager[Any]] | None, callback: bool, **trainer: Any) -> dict[str, Tensor]:
    """The merged weights, and the values of the report."""
    experts: dict[str, Any] = dict(zip("ab", make_experts((3, 3))))
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=12, augmented_copies=1)
    model, rule = Classifier(), ChainOfMerges(sensitivity="numbers")
    with torch.random.fork_rng(), mode() if mode else torch.enable_grad():
        torch.manual_seed(0)
        if callback:
            merger = ChainOfMergesCallback(experts, rule)
            quiet_trainer(callbacks=[merger], **trainer).validate(model, datamodule=data, verbose=False)
            result = merger.result
        else:
            result = merge(model, experts, data, rule, trainer=quiet_trainer(**trainer))
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert not any(p.is_inference() for p in result.modules["a"].parameters())
    metrics = {f"{label} {task}": v for label, t in result.report.metrics.items() for task, v in t.items()}
    values = {f"{n} {k}": torch.tensor(v, dtype=torch.float64) for n, each in metrics.items() for k, v in each.items()}
    return {**result.modules["a"].state_dict(), **values}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("callback", [False, True])
def test_modes_of_the_caller_do_not_act(mode: str, callback: bool) -> None:
    if mode == "default device" and callback:
        pytest.skip("a DataLoader itself fails there")
    expected, got = merged(None, callback), merged(MODES[mode], callback)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if " " in name and "float" in mode:  # Lightning averages metrics in the default precision
            assert float(got[name]) == pytest.approx(float(value), rel=0.02)
        else:
            assert torch.equal(got[name], value), name


def test_the_precision_of_the_trainer_acts() -> None:
    plain, half = merged(None, False), merged(None, False, precision="bf16-mixed")
    assert any(not torch.equal(half[name], value) for name, value in plain.items())
    again = merged(MODES["autocast"], False, precision="bf16-mixed")
    assert all(torch.equal(again[name], value) for name, value in half.items())


def test_a_model_that_was_built_in_inference_mode() -> None:
    with torch.inference_mode():
        model = Classifier()
    experts: dict[str, Any] = dict(zip("ab", make_experts((3, 3))))
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=12)
    merger = ChainOfMergesCallback(experts, baselines=False)
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=data, verbose=False)
    assert torch.equal(model.head.weight, merger.modules["a"].head.weight)  # type: ignore[union-attr,arg-type]
