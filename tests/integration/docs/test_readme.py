"""The README's code and the example with adapters run, and no page is too long or too wide."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from tests.helpers import perturb
from tests.helpers.classifier import Classifier, make_data, make_experts
from tests.helpers.running import save_lightning
from tests.helpers.texts import make_bert, save_tokenizer

ROOT = Path(__file__).parents[3]


def test_the_code_in_the_readme(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for task, expert in zip(("mnist", "digits"), make_experts((3, 3))):
        save_lightning(expert, tmp_path / f"{task}.ckpt")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {"model": Classifier(), "MNISTData": lambda: make_data(0), "DigitsData": lambda: make_data(1)}
    exec(code, names)
    assert "| mean " in capsys.readouterr().out
    Classifier.load_from_checkpoint(tmp_path / "merged" / "merged.ckpt", weights_only=True)


def test_the_example_with_adapters(tmp_path: Path) -> None:
    blocks = re.findall(
        r"```python\n# (\w+\.py).*?\n(.*?)```", (ROOT / "docs" / "lora_and_transformers.md").read_text(), re.DOTALL
    )
    files = dict(blocks)
    assert list(files) == ["text.py", "merge.py"]
    files["text.py"], count = re.subn(r'BASE = ".*?"', 'BASE = "base"', files["text.py"])
    assert count == 1
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    make_bert(2).save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    for number, task in enumerate(("reviews", "spam")):
        settings = LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
        net = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tmp_path / "base"), settings)
        perturb(net, 0.1, seed=number)
        net.save_pretrained(str(tmp_path / task / "adapter"))
        lines = [f"word{n} word{n + 1},{n % 2}" for n in range(20)]
        (tmp_path / task / "texts.csv").write_text("\n".join(["text,label", *lines]))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "merge.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "val_acc" in done.stdout
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged" / "transformers" / "spam")


def test_the_readme_is_read_in_a_minute() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_no_line_is_too_wide() -> None:
    for path in (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))):
        text = re.sub(r"^```text\n.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
        wide = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert not wide, path
