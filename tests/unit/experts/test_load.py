"""Experts that do not fit the model: all that is wrong is told at once, with the name of the expert."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from com_lightning import MergeError
from com_lightning.experts.load import load_expert
from tests.helpers import Classifier
from tests.helpers.bad_files import refused
from tests.helpers.running import save_lightning
from tests.helpers.sources import NeedsWidth, as_source, state_of


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state dict"])
def test_keys_that_do_not_match(kind: str, pair: dict[str, Classifier], tmp_path: Path) -> None:
    """Missing and extra keys and shapes, all three at once."""
    expert = copy.deepcopy(pair["a"])
    expert.register_buffer("extra", torch.zeros(2))
    expert.head = nn.Linear(8, 7, bias=False)
    source = as_source(kind, expert, tmp_path)
    with pytest.raises(MergeError) as caught:
        load_expert("a", source, Classifier())
    found = caught.value.problems
    assert all(p.startswith("expert 'a'") for p in found), found
    assert all(str(source) in p for p in found if kind != "state dict")
    gone, extra, shape = found
    assert "missing keys: head.bias" in gone
    assert "does not have: extra" in extra
    assert "Classifier" in extra
    assert "head.weight is (7, 8), in the model (3, 8); give a Lightning checkpoint" in shape


def test_many_keys_are_summarised() -> None:
    with pytest.raises(MergeError) as caught:
        load_expert("a", {f"x.{n}": torch.zeros(1) for n in range(9)}, Classifier())
    gone, extra = caught.value.problems
    assert "and 3 more" in gone
    assert "x.4 and 4 more" in extra


def test_hyperparameters_that_cannot_rebuild_the_class(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "a.ckpt"), weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "a.ckpt")
    message = refused(tmp_path / "a.ckpt", NeedsWidth(8))
    assert f"expert 'a' ({tmp_path / 'a.ckpt'}): NeedsWidth cannot be rebuilt from its hyperparameters" in message
    assert "width" in message


def test_a_class_that_the_user_allows_is_read(pair: dict[str, Classifier], tmp_path: Path) -> None:
    """What the message advises works."""
    content = torch.load(save_lightning(pair["a"], tmp_path / "expert.ckpt"), weights_only=True)
    content["hyper_parameters"]["unused"] = type(Path())("x")
    torch.save(content, tmp_path / "expert.ckpt")
    with torch.serialization.safe_globals([type(Path())]):
        expert = load_expert("a", tmp_path / "expert.ckpt", Classifier())
    torch.testing.assert_close(state_of(expert), state_of(pair["a"]))
