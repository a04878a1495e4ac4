"""The notebook: its cells run, and what is stored is what they show."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from docs.site.hooks import notebook_page
from examples.notebook.build import NOTEBOOK, executed


def kinds(notebook: dict[str, Any]) -> list[list[str]]:
    """What each cell shows: printed text, or the forms of its value."""
    outputs = [cell.get("outputs", []) for cell in notebook["cells"]]
    return [[kind for output in shown for kind in output.get("data", {"text": ""})] for shown in outputs]


def test_its_cells_run_and_show_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    ran = executed(stored)
    assert kinds(ran) == kinds(stored)
    for notebook in (ran, stored):
        last = [cell for cell in notebook["cells"] if cell.get("outputs")][-1]["outputs"][0]["text"]
        assert last[-1] == "the same outputs as in memory: True\n"
        cell = next(cell for cell in notebook["cells"] if cell["id"] == "values")
        shares = re.findall(r"(\d+)%", "".join(cell["outputs"][0]["text"]))
        assert int(shares[0]) + 20 < int(shares[1])  # what the notebook is to show
    assert "/tmp" not in NOTEBOOK.read_text(encoding="utf-8")


def test_the_site_shows_all_of_it() -> None:
    text = NOTEBOOK.read_text(encoding="utf-8")
    page = notebook_page(text)
    for cell in json.loads(text)["cells"]:
        assert "".join(cell["source"]) in page
    assert '<div class="com-page">' in page
    assert "the same outputs as in memory" in page
