"""The report as a web page, and the model card."""

from __future__ import annotations

import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from com_lightning import TIES, ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergeOptions, MergeReport
from com_lightning.results.html import html_report, with_code
from com_lightning.results.model_card import model_card, pretrained_card
from com_lightning.results.origins import Origin, origin_of
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
def merger(tmp_path_factory: pytest.TempPathFactory) -> ChainOfMergesCallback:
    made = tmp_path_factory.mktemp("result") / "merged"
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), output_dir=str(made))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    quiet_trainer(callbacks=[merger]).validate(Classifier(), datamodule=tasks, verbose=False)
    return merger


@pytest.fixture
def folder(merger: ChainOfMergesCallback) -> Path:
    assert merger.options.output_dir is not None
    return Path(merger.options.output_dir)


def test_a_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    page = Page()
    page.feed((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 2  # so that a phone shows them one below the other
    for told in (
        "Merge of 2 experts with ChainOfMerges",
        "One model of",
        "merged / expert",
        "body.0",
        "calibration samples",
        'Classifier.load_from_checkpoint("a.ckpt", weights_only=True)',
        "com_lightning.merge(model, experts, datamodule, method=ChainOfMerges(), output_dir=",
        "Classifier in memory",
    ):
        assert told in page.text


def test_a_notebook_shows_the_report_without_scripts(merger: ChainOfMergesCallback) -> None:
    page = Page()
    text = merger.result._repr_html_()
    page.feed(text)
    assert page.open == []
    assert "<script" not in text
    assert merger.report.headline in page.text
    assert text.index(merger.report.headline) < text.index("<table") < text.index("<img") < text.index("<details")
    assert "body.0" in text.partition("<details")[2]
    assert MergeReport()._repr_html_() == "<p>Nothing has been merged yet.</p>"


def test_options_and_what_is_between_backticks_are_code() -> None:
    told = with_code("a < b: `merge(x)` (--config accurate), or give --overwrite to it")
    assert told == (
        'a &lt; b: <code>merge(x)</code> (<code class="option">--config accurate</code>), '
        'or give <code class="option">--overwrite</code> to it'
    )


def test_everything_prints_its_settings() -> None:
    assert repr(ChainOfMerges(task_rank=4)) == "ChainOfMerges(task_rank=4)"
    callback = ChainOfMergesCallback({"a": "a.ckpt", "b": Classifier()}, TIES(density=0.1), output_dir="out")
    expected = "ChainOfMergesCallback({'a': 'a.ckpt', 'b': ...}, TIES(density=0.1), output_dir='out')"
    assert repr(callback) == expected
    assert repr(MergeOptions()) == "MergeOptions()"


def test_what_is_not_ours_is_escaped() -> None:
    merger = ChainOfMergesCallback({})
    merger.report.tasks = ["<script>alert(1)</script>"]
    merger.report.warnings = ["a < b & c"]
    merger.report.command = "<script>alert(2)</script>"
    merger.report.origins = {"a": Origin("<script>alert(3)</script>")}
    merger.report.metrics = {"merged": {merger.report.tasks[0]: {"val_acc": 1.0}}}
    merger.report.choose_monitor()
    text = html_report(merger.report)
    assert "<script>alert" not in text
    assert "a &lt; b &amp; c" in text


def test_the_card_tells_the_hub_and_people(folder: Path) -> None:
    _, front, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    about = yaml.safe_load(front)
    assert "merge" in about["tags"]
    assert {"base_model", "license", "pipeline_tag", "model-index"}.isdisjoint(about)  # nothing is invented
    assert "No license is set" in body
    assert "](report.png)" in body
    assert "- **a**: Classifier in memory, `tests.helpers.classifier.Classifier`, 16 calibration samples" in body
    assert 'Classifier.load_from_checkpoint("a.ckpt", weights_only=True)' in body
    assert "from tests.helpers.classifier import Classifier" in body
    assert "2508.21421" in body


def test_the_card_says_what_the_experts_cards_agree_on(tmp_path: Path) -> None:
    """As the Hub's own library reads it."""
    report = MergeReport({"class": "TIES"}, ["a", "b", "c"])
    for task, pipeline in {"a": "text-classification", "b": "text-generation"}.items():
        (tmp_path / task).mkdir()
        card = f"---\nbase_model: owner/base\nlicense: mit\npipeline_tag: {pipeline}\n---\n# {task}\n"
        (tmp_path / task / "README.md").write_text(card)
    report.origins = {task: origin_of(tmp_path / task, tmp_path / task) for task in "ab"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    report.origins["c"] = origin_of("hf://owner/expert@main", tmp_path)
    text = model_card(report, ["report.png"], {})
    about = yaml.safe_load(text.split("---\n")[1])
    assert about["base_model"] == ["owner/base", "owner/expert"]
    assert about["base_model_relation"] == "merge"
    assert about["license"] == "mit"
    assert "pipeline_tag" not in about
    assert "[owner/expert](https://huggingface.co/owner/expert)" in text
    assert str(tmp_path / "a") in text
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(text).data.to_dict() == about
    exported = pretrained_card("BertModel", "a", text, task="a")
    assert "# a: the model of one task, from 3 models in one: a, b, c\n" in exported
    assert "report.png" not in exported
    assert hub.ModelCard(exported).data.base_model == about["base_model"]


@pytest.mark.parametrize("text", ["", "---\n", "---\n- 1\n---\n", "---\na: [\n---\n", "---\nlicense: [a]\n---\n", "\0"])
def test_odd_cards_of_experts_say_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "adapter_config.json").write_text("[]")
    assert origin_of(tmp_path, tmp_path) == Origin(str(tmp_path))


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,1600"]
    subprocess.run([*command, f"--screenshot={picture}", (folder / "report.html").as_uri()], check=True, timeout=120)
    assert picture.stat().st_size > 10_000
