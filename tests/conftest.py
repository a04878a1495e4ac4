"""Every test starts from the same state, whatever ran before it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's own calls
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
import torch.distributed as dist

from tests.helpers import Classifier, make_experts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What lies in ``tests/slow`` is slow."""
    for item in items:
        if "tests/slow/" in item.nodeid:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def pair() -> dict[str, Classifier]:
    """Two experts of one architecture."""
    return dict(zip("ab", make_experts((3, 3))))


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sys.argv", ["pytest"])  # LightningCLI warns if it is given arguments besides
    torch.set_num_threads(1)  # tiny tensors, and pytest-xdist fills the cores
    torch.manual_seed(0)
    with warnings.catch_warnings():
        yield
    if dist.is_initialized():  # Lightning leaves it to the end of the process
        dist.destroy_process_group()


@pytest.fixture
def low() -> Iterator[None]:
    """Float32 products of the model are computed in TF32, or in bfloat16 on CPUs that have it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)
