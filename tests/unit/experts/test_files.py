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
from com_lightning.experts.files import folder_problems, leads_out, read_checkpoint, read_json
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
    "sharded by PyTorch": (files(".metadata"), "not a readable sharded checkpoint"),
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


# Folders

LINKED = ["tokenizer.json", "config.json", "model.safetensors", "additional_chat_templates/x.jinja", "notes.txt"]


def model_folder(folder: Path) -> Path:
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("tokenizer.json", "config.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("target", ["/etc/hostname", "../secret.json", "../missing", "../own-secrets"])
def test_links_that_lead_out_of_a_folder_are_refused(name: str, target: str, tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "own")
    for secret in ("secret.json", "own-secrets"):
        (tmp_path / secret).write_text("secret")
    (folder / name).unlink(missing_ok=True)
    target = f"../{target}" if "/" in name and target.startswith("..") else target
    (folder / name).symlink_to(target)
    assert leads_out(folder / name, folder)
    (told,) = folder_problems(folder)
    assert told == f"{name} is a link that leads out of the folder, to {target}; put the file itself there"


def test_links_that_stay_in_a_folder_are_followed(tmp_path: Path) -> None:
    """However the folder is reached. Folders that are not read may be anywhere."""
    folder = model_folder(tmp_path / "own")
    (folder / "special.json").symlink_to("config.json")
    (folder / "added_tokens.json").symlink_to(folder / "tokenizer.json")
    (folder / "nothing.json").symlink_to("missing.json")
    (folder / "runs").symlink_to(tmp_path)
    (tmp_path / "latest").symlink_to("own")
    assert not folder_problems(folder)
    assert not folder_problems(tmp_path / "latest")
    (folder / "additional_chat_templates").rmdir()
    (folder / "additional_chat_templates").symlink_to(tmp_path)
    assert "additional_chat_templates is a link that leads out" in folder_problems(folder)[0]


def test_the_cache_of_the_hub_is_all_links(tmp_path: Path) -> None:
    """To the files of the same model, and of no other."""
    for model in ("models--me--a", "models--me--b"):
        (tmp_path / model / "blobs").mkdir(parents=True)
        (tmp_path / model / "blobs" / "123").write_text("{}")
    folder = model_folder(tmp_path / "models--me--a" / "snapshots" / "c0ffee")
    (folder / "model.json").symlink_to("../../blobs/123")
    (folder / "additional_chat_templates" / "x.jinja").symlink_to("../../../blobs/123")
    assert not folder_problems(folder)
    (folder / "other.json").symlink_to("../../../models--me--b/blobs/123")
    assert ["other.json" in problem for problem in folder_problems(folder)] == [True]
    (folder / "other.json").unlink()
    (tmp_path / "models--me--a" / "blobs").rename(tmp_path / "elsewhere")
    (tmp_path / "models--me--a" / "blobs").symlink_to(tmp_path / "elsewhere")
    assert len(folder_problems(folder)) == 2


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to itself"])
def test_what_stands_in_place_of_a_configuration(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    (tmp_path / "model.safetensors").write_text("")
    make: dict[str, Callable[[], object]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "link to nothing": lambda: path.symlink_to("nothing"),
        "link to itself": lambda: path.symlink_to("config.json"),
    }
    make[kind]()
    assert "config.json is no file beside model.safetensors" in refused(tmp_path)


def test_special_files_in_a_folder_are_not_opened(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "own")
    os.mkfifo(folder / "vocab.txt")
    os.mkfifo(folder / "additional_chat_templates" / "x.jinja")
    (folder / "zero.json").symlink_to("/dev/zero")
    told = folder_problems(folder)
    assert [problem.split(" is ")[0] for problem in told] == [
        "additional_chat_templates/x.jinja",
        "vocab.txt",
        "zero.json",
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[]", "x.json holds a list, not an object"),
        (b"null", "x.json holds null, not an object"),
        (b"3", "x.json holds a number, not an object"),
        (b'"x"', "x.json holds text, not an object"),
        (b"[" * 100_000, "x.json cannot be read (RecursionError: "),
        (b'{"a":' * 100_000, "x.json cannot be read (RecursionError: "),
        (b"\xff{}", "x.json cannot be read (UnicodeDecodeError: "),
        (b"{", "x.json cannot be read (JSONDecodeError: "),
        (b"[" + b"9" * 5000 + b"]", "x.json cannot be read (ValueError: "),
    ],
)
def test_configurations_that_are_none(content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(MergeError) as caught:
        read_json(tmp_path / "x.json")
    assert caught.value.problems[0].startswith(told)
