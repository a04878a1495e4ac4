"""A module is built as ever, or not at all if it would be much larger than its file and the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from com_lightning.experts.construction import BoundedConstruction, TooLargeError, check_counts

MODEL = nn.Linear(2, 2)
MANY = 10**9
USUAL: dict[str, Callable[[], Any]] = {
    "linear": lambda: nn.Linear(3, 4),
    "recurrent": lambda: nn.LSTM(3, 4, num_layers=2),
    "attention": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "orthogonal": lambda: nn.init.orthogonal_(torch.empty(4, 4)),
    "normal": lambda: nn.init.trunc_normal_(torch.empty(4, 4)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
    "random": lambda: [torch.randn(3), torch.randperm(4), torch.randint(5, (2,)), torch.rand_like(torch.ones(2))],
    "generator": lambda: torch.randn(3, generator=torch.Generator().manual_seed(1)),
    "legacy": lambda: torch.Tensor(2, 3).fill_(1),
    "tables": lambda: [torch.arange(5), torch.eye(3), torch.linspace(0, 1, 5), torch.full((2,), 1.0)],
    "sparse": lambda: torch.zeros(MANY, 1, layout=torch.sparse_coo).shape,
    "expanded": lambda: torch.zeros(1).expand(MANY, 64)[0, 0],
}


def bounded(folder: Path) -> BoundedConstruction:
    (folder / "file").write_bytes(b"x" * 1000)
    return BoundedConstruction(folder / "file", MODEL)


def values(made: Any) -> list[Any]:
    if isinstance(made, nn.Module):
        return [tensor.tolist() for tensor in made.state_dict().values()]
    return [
        part.tolist() if isinstance(part, torch.Tensor) else part
        for part in (made if isinstance(made, list) else [made])
    ]


@pytest.mark.parametrize("build", USUAL.values(), ids=USUAL)
def test_what_is_as_large_as_expected_is_built_as_ever(build: Callable[[], Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = values(build())
    torch.manual_seed(3)
    with bounded(tmp_path):
        assert values(build()) == expected


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(MANY, MANY),
        lambda: nn.Embedding(MANY, 64),
        lambda: nn.LSTM(MANY, 8),
        lambda: torch.Tensor(MANY, 64),
        lambda: torch.randn(MANY, 64),
        lambda: torch.arange(MANY * 100),
        lambda: torch.eye(MANY),
        lambda: torch.zeros(2).new_zeros(MANY, 64),
        lambda: [torch.zeros(10**7) for _ in range(MANY)],
    ],
)
def test_no_memory_is_taken_for_what_is_absurd(build: Callable[[], Any], tmp_path: Path) -> None:
    with (
        pytest.raises(TooLargeError, match=r"more than 134,\d*,\d* values .* has 1,000 bytes, and your model 6"),
        bounded(tmp_path),
    ):
        build()


def test_endless_layers_end(tmp_path: Path) -> None:
    with pytest.raises(TooLargeError, match=r"more than 10,040 tensors would be made"), bounded(tmp_path):
        nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(MANY))


def test_what_is_large_for_good_reasons_may_be(tmp_path: Path) -> None:
    """Masks and tables need not be in a file, and a file may hold only a part of the model."""
    with bounded(tmp_path):
        assert torch.ones(4096, 4096, dtype=torch.bool).tril().sum() > 0
    large = nn.Linear(2**14, 2**14, device="meta")
    with BoundedConstruction(tmp_path / "file", large):
        nn.Linear(2**14, 2**14, device="meta")
    with (tmp_path / "file").open("wb") as file:
        file.truncate(2**30)
    with BoundedConstruction(tmp_path, MODEL):
        nn.Linear(2**14, 2**14, device="meta")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"num_hidden_layers": MANY, "vocab_size": MANY}, "num_hidden_layers=1,000,000,000"),
        ({"text_config": {"n_layer": 1e300}}, "n_layer="),
        ({"num_labels": 10**7}, "num_labels=10,000,000"),
        ({"depths": [{"layers": [MANY]}]}, "layers="),
    ],
)
def test_absurd_counts_of_a_configuration_are_named(config: Any, named: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(TooLargeError, match=named):
        check_counts(path)


@pytest.mark.parametrize("text", ["", "[", "null", "3", "[" * 10**5, '{"bos_token_id": 1000000000, "num_layers": 96}'])
def test_what_is_no_count_is_left_to_others(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    check_counts(tmp_path / "config.json")


def test_a_configuration_of_absurd_length_is_left_to_others(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    check_counts(tmp_path / "config.json")
