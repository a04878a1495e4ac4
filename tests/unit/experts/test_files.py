"""What cannot be read as an expert, each with the message that says why. What means harm: test_hostile.py."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from com_lightning import MergeError
from com_lightning.experts.files import read_checkpoint
from tests.helpers import Classifier
from tests.helpers.bad_files import refused, safetensors_file
from tests.helpers.running import save_lightning

Make = Callable[[Path], Any]
STATE = Classifier().state_dict()
SAFETENSORS = save(STATE)


def _with_key(key: str, folder: Path) -> Any:
    return {**STATE, key: torch.zeros(2)}


def file(name: str, content: bytes = b"") -> Make:
    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return folder / name

    return make


def files(*names: str, give: str = "") -> Make:
    """Empty files, in a folder, and the path in it that is given as the expert."""

    def make(folder: Path) -> Path:
        for name in names:
            file(name)(folder)
        return folder / give

    return make


def saved(content: Any, **how: Any) -> Make:
    def make(folder: Path) -> Path:
        torch.save(content, folder / "x.pt", **how)
        return folder / "x.pt"

    return make


def header(content: Any, length: int | None = None) -> Make:
    """A safetensors file of some header and eight bytes."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda folder: safetensors_file(folder / "x.safetensors", text, length, bytes(8))


def lightning(change: Callable[[dict[str, Any]], object]) -> Make:
    """A Lightning checkpoint of which something was changed."""

    def make(folder: Path) -> Path:
        content = torch.load(path := save_lightning(Classifier(), folder / "x.ckpt"), weights_only=True)
        change(content)
        torch.save(content, path)
        return path

    return make


def half(folder: Path) -> Path:
    path = save_lightning(Classifier(), folder / "x.ckpt")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def pipe(name: str) -> Make:
    def make(folder: Path) -> Path:
        os.mkfifo(folder / name)
        return folder / name

    return make


def link(name: str, target: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).symlink_to(target)
        return folder / name

    return make


def directory(name: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).mkdir()
        return folder / name

    return make


def tensor(**entry: Any) -> Make:
    """A safetensors file whose header has this entry."""
    return header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}})


UNREADABLE = "not a readable checkpoint"
UNREADABLE_SAFETENSORS = "not a readable safetensors file"
ADAPTERS = [f"{name}/adapter_{file}" for name in ("one", "two") for file in ("config.json", "model.safetensors")]
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"

BAD: dict[str, tuple[Make, str]] = {
    # Nothing there
    "missing": (lambda folder: folder / "x.ckpt", "no such file"),
    "missing, of a similar name": (files("mnist.ckpt", give="mnsit.ckpt"), "did you mean {folder}/mnist.ckpt?"),
    "missing, with its folder": (lambda folder: folder / "none" / "x.ckpt", "nor is there a folder"),
    "a name too long": (lambda folder: folder / ("x" * 5000), ""),
    "a dangling link": (link("x.safetensors", "nowhere"), ""),
    "a link to itself": (link("x.ckpt", "x.ckpt"), ""),
    # No file
    "none": (lambda folder: None, "neither a file, a folder, a module nor a state dict"),
    "a number": (lambda folder: 3, "neither a file, a folder, a module nor a state dict"),
    "a pipe": (pipe("x.ckpt"), "neither a file nor a folder"),
    "a safetensors pipe": (pipe("x.safetensors"), "neither a file nor a folder"),
    "a device": (lambda folder: Path("/dev/zero"), "neither a file nor a folder"),
    # Folders
    "a folder": (lambda folder: folder, "a folder that holds no expert"),
    "a folder like a checkpoint": (directory("x.ckpt"), ""),
    "a folder like a safetensors file": (directory("x.safetensors"), ""),
    "a folder of experts": (files(*ADAPTERS), "a folder of experts; give one of them: {folder}/one, {folder}/two"),
    "an adapter's file": (
        files(*ADAPTERS, give="one/adapter_model.safetensors"),
        "this is the file of a PEFT adapter; give its folder, {folder}/one",
    ),
    "an adapter without settings": (
        files("adapter_model.safetensors"),
        "adapter_config.json is missing beside adapter_model.safetensors",
    ),
    "sharded by PyTorch": (files(".metadata"), "a sharded checkpoint; make it one file with .*consolidate_checkpoint"),
    "sharded by DeepSpeed": (files("checkpoint/x"), "a sharded checkpoint; make it one file with .*deepspeed"),
    "a folder of transformers": (lambda folder: file("config.json", b"{")(folder).parent, "config.json cannot be read"),
    # No checkpoint
    "empty": (file("x.ckpt"), UNREADABLE),
    "empty, without a suffix": (file("x"), ""),
    "random bytes": (file("x.ckpt", bytes(i * 37 % 256 for i in range(500))), UNREADABLE),
    "a pointer of Git LFS": (file("x.ckpt", POINTER), UNREADABLE),
    "half of one": (half, UNREADABLE),
    "a list": (saved([1, 2]), "holds a list, not a checkpoint or state dict"),
    "no state": (saved({"state_dict": "none"}), "holds a str, not a checkpoint or state dict"),
    # No safetensors
    **{
        f"{size} bytes of a safetensors file": (file("x.safetensors", SAFETENSORS[:size]), UNREADABLE_SAFETENSORS)
        for size in (0, 1, 8, 40, len(SAFETENSORS) // 2, len(SAFETENSORS) - 1)
    },
    "a header of 10 GiB": (header(b"{}", 10 * 2**30), UNREADABLE_SAFETENSORS),
    "a header of 2^64": (header(b"{}", 2**64 - 1), UNREADABLE_SAFETENSORS),
    "a header of depth": (header(b'{"a":' * 100000), UNREADABLE_SAFETENSORS),
    "tensors that overlap": (
        header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}),
        UNREADABLE_SAFETENSORS,
    ),
    "a negative shape": (tensor(shape=[-2]), UNREADABLE_SAFETENSORS),
    "a tensor outside": (tensor(shape=[2**60], data_offsets=[0, 2**62]), UNREADABLE_SAFETENSORS),
    "a header that is a list": (header([]), UNREADABLE_SAFETENSORS),
    "a header that is text": (header("x"), UNREADABLE_SAFETENSORS),
    "an entry that is a number": (header({"a": 5}), UNREADABLE_SAFETENSORS),
    # Values that do not fit
    "a value that is no tensor": (lambda folder: {**STATE, "head.bias": 3}, "head.bias is int, in the model (3,)"),
    "hyperparameters of other shapes": (
        lightning(lambda content: content["hyper_parameters"].update(classes=5)),
        "cannot be rebuilt from its hyperparameters .*head.weight",
    ),
    **{
        f"the state dict of a PeftModel, {key}": (
            partial(_with_key, key),
            f"the state dict of a PeftModel ({key}).*merge_and_unload()",
        )
        for key in ("base_model.model.body.0.weight", "body.0.base_layer.weight", "body.0.lora_A.d.weight")
    },
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read(name: str, tmp_path: Path) -> None:
    make, expected = BAD[name]
    message = refused(make(tmp_path))
    assert "\n" not in message
    for part in expected.replace("{folder}", str(tmp_path)).split(".*"):
        assert part in message, message


def test_a_missing_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    expected = f"expert 'a' (mnits.ckpt): no such file in the working directory, {tmp_path}; did you mean mnist"
    assert expected in refused("mnits.ckpt")


def test_reading_a_checkpoint_directly_raises_too(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_link_to_a_good_file_is_read(tmp_path: Path) -> None:
    saved(STATE)(tmp_path)
    assert read_checkpoint(link("link.pt", "x.pt")(tmp_path))
