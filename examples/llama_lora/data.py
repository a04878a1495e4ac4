"""Texts of one task, of which a part may be given and the rest is to be predicted."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

IGNORED = -100
"""The label of what is not to be predicted: prompts, and padding."""


def read_texts(path: Path) -> list[tuple[str, str]]:
    """Prompts and completions, one pair a line: JSON with ``prompt`` and ``completion``, or ``text``; or plain text."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if path.suffix != ".jsonl":
        return [("", line) for line in lines]
    rows = [json.loads(line) for line in lines]
    return [(row.get("prompt", ""), row["completion"] if "completion" in row else row["text"]) for row in rows]


class TextData(LightningDataModule):
    """Texts of one task, tokenised and padded."""

    def __init__(self, base: str, train: str, val: str, length: int = 512, batch_size: int = 16) -> None:
        """Describe the data of one task.

        Args:
            base: whose tokenizer it is.
            train: see :func:`read_texts`.
            val: likewise.
            length: most tokens of a text; longer ones are cut.
            batch_size: of all loaders.
        """
        super().__init__()
        self.base, self.paths = base, {"train": Path(train), "val": Path(val)}
        self.length, self.batch_size = length, batch_size
        self.splits: dict[str, list[dict[str, Tensor]]] = {}

    def setup(self, stage: str | None = None) -> None:
        """Tokenise."""
        if not self.splits:
            self.tokenizer = AutoTokenizer.from_pretrained(self.base)
            self.splits = {
                split: [self._encoded(*row) for row in read_texts(path)] for split, path in self.paths.items()
            }

    def _encoded(self, prompt: str, completion: str) -> dict[str, Tensor]:
        given = self.tokenizer(prompt)["input_ids"]
        wanted = [*self.tokenizer(completion, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        ids, labels = [*given, *wanted], [*([IGNORED] * len(given)), *wanted]
        return {"input_ids": torch.tensor(ids[: self.length]), "labels": torch.tensor(labels[: self.length])}

    def collate(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Pad on the right, and say where there is text."""
        ids = pad_sequence([row["input_ids"] for row in rows], True, self.tokenizer.eos_token_id)
        labels = pad_sequence([row["labels"] for row in rows], True, IGNORED)
        mask = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True, 0)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _loader(self, split: str, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(self.splits[split], self.batch_size, shuffle, collate_fn=self.collate)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches."""
        return self._loader("val")
