"""A small causal language model on bytes, and experts on four kinds of text.

The base is pretrained on three of them: speeches, quotations and mails. Python source code is new to it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, TensorDataset
from torchmetrics.text import Perplexity
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.suites import texts
from benchmarks.suites.modules import OneCycle
from benchmarks.suites.splits import SplitData, first_of_each, split
from benchmarks.suites.suite import Recipe, Suite

LENGTH = 128  # bytes of a sequence
MIXTURE = ("speeches", "quotations", "mails")
SIZES = {"train": 20_000, "val": 1024, "test": 512}  # sequences at most
SHARE = 0.1  # of the documents, for val and for test


class LanguageModel(OneCycle):
    """A Llama on bytes; logs ``val_perplexity`` and ``test_perplexity``, per byte."""

    def __init__(
        self,
        width: int = 128,
        blocks: int = 4,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.2,
    ) -> None:
        super().__init__(learning_rate, weight_decay, warmup)
        self.save_hyperparameters()
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=11 * width // 4,
            num_hidden_layers=blocks,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.net = LlamaForCausalLM(config)
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of the bytes that follow all but the last."""
        logits: Tensor = self.net(input_ids=tokens[:, :-1], use_cache=False).logits
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]).flatten(0, 1), batch[0][:, 1:].flatten())
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.val_perplexity(self(batch[0]), batch[0][:, 1:])
        self.log("val_perplexity", self.val_perplexity, batch_size=len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.test_perplexity(self(batch[0]), batch[0][:, 1:])
        self.log("test_perplexity", self.test_perplexity, batch_size=len(batch[0]))


@cache
def kind_splits(kind: str) -> dict[str, Tensor]:
    """Sequences of bytes. A document is in one split only, and no document or sequence is in twice."""
    documents = texts.KINDS[kind]()
    unique = [index for index in first_of_each([texts.normalized(text) for text in documents]) if documents[index]]
    share = max(int(SHARE * len(unique)), 1)
    parts = split(kind, len(unique), share, share)
    splits: dict[str, Tensor] = {}
    seen: set[bytes] = set()
    for name in ("test", "val", "train"):  # test comes first, so that duplicates in train are removed
        content = "\n\n".join(documents[unique[number]] for number in parts[name]).encode()
        cut = [content[start : start + LENGTH] for start in range(0, len(content) - LENGTH + 1, LENGTH)]
        new = [cut[index] for index in first_of_each(cut) if cut[index] not in seen]
        seen.update(new)
        order = torch.randperm(len(new), generator=torch.Generator().manual_seed(0))[: SIZES[name]].tolist()
        rows = bytearray(b"".join(new[index] for index in order))
        splits[name] = torch.frombuffer(rows, dtype=torch.uint8).view(-1, LENGTH).long()
    return splits


class KindData(SplitData):
    """Sequences of one or several kinds of text."""

    def __init__(self, *kinds: str, batch_size: int = 32, eval_batch_size: int = 64) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.kinds = kinds

    def make_split(self, name: str) -> Dataset[Any]:
        return ConcatDataset([TensorDataset(kind_splits(kind)[name]) for kind in self.kinds])


class LM4(Suite):
    """Four kinds of text."""

    name = "lm4"
    title = "Four kinds of text, causal language model"
    tasks = tuple(texts.KINDS)
    metric = "perplexity"
    lower_is_better = True
    private = ()
    not_applicable: ClassVar[Mapping[str, str]] = {
        **Suite.not_applicable,
        "ada_merging": "it minimises the entropy of a classifier",
    }
    base_recipe = Recipe(steps=1000, batch_size=16, learning_rate=3e-3)
    recipe = Recipe(steps=250, batch_size=16, learning_rate=1e-3)

    def base_module(self) -> LightningModule:
        return LanguageModel(**(self.base_recipe or self.recipe).optimizer())

    def base_data(self) -> LightningDataModule:
        return KindData(*MIXTURE, batch_size=(self.base_recipe or self.recipe).batch_size)

    def expert_module(self, task: str, base: LightningModule) -> LightningModule:
        expert = LanguageModel(**self.expert_recipe(task).optimizer())
        expert.load_state_dict(base.state_dict())
        return expert

    def data(self, task: str) -> KindData:
        return KindData(task, batch_size=self.expert_recipe(task).batch_size)

    def settings(self) -> dict[str, Any]:
        # One kind of text is the source code of Python's library, which depends on the version.
        return {**super().settings(), "sizes": SIZES, "mixture": MIXTURE, "python": platform.python_version()}
