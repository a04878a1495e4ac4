"""Files that cannot be read or are not to be trusted, and what is said of them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertModel

from com_lightning import MergeError
from com_lightning.experts.load import load_expert
from tests.helpers.classifier import Classifier
from tests.helpers.running import ROOT


class Payload:
    """Makes a folder where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.target,)


def refused(source: Any, model: Any = None) -> str:
    """The problems that an expert is refused with. They name what was given, and advise nothing unsafe."""
    with pytest.raises(MergeError) as caught:
        load_expert("a", source, model or Classifier())
    assert all(problem.startswith("expert 'a'") for problem in caught.value.problems)
    message = "\n".join(caught.value.problems)
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


def folder_of(model: Any, folder: Path, **config: Any) -> Path:
    model.save_pretrained(folder)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    return folder


# In a process that may take 3 GiB beyond what it has when all is imported, and half a minute.
LIMITED = """
import resource, sys, time
import torch
from com_lightning import MergeError
from com_lightning.experts.load import load_expert
from tests.helpers.bad_files import *
import transformers, safetensors.torch
model = WithBert() if sys.argv[2] else Classifier()
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 3 * 2**30,) * 2)
start = time.process_time()
try:
    load_expert("a", sys.argv[1], model)
except MergeError as error:
    print(str(error)[:2000])
else:
    print("loaded")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert time.process_time() - start < 30
"""


def limited(path: Path, pretrained: bool = False) -> str:
    """What loading an expert says, where there are three more GiB and half a minute for it."""
    command = [sys.executable, "-c", LIMITED, str(path), "yes" if pretrained else ""]
    done = subprocess.run(command, cwd=ROOT, timeout=300, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
