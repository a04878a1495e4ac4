"""What is shared and what is private, and what the model and its experts have to agree on."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from com_lightning import MergeError
from com_lightning.experts.parameters import sort_parameters


class Language(LightningModule):
    """An embedding, and a head that may be the same tensor."""

    def __init__(self, tied: bool, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.body, self.head = nn.Embedding(7, 3), nn.Linear(3, 3), nn.Linear(3, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight


@pytest.mark.parametrize("private", [[], ["embedding", "head"]])
def test_a_class_that_ties_what_experts_keep_apart_is_an_error(private: list[str]) -> None:
    experts = {"a": Language(False, 1), "b": Language(False, 2)}
    with pytest.raises(MergeError, match=r"head.weight and embedding.weight are one .*tie_word_embeddings"):
        sort_parameters(Language(True), experts, private)


def test_a_model_that_keeps_apart_what_experts_tie_does_no_harm() -> None:
    experts = {"a": Language(True, 1), "b": Language(True, 2)}
    assert "head.weight" in sort_parameters(Language(False), experts, []).shared
