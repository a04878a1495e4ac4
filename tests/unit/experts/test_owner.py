"""An expert as it is loaded, against what its class loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.errors import collected_warnings
from com_lightning.experts import owner
from com_lightning.experts.load import load_expert
from com_lightning.experts.owner import compare_with_owner
from tests.helpers import FEATURES, Classifier, make_experts
from tests.helpers.running import save_lightning


def test_a_plain_checkpoint(tmp_path: Path) -> None:
    path = save_lightning(make_experts()[0], tmp_path / "a.ckpt")
    (check,) = compare_with_owner("expert 'a'", path, load_expert("a", path, Classifier()), Classifier())
    assert check == f"expert 'a' ({path}): Classifier.load_from_checkpoint gives the same tensors and settings"
    torch.save(make_experts()[0].state_dict(), tmp_path / "a.pt")
    assert not compare_with_owner("expert 'a'", tmp_path / "a.pt", Classifier(), Classifier())
    assert not compare_with_owner("expert 'a'", Classifier(), Classifier(), Classifier())


def test_a_large_one_is_not_compared_and_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "LARGEST", 10)
    path = save_lightning(make_experts()[0], tmp_path / "a.ckpt")
    (check,) = compare_with_owner("expert 'a'", path, Classifier(), Classifier())
    assert "not compared" in check


def test_what_differs_is_named(tmp_path: Path) -> None:
    path = save_lightning(make_experts()[0], tmp_path / "a.ckpt")
    expert: Any = load_expert("a", path, Classifier())
    expert.body[0].weight.data += 1
    expert.body[1].eps = 1.0
    model, before = Classifier(), torch.get_rng_state()
    with collected_warnings() as warnings:
        compare_with_owner("expert 'a'", path, expert, model)
    assert "other values of body.0.weight; body.1.eps is 1.0 in this merge and 1e-05 in that module" in warnings[0]
    assert torch.equal(torch.get_rng_state(), before)


class Referring(Classifier):
    """It refers to a weight by a list, too, and ties two others."""

    def __init__(self, classes: int = 3, width: int = FEATURES) -> None:
        super().__init__(classes, width)
        self.weights: list[Any] = [self.body[0].weight]
        self.body[3].weight = self.body[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body[1:](nn.functional.linear(x, self.weights[0])))  # type: ignore[no-any-return]


def test_whatever_refers_to_a_weight_sees_that_of_the_file(tmp_path: Path) -> None:
    path = save_lightning(Referring(), tmp_path / "a.ckpt")
    content: Any = torch.load(path, weights_only=True)
    content["state_dict"]["body.3.weight"] = content["state_dict"]["body.3.weight"] + 1
    torch.save(content, path)
    with collected_warnings() as warnings:
        expert: Any = load_expert("a", path, Referring())
    loaded: Any = Referring.load_from_checkpoint(path, weights_only=True)
    assert expert.weights[0] is expert.body[0].weight is expert.body[3].weight
    assert torch.equal(expert.body[0].weight, loaded.body[0].weight)
    assert any("body.0.weight and body.3.weight differ" in warning for warning in warnings)
