"""The example of CLIP and eight tasks: all its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from com_lightning.cli import main
from tests.helpers import NAMES_OF_5
from tests.helpers.clip import QUIET, config, data_options, make_hub, make_images, tiny_clip

pytestmark = pytest.mark.skipif(not NAMES_OF_5, reason="CLIP's parts are models of their own from transformers 5 on")


def test_all_rules_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_hub(tiny_clip(tmp_path / "base"), tmp_path, monkeypatch)
    images = make_images(tmp_path / "images")
    out = tmp_path / "rules"
    options = [config("tasks.yaml"), config("vit-b-32.yaml"), *data_options(images), *QUIET, "--data.num_samples=8"]
    main(["compare", *options, config("rules.yaml"), f"--output_dir={out}"])
    report = json.loads((out / "report.json").read_text())
    assert len(report["methods"]) == 17, report["methods"]
