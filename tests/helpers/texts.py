"""Tiny text models of transformers, their folders, tokenizers and data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerBase,
)

from com_lightning import ChainOfMergesCallback, MergeDataModule, TaskLoaders
from com_lightning.experts.load import ExpertSource
from tests.helpers.classifier import perturb
from tests.helpers.running import quiet_trainer

WORDS = [f"word{number}" for number in range(25)]


def make_bert(labels: int = 3, vocabulary: int = 30, kind: Any = BertForSequenceClassification, **kwargs: Any) -> Any:
    """The body is the same whatever the labels and the class."""
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = BertConfig(vocab_size=vocabulary, max_position_embeddings=12, intermediate_size=32, **sizes, **kwargs)
    body: Any = BertModel(config)
    config = copy.deepcopy(body.config)
    config.num_labels = labels
    if kind is BertModel:
        return body.eval()
    model = kind(config).eval()
    model.bert.load_state_dict(body.state_dict(), strict=False)
    return model


class TextModule(LightningModule):
    """A user's module around a transformers model."""

    def __init__(self, labels: int = 3, vocabulary: int = 30, tokenizer: Any = None) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="tokenizer")
        self.net: Any = make_bert(labels, vocabulary)
        self.tokenizer = tokenizer

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(ids, attention_mask=ids > 0).logits  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out = self.net(batch["ids"], attention_mask=batch["ids"] > 0)
        self.log("val_mean", out.logits.mean())


def make_texts(seed: int, vocabulary: int = 30, count: int = 24) -> TaskLoaders:
    ids = torch.randint(5, vocabulary, (count, 6), generator=torch.Generator().manual_seed(seed))
    return TaskLoaders(val=DataLoader([{"ids": row} for row in ids], batch_size=8))  # type: ignore[arg-type]


def expert_folder(folder: Path, seed: int, **kwargs: Any) -> Path:
    torch.manual_seed(seed)
    model = perturb(make_bert(**kwargs), 0.1, seed=seed)
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def save_tokenizer(folder: Path, words: list[str] = WORDS) -> PreTrainedTokenizerBase:
    """A tokenizer of whole words, read from the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokenizer.save_pretrained(folder)
    return tokenizer


def merge(
    sources: dict[str, ExpertSource], model: LightningModule | None = None, vocabulary: int = 30, **kwargs: Any
) -> ChainOfMergesCallback:
    data = MergeDataModule({t: make_texts(number, vocabulary) for number, t in enumerate(sources)}, num_samples=16)
    callback = ChainOfMergesCallback(sources, **{"baselines": False, **kwargs})
    quiet_trainer(callbacks=[callback]).validate(model or TextModule(), datamodule=data, verbose=False)
    return callback


def same(actual: nn.Module, expected: nn.Module) -> None:
    ids = torch.randint(5, 30, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(actual.eval()(ids).logits, expected.eval()(ids).logits, rtol=0, atol=0)
