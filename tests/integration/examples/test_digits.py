"""The demo: its script names files that are there, and its merges come side by side in one table."""

from __future__ import annotations

import re
from pathlib import Path

from com_lightning import MergeReport
from examples.digits.side_by_side import side_by_side

ROOT = Path(__file__).parents[3]


def test_several_merges_in_one_table(tmp_path: Path) -> None:
    for name, accuracy in {"merged": 0.6, "adapters": 0.78}.items():
        found = {"expert": (0.8, 0.8), "average": (0.2, 0.4), "merged": (accuracy, 0.8)}
        report = MergeReport(tasks=["a", "b"], monitor="acc")
        report.metrics = {model: {"a": {"acc": a}, "b": {"acc": b}} for model, (a, b) in found.items()}
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(report.to_json())
    text = side_by_side([tmp_path / "merged", tmp_path / "adapters"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert rows[0] == ["task", "expert", "average", "merged", "adapters"]
    assert rows[2:] == [
        ["a", "0.8000", "0.2000", "0.6000", "0.7800"],
        ["b", "0.8000", "0.4000", "0.8000", "0.8000"],
        ["mean", "0.8000", "0.3000", "0.7000", "0.7900"],
        ["of expert", "100.0 %", "37.5 %", "87.5 %", "98.8 %"],
    ]


def test_the_script_names_files_that_are_there() -> None:
    script = (ROOT / "examples" / "digits" / "demo.sh").read_text()
    named = set(re.findall(r"configs/[\w/]+\.yaml", script.replace("$configs", "configs/digits")))
    assert {"configs/digits/merge.yaml", "configs/accurate.yaml", "configs/adapters.yaml"} <= named
    for name in named:
        assert (ROOT / name).is_file(), name
