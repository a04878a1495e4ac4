"""The example of LoRA experts of a causal language model: from texts to a merged model that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from com_lightning.cli import main
from examples.llama_lora import tiny, train
from examples.llama_lora.data import IGNORED, TextData, read_texts
from examples.llama_lora.model import CausalLM
from tests.helpers import quiet_trainer

ROOT = Path(__file__).parents[3]
OUT = Path("outputs") / "llama_lora"


def test_tasks_have_no_line_twice(tmp_path: Path) -> None:
    tiny.write_texts(tmp_path)
    for task in tiny.TASKS:
        parts = [read_texts(tmp_path / task / f"{split}.jsonl") for split in ("train", "val")]
        prompts = [prompt for part in parts for prompt, _ in part]
        assert len(set(prompts)) == len(prompts) == len(tiny.lines(task))
        assert len(parts[1]) == tiny.VAL
    assert [tiny.plural(noun) for noun in ("wug", "dax", "boy", "fash")] == ["wugs", "daxes", "boys", "fashes"]


def test_only_completions_are_predicted_and_padding_is_masked(tmp_path: Path) -> None:
    tiny.byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"prompt": "ab", "completion": "c"}\n{"text": "defghi"}\n')
    (tmp_path / "a.txt").write_text("xy\n\nz\n")
    data = TextData(str(tmp_path), str(tmp_path / "a.jsonl"), str(tmp_path / "a.txt"), length=6)
    data.setup()
    batch = data.collate(data.splits["train"])
    start, end = data.tokenizer.bos_token_id, data.tokenizer.eos_token_id
    assert batch["input_ids"][:, 0].tolist() == [start, start]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]  # the longer one is cut
    assert batch["labels"][0].tolist()[:3] == [IGNORED] * 3
    assert batch["labels"][0].tolist()[3:] == [*batch["input_ids"][0].tolist()[3:4], end, IGNORED]
    assert data.tokenizer.decode(batch["labels"][1][1:]) == "defgh"
    assert [len(row["input_ids"]) for row in data.splits["val"]] == [4, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base, adapters and merged model, made by the example's own commands in a fresh folder."""
    folder = tmp_path_factory.mktemp("llama")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["pytest"])
        tiny.main(["--steps", "30"])
        for task in tiny.TASKS:
            files = ["--base", f"{OUT / 'base'}", "--data", f"{OUT / 'texts' / task}"]
            settings = ["--steps", "15", "--learning_rate", "3e-3", "--rank", "4"]
            train.main([*files, "--output", f"{OUT / 'adapters' / task}", *settings])
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.num_samples=48"]
        main(["merge", "--config", str(ROOT / "examples" / "llama_lora" / "merge.yaml"), *quiet])
        yield folder


def test_experts_are_the_base_with_their_adapters(folder: Path) -> None:
    """And their perplexity does not depend on how they are padded."""
    report = json.loads((folder / OUT / "merged" / "report.json").read_text())
    base, texts = str(folder / OUT / "base"), folder / OUT / "texts" / "dates"
    module = CausalLM(base)
    data = TextData(base, str(texts / "train.jsonl"), str(texts / "val.jsonl"), batch_size=1)
    before = quiet_trainer().validate(module, data, verbose=False)[0]["val_perplexity"]
    module.net = PeftModel.from_pretrained(module.net, str(folder / OUT / "adapters" / "dates"))
    expert = quiet_trainer().validate(module, data, verbose=False)[0]["val_perplexity"]
    assert expert == pytest.approx(report["metrics"]["expert"]["dates"]["val_perplexity"], rel=1e-3)
    assert expert < before


def test_the_merged_model_writes_in_a_fresh_process(folder: Path) -> None:
    made = folder / OUT / "merged"
    module = CausalLM.load_from_checkpoint(made / "merged.ckpt", weights_only=True)
    loaded: Any = AutoModelForCausalLM.from_pretrained(made / "transformers")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in module.net.state_dict().items())
    prompts = ["3 July 1998 =", "one wug, two", "7 + 5 ="]
    expected: list[Any] = []
    for prompt in prompts:
        tokens = module.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        written = module.net.eval().generate(**tokens, max_new_tokens=12, do_sample=False)
        expected.append(module.tokenizer.decode(written[0], skip_special_tokens=True))
    command = [sys.executable, "-m", "examples.llama_lora.generate", str(made / "transformers"), *prompts]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, "--tokens", "12"], env=environment, cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == "\n".join(expected).splitlines()
    assert all(line.startswith(prompt) and len(line) > len(prompt) for line, prompt in zip(expected, prompts))
