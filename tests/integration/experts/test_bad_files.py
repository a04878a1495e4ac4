"""Files that are not to be trusted, and files that cannot be read."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from com_lightning import MergeError
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.load import load_expert
from tests.helpers import Classifier
from tests.helpers.sources import NeedsWidth, Payload, as_source, only, problems, save_lightning, state_of

# Safe loading


def malicious(expert: Classifier, path: Path, folder: Path, write: Callable[[Any, Path], None]) -> Path:
    """A Lightning checkpoint with a payload among its hyperparameters."""
    content = torch.load(save_lightning(expert, path), weights_only=True)
    content["hyper_parameters"]["optimizer"] = {"betas": [0.9, Payload(folder)]}
    write(content, path)
    return path


def write_old(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("write", "told"),
    [
        (torch.save, ["mkdir", "plain values", "pass it in place of the path"]),
        (write_old, ["mkdir", "plain values"]),
        (write_pickle, ["safe loading refuses"]),
    ],
)
def test_a_payload_is_never_run(
    write: Callable[[Any, Path], None], told: list[str], pair: dict[str, Classifier], tmp_path: Path
) -> None:
    folder = tmp_path / "payload"
    path = malicious(pair["a"], tmp_path / "expert.ckpt", folder, write)
    problem = only(problems({"a": path, "b": pair["b"]}))
    assert not folder.exists()
    assert problem.startswith(f"expert 'a' ({path}): ")
    assert all(part in problem for part in told), problem
    if write is torch.save:  # the payload is a live one
        torch.load(path, weights_only=False)
        assert folder.exists()


def test_all_refused_objects_of_a_file_are_named(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "expert.ckpt"), weights_only=True)
    content["hyper_parameters"].update(data=Path("x"), activation=nn.ReLU())
    content["extra"] = [Payload(tmp_path / "payload")]
    torch.save(content, tmp_path / "expert.ckpt")
    problem = only(problems({"a": tmp_path / "expert.ckpt", "b": pair["b"]}))
    for key in ("hyper_parameters.data (pathlib", "hyper_parameters.activation (torch.nn", "extra[0] ("):
        assert key in problem
    assert "classes" not in problem
    assert not (tmp_path / "payload").exists()


def test_a_class_that_the_user_allows_is_read(pair: dict[str, Classifier], tmp_path: Path) -> None:
    """What the message advises works."""
    content = torch.load(save_lightning(pair["a"], tmp_path / "expert.ckpt"), weights_only=True)
    content["hyper_parameters"]["unused"] = type(Path())("x")
    torch.save(content, tmp_path / "expert.ckpt")
    with torch.serialization.safe_globals([type(Path())]):
        expert = load_expert("a", tmp_path / "expert.ckpt", Classifier())
    torch.testing.assert_close(state_of(expert), state_of(pair["a"]))


# Bad files


def random_bytes(expert: Classifier, folder: Path) -> Path:
    path = folder / "random.ckpt"
    path.write_bytes(bytes(torch.randint(256, (500,), generator=torch.Generator().manual_seed(0)).tolist()))
    return path


def pointer(expert: Classifier, folder: Path) -> Path:
    path = folder / "pointer.ckpt"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    return path


def empty(expert: Classifier, folder: Path) -> Path:
    (folder / "empty.ckpt").touch()
    return folder / "empty.ckpt"


def truncated(expert: Classifier, folder: Path, kind: str = "ckpt") -> Path:
    path = Path(str(as_source(kind, expert, folder)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def truncated_safetensors(expert: Classifier, folder: Path) -> Path:
    return truncated(expert, folder, "safetensors")


def missing(expert: Classifier, folder: Path) -> Path:
    return folder / "missing.ckpt"


def a_folder(expert: Classifier, folder: Path) -> Path:
    return folder


def a_list(expert: Classifier, folder: Path) -> Path:
    torch.save([1, 2], folder / "list.pt")
    return folder / "list.pt"


def no_state(expert: Classifier, folder: Path) -> Path:
    torch.save({"state_dict": "none"}, folder / "none.pt")
    return folder / "none.pt"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (missing, "no such file"),
        (a_folder, "a folder that holds no expert"),
        (random_bytes, "not a readable checkpoint"),
        (pointer, "not a readable checkpoint"),
        (empty, "not a readable checkpoint"),
        (truncated, "not a readable checkpoint"),
        (truncated_safetensors, "not a readable safetensors file"),
        (a_list, "holds a list, not a checkpoint or state dict"),
        (no_state, "holds a str, not a checkpoint or state dict"),
    ],
)
def test_a_file_that_cannot_be_read(
    make: Callable[[Classifier, Path], Path], told: str, pair: dict[str, Classifier], tmp_path: Path
) -> None:
    path = make(pair["a"], tmp_path)
    problem = only(problems({"a": path, "b": pair["b"]}))
    assert problem.startswith(f"expert 'a' ({path}): {told}"), problem
    assert "weights_only" not in problem  # PyTorch advises to load the file unsafely
    assert "\n" not in problem


def test_reading_a_checkpoint_directly_raises_too(tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="no such file"):
        read_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("kind", ["pt", "safetensors", "state dict"])
def test_keys_that_do_not_match(kind: str, pair: dict[str, Classifier], tmp_path: Path) -> None:
    """Missing and extra keys and shapes, all three at once, with the name of the expert."""
    expert = copy.deepcopy(pair["a"])
    expert.register_buffer("extra", torch.zeros(2))
    expert.head = nn.Linear(8, 7, bias=False)
    source = as_source(kind, expert, tmp_path)
    found = problems({"a": source, "b": pair["b"]})
    assert all(p.startswith("expert 'a'") for p in found), found
    assert all(str(source) in p for p in found if kind != "state dict")
    gone, extra, shape = found
    assert "missing keys: head.bias" in gone
    assert "does not have: extra" in extra
    assert "Classifier" in extra
    assert "head.weight is (7, 8), in the model (3, 8); give a Lightning checkpoint" in shape


def test_many_keys_are_summarised(pair: dict[str, Classifier]) -> None:
    gone, extra = problems({"a": {f"x.{n}": torch.zeros(1) for n in range(9)}, "b": pair["b"]})
    assert "and 3 more" in gone
    assert "x.4 and 4 more" in extra


def test_a_value_that_is_no_tensor(pair: dict[str, Classifier]) -> None:
    problem = only(problems({"a": {**pair["a"].state_dict(), "head.bias": 3}, "b": pair["b"]}))
    assert "head.bias is int, in the model (3,)" in problem


@pytest.mark.parametrize("source", [None, 3])
def test_a_source_that_is_none(source: Any, pair: dict[str, Classifier]) -> None:
    assert "neither a file, a folder, a module nor a state dict" in only(problems({"a": source, "b": pair["b"]}))


def test_hyperparameters_that_cannot_rebuild_the_class(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "a.ckpt"), weights_only=True)
    del content["hyper_parameters"]
    torch.save(content, tmp_path / "a.ckpt")
    problem = only(problems({"a": tmp_path / "a.ckpt", "b": NeedsWidth(8)}, model=NeedsWidth(8)))
    assert f"expert 'a' ({tmp_path / 'a.ckpt'}): NeedsWidth cannot be rebuilt from its hyperparameters" in problem
    assert "width" in problem


def test_hyperparameters_of_other_shapes_than_the_weights(pair: dict[str, Classifier], tmp_path: Path) -> None:
    content = torch.load(save_lightning(pair["a"], tmp_path / "a.ckpt"), weights_only=True)
    content["hyper_parameters"]["classes"] = 5
    torch.save(content, tmp_path / "a.ckpt")
    problem = only(problems({"a": tmp_path / "a.ckpt", "b": pair["b"]}))
    assert "cannot be rebuilt" in problem
    assert "head.weight" in problem
    assert "\n" not in problem
