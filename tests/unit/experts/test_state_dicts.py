"""Keys that older versions saved: what the module does not need is left out and told of, anything else is an error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from com_lightning import MergeError
from com_lightning.errors import collected_warnings
from com_lightning.experts.load import load_expert
from com_lightning.experts.state_dicts import fill
from tests.helpers import perturb
from tests.helpers.running import save_lightning
from tests.helpers.texts import TextModule, make_bert


class Scaled(nn.Module):
    """Computes a table that it does not save."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("scale", torch.arange(3.0), persistent=False)


def test_a_buffer_that_is_no_longer_saved_is_left_out() -> None:
    state = {**Scaled().state_dict(), "scale": torch.arange(3.0)}
    with collected_warnings() as told:
        fill(Scaled(), state, "expert 'a'")
    (warning,) = told
    assert warning.startswith(
        "expert 'a': scale are left out: older versions saved them, and Scaled computes them itself"
    )


@pytest.mark.parametrize("value", [torch.arange(3.0) + 1, torch.arange(4.0), 3])
def test_a_buffer_of_another_value_is_an_error(value: Any) -> None:
    """The module would not compute with it."""
    with pytest.raises(
        MergeError, match="keys that Scaled does not have: scale; if it does not need them, give its state"
    ):
        fill(Scaled(), {**Scaled().state_dict(), "scale": value}, "expert 'a'")


OLD: dict[str, Tensor] = {
    "net.bert.embeddings.position_ids": torch.arange(12)[None],
    "net.bert.position_ids": torch.arange(512)[None],  # where and how long it once was
}


@pytest.mark.parametrize("form", ["checkpoint", "state dict", "part"])
def test_files_of_older_versions_of_transformers(form: str, tmp_path: Path) -> None:
    expert: Any = perturb(TextModule(), 0.1, seed=1)
    state = copy.deepcopy(expert.state_dict())
    norms = [name for name in state if "LayerNorm" in name]
    for name in norms:
        old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        state[old] = state.pop(name)
    assert len(norms) == 10
    source: Any = {**state, **OLD}
    if form == "part":
        source = {name.removeprefix("net."): value for name, value in source.items()}
    if form == "checkpoint":
        path = save_lightning(expert, tmp_path / "a.ckpt")
        content = torch.load(path, weights_only=True)
        torch.save({**content, "state_dict": source}, path)
        source = path
    with collected_warnings() as told:
        loaded = load_expert("a", source, TextModule())
    torch.testing.assert_close(loaded.state_dict(), expert.state_dict(), rtol=0, atol=0)
    (warning,) = told
    assert "position_ids are left out" in warning


def test_what_a_class_declares_to_ignore() -> None:
    net = make_bert()
    net._keys_to_ignore_on_load_unexpected = {"old_head"}
    with collected_warnings() as told:
        fill(net, {**net.state_dict(), "old_head.weight": torch.zeros(2)}, "x")
    assert ["old_head.weight are left out" in warning for warning in told] == [True]


class Own(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_x", self.net(batch).mean())


def test_other_keys_are_an_error_that_helps(tmp_path: Path) -> None:
    """It is not the hyperparameters: the module can be made of them."""
    path = save_lightning(Own(), tmp_path / "a.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["teacher.weight"] = torch.zeros(2)
    torch.save(content, path)
    with pytest.raises(MergeError) as caught:
        load_expert("a", path, Own())
    assert caught.value.problems == [
        f"expert 'a' ({path}): keys that Own does not have: teacher.weight; if it does not need them, give its state "
        "dict without them, or drop them in its on_load_checkpoint"
    ]


class Dropping(Own):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"].pop("teacher.weight", None)


def test_the_advice_works(tmp_path: Path) -> None:
    expert: Any = perturb(Own(), 0.1, seed=1)
    path = save_lightning(expert, tmp_path / "a.ckpt")
    content = torch.load(path, weights_only=True)
    content["state_dict"]["teacher.weight"] = torch.zeros(2)
    torch.save(content, path)
    torch.testing.assert_close(load_expert("a", path, Dropping()).state_dict(), expert.state_dict())
