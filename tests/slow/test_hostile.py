"""A file that means harm by its size alone."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.bad_files import limited, safetensors_file


def test_a_million_names(tmp_path: Path) -> None:
    header = {f"layer.{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(10**6)}
    path = safetensors_file(tmp_path / "many.safetensors", json.dumps(header).encode())
    assert str(path) in limited(path)
