"""Files that mean harm by their size: loading them may take three GiB more, and half a minute."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch

from tests.helpers import Classifier
from tests.helpers.bad_files import bert, folder_of, limited, safetensors_file
from tests.helpers.broken import lightning


def test_a_million_names(tmp_path: Path) -> None:
    header = {f"layer.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10**6)}
    path = safetensors_file(tmp_path / "many.safetensors", json.dumps(header).encode())
    assert str(path) in limited(path)


def bomb(path: Path, count: int = 5) -> Path:
    """An archive of few megabytes that unpacks to some gigabytes."""
    torch.save(Classifier().state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            if not name.endswith("data.pkl"):
                archive.writestr(name, data)
        with archive.open(next(n for n in entries if n.endswith("data.pkl")), "w", force_zip64=True) as stream:
            stream.write(b"\x80\x02")
            for _ in range(count * 64):
                stream.write(b"N0" * 2**23)  # None, and pop it
    return path


def test_an_archive_that_explodes_is_refused(tmp_path: Path) -> None:
    assert "an archive that unpacks to" in limited(bomb(tmp_path / "x.ckpt"))
    folder = folder_of(bert(), tmp_path / "x")
    (folder / "model.safetensors").unlink()
    (tmp_path / "x.ckpt").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin: an archive that unpacks to" in limited(folder, pretrained=True)


def test_tensors_that_claim_more_than_there_is_are_refused(tmp_path: Path) -> None:
    huge = torch.zeros(1).expand(10**10)
    state = Classifier().state_dict()
    torch.save({**state, "head.bias": huge}, tmp_path / "x.pt")
    assert "head.bias claims 10,000,000,000 values" in limited(tmp_path / "x.pt")
    torch.save({**lightning(Classifier()), "state_dict": {"head.bias": huge}}, tmp_path / "x.ckpt")
    assert "head.bias claims" in limited(tmp_path / "x.ckpt")


def test_an_index_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    folder = folder_of(bert(), tmp_path / "x")
    for name in ("model.safetensors.index.json", "config.json"):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        with (folder / name).open("wb") as file:
            file.truncate(10 * 2**30)  # takes no room on the disk
        assert f"{name} has 10,737,418,240 bytes" in limited(folder, pretrained=True)
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    (folder / "config.json").write_text("[" * 10**6)
    assert "config.json cannot be read" in limited(folder, pretrained=True)
