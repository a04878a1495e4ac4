"""Files that cannot be read or are not to be trusted, and what is said of them."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from com_lightning import MergeError
from com_lightning.experts.load import load_expert
from tests.helpers.classifier import Classifier


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def refused(source: Any, model: Any = None) -> str:
    """The one problem that an expert is refused with. It names what was given, and advises nothing unsafe."""
    with pytest.raises(MergeError) as caught:
        load_expert("a", source, model or Classifier())
    (message,) = caught.value.problems
    assert message.startswith("expert 'a'")
    assert not isinstance(source, (str, Path)) or str(source) in message
    assert "weights_only" not in message  # PyTorch advises to load the file unsafely
    return message


def safetensors_file(path: Path, header: bytes, length: int | None = None, data: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def bert() -> Any:
    return BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )


class WithBert(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net = bert()
