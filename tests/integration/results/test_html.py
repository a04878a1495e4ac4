"""The report as a web page, and the model card."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from com_lightning import ChainOfMergesCallback, MergeDataModule
from com_lightning.results.html import html_report
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a page holds; complains of elements that are not closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("result") / "merged"
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), output_dir=str(made))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    quiet_trainer(callbacks=[merger]).validate(Classifier(), datamodule=tasks, verbose=False)
    return made


def test_a_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 1
    for told in ("Merge of 2 experts with ChainOfMerges", "merged / expert", "body.0", "calibration samples"):
        assert told in page.text


def test_what_is_not_ours_is_escaped(folder: Path) -> None:
    merger = ChainOfMergesCallback({})
    merger.report.tasks = ["<script>alert(1)</script>"]
    merger.report.warnings = ["a < b & c"]
    merger.report.metrics = {"merged": {merger.report.tasks[0]: {"val_acc": 1.0}}}
    merger.report.choose_monitor()
    text = html_report(merger.report)
    assert "<script>" not in text
    assert "a &lt; b &amp; c" in text


def test_the_card_tells_the_hub_and_people(folder: Path) -> None:
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(front)
    results = about["model-index"][0]["results"]
    assert "merge" in about["tags"]
    assert [result["dataset"]["name"] for result in results] == ["a", "b"]
    assert all(0 <= result["metrics"][0]["value"] <= 1 for result in results)
    assert 'Classifier.load_from_checkpoint("a.ckpt", weights_only=True)' in body
    assert "from tests.helpers.classifier import Classifier" in body
    assert "2508.21421" in body


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
    subprocess.run([*command, f"--screenshot={picture}", (folder / "report.html").as_uri()], check=True, timeout=120)
    assert picture.stat().st_size > 10_000
