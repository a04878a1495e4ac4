"""``com-lightning export`` of adapters: those of a merge, and a LoRA of a merged model over its base."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

from com_lightning import ChainOfMerges, MergeError
from com_lightning.cli import main
from com_lightning.results.adapter_export import export_adapters, export_lora, refused_by_engines
from com_lightning.results.model_card import adapters_card
from tests.helpers import perturb
from tests.helpers.texts import expert_folder, make_bert, merge, save_tokenizer

LOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
base = AutoModelForSequenceClassification.from_pretrained("base")
model = PeftModel.from_pretrained(base, "reviews", adapter_name="reviews")
model.load_adapter("spam", adapter_name="spam")
ids, results = torch.load("../ids.pt"), {}
for task in ("reviews", "spam"):
    model.set_adapter(task)
    results[task] = model.eval()(ids).logits.detach()
torch.save(results, "../results.pt")
assert "com_lightning" not in sys.modules and AutoTokenizer.from_pretrained("base").vocab_size > 5
"""


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a merge with corrections of low rank, and its modules."""
    folder = tmp_path_factory.mktemp("merged")
    experts: dict[str, Any] = {t: expert_folder(folder / t, seed) for seed, t in enumerate(("reviews", "spam"))}
    save_tokenizer(experts["reviews"])
    make_bert().save_pretrained(folder / "base")
    method = ChainOfMerges(task_rank=2)
    callback = merge(experts, method=method, private=["net.classifier"], output_dir=str(folder / "result"))
    return folder, callback.modules


def test_a_fresh_process_with_peft_alone_gives_the_outputs(merged: Any, tmp_path: Path) -> None:
    folder, modules = merged
    with pytest.warns(
        UserWarning, match=r"reviews, spam: engines such as vLLM do not load biases, which it changes at"
    ):
        main(["export", str(folder / "result"), "--adapters", "--output_dir", str(tmp_path / "out")])
    ids = torch.randint(5, 30, (3, 6))
    torch.save(ids, tmp_path / "ids.pt")
    subprocess.run([sys.executable, "-c", LOAD], check=True, cwd=tmp_path / "out")
    with torch.no_grad():
        for task, logits in torch.load(tmp_path / "results.pt").items():
            torch.testing.assert_close(logits, modules[task].net.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    for task in modules:
        settings = json.loads((tmp_path / "out" / task / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tmp_path / "out" / "base")
    card = (tmp_path / "out" / "spam" / "README.md").read_text()
    assert "library_name: peft" in card
    assert "ChainOfMerges" in card
    assert "modules that the adapter replaces as a whole: bert.embeddings.LayerNorm, bert.encoder.layer.*." in card
    assert 'model.load_adapter("spam"' in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*engines such as vLLM")
def test_options(merged: Any, tmp_path: Path) -> None:
    out = export_adapters(merged[0] / "result", tmp_path / "out", "spam", "bfloat16", "me/base")
    assert not (out / "reviews").exists()
    for path in (out / "base" / "model.safetensors", out / "spam" / "adapter_model.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
    assert json.loads((out / "spam" / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/base"


@pytest.mark.filterwarnings("ignore:.*(stay as in the base|engines such as vLLM)")
def test_a_lora_says_how_much_it_has_and_what_it_lacks(merged: Any, tmp_path: Path, capsys: Any) -> None:
    folder, modules = merged
    common = ["export", str(folder / "result"), "--base", str(folder / "base"), "--task", "spam"]
    main([*common, "--rank", "4", "--output_dir", str(tmp_path / "out")])
    told, card = capsys.readouterr().out, (tmp_path / "out" / "README.md").read_text()
    sentence = next(line for line in told.splitlines() if "squared difference" in line)
    assert sentence in card
    assert "These layers stay as in the base: bert.embeddings.word_embeddings, bert" in sentence
    base: Any = BertForSequenceClassification.from_pretrained(folder / "base", local_files_only=True)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "out")).merge_and_unload()
    left = total = 0.0
    for name, tensor in modules["spam"].net.state_dict().items():
        left += float((tensor - loaded.state_dict()[name]).square().sum())
        total += float((tensor - before[name]).square().sum())
    assert f"it has {100 * (1 - left / total):.1f} %" in sentence
    assert 0.5 < 1 - left / total < 0.99


@pytest.mark.filterwarnings("ignore:.*(stay as in the base|engines such as vLLM)")
def test_a_full_rank_is_the_model(tmp_path: Path) -> None:
    """With biases, which leaves no place for factors of tables, or else with tables and without biases."""
    base = make_bert()
    model = perturb(copy.deepcopy(base), 0.1, seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embeddings" in name and "Norm" not in name:
                parameter.copy_(base.get_parameter(name))
    base.save_pretrained(tmp_path / "base")
    adapter = export_lora(model, tmp_path / "out", tmp_path / "base", 16)
    assert adapter.kept > 1 - 1e-6
    assert not adapter.left_out
    same_up_to_rounding(tmp_path, model)
    only = export_lora(model, tmp_path / "only", tmp_path / "base", 16, lora_only=True)
    assert not refused_by_engines(tmp_path / "only")
    assert not only.whole
    assert any("LayerNorm" in name for name in only.left_out)
    assert only.kept < adapter.kept


def same_up_to_rounding(folder: Path, model: nn.Module) -> None:
    base: Any = BertForSequenceClassification.from_pretrained(folder / "base", local_files_only=True)
    loaded, ids = PeftModel.from_pretrained(base, str(folder / "out")).eval(), torch.randint(5, 30, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*(stay as in the base|engines such as vLLM)")
def test_tables_without_biases_are_factored(tmp_path: Path) -> None:
    base = make_bert()
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn(len(parameter), 1) @ torch.randn(1, parameter.shape[1]))
    base.save_pretrained(tmp_path / "base")
    adapter = export_lora(model, tmp_path / "out", tmp_path / "base", 1)
    assert "bert.embeddings.word_embeddings" in adapter.factors
    assert adapter.kept > 1 - 1e-6
    same_up_to_rounding(tmp_path, model)


@pytest.mark.filterwarnings("ignore:.*(stay as in the base|engines such as vLLM)")
def test_a_head_that_the_base_lacks_is_written_whole(tmp_path: Path) -> None:
    """It is random in every base that is loaded."""
    model = perturb(make_bert(), 0.1, seed=1)
    make_bert(kind=BertForMaskedLM).save_pretrained(tmp_path / "base")
    adapter = export_lora(model, tmp_path / "out", tmp_path / "base", 4)
    assert {"classifier", "bert.pooler.dense"} <= {*adapter.whole}
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    head = next(tensor for name, tensor in stored.items() if name.endswith("classifier.weight"))
    assert torch.equal(head, model.get_parameter("classifier.weight"))


def test_tied_weights_are_left_out_by_an_approximation(tmp_path: Path) -> None:
    model = perturb(make_bert(kind=BertForMaskedLM), 0.1, seed=1)
    base = make_bert(kind=BertForMaskedLM)
    with pytest.warns(UserWarning, match=r"stay as in the base: .*bert.embeddings.word_embeddings"):
        adapter = export_lora(model, tmp_path / "out", base, 4, lora_only=True)
    assert "cls.predictions.decoder" not in adapter.factors


def test_what_is_wrong_is_told_before_anything_is_written(merged: Any, tmp_path: Path) -> None:
    folder, _ = merged
    result, out = folder / "result", tmp_path / "out"
    cases: list[tuple[list[str], str]] = [
        (["--rank", "0", "--base", str(folder / "base")], "rank: must be 1 or more, got 0"),
        (["--rank", "2"], "rank: needs --base, the model that the experts were fine-tuned from"),
        (["--rank", "2", "--base", str(tmp_path)], "has no config.json; name the folder of the model that was fine-tu"),
        (["--rank", "2", "--base", str(result / "adapters" / "spam")], "is an adapter; name the folder of the model"),
        (["--rank", "2", "--base", str(folder / "base")], "name a task"),
        (["--adapters", "--task", "other"], "task: .* has adapters of reviews, spam, and none of 'other'"),
        (["--adapters", "--base", str(folder / "base")], "base: of --adapters lies in the folder of the merge"),
        (["--lora_only"], "lora_only: is for --rank"),
        (["--base_name", "me/base"], "base_name: is for adapters"),
    ]
    for options, message in cases:
        with pytest.raises(SystemExit, match=message):
            main(["export", str(result), "--output_dir", str(out), *options])
    with pytest.raises(MergeError, match="no adapters are in it; merge with task_rank"):
        export_adapters(folder / "base", out)
    with pytest.raises(MergeError, match="is not the folder of a merge"):
        export_adapters(folder / "nothing", out)
    config = copy.deepcopy(make_bert().config)
    config.hidden_size = 8
    with pytest.raises(MergeError, match="is another model than the BertModel"):
        export_lora(BertModel(config), out, folder / "base", 2)
    with pytest.raises(MergeError, match="the model is equal to its base"):
        export_lora(make_bert(), out, folder / "base", 2)
    assert not out.exists()
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", "[]", "adapter_config.json"),
        ("adapter_config.json", '{"peft_type": "MADE_UP"}', "adapters of type MADE_UP are not merged"),
        ("adapter_model.safetensors", None, "has no adapter_model.safetensors"),
    ],
)
def test_damaged_adapters(name: str, content: str | None, message: str, merged: Any, tmp_path: Path) -> None:
    path = merged[0] / "result" / "adapters" / "spam" / name
    before = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_text(content)
        with pytest.raises(MergeError, match=message):
            export_adapters(merged[0] / "result", tmp_path / "out")
    finally:
        path.write_bytes(before)


def test_a_base_that_is_a_checkpoint_is_for_peft_alone(tmp_path: Path) -> None:
    (tmp_path / "adapters" / "a").mkdir(parents=True)
    (tmp_path / "adapters" / "a" / "adapter_config.json").write_text("{}")
    (tmp_path / "adapters" / "base.ckpt").write_text("")
    with pytest.raises(MergeError, match=r"adapters is as PEFT loads it; engines .* serve transformers models alone"):
        export_adapters(tmp_path, tmp_path / "out")


def test_a_causal_language_model_with_plain_adapters_can_be_served() -> None:
    card = adapters_card("LlamaForCausalLM", ["a", "b"], 12, is_plain=True)
    assert "vllm serve base --enable-lora --max-lora-rank 16 --lora-modules a=a b=b" in card
    assert "vllm" not in adapters_card("LlamaForCausalLM", ["a", "b"], 12, is_plain=False)


def test_factors_of_convolutions_are_told(tmp_path: Path) -> None:
    base = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 16, 3)))
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.get_parameter("stem.weight").add_(0.1)
    with pytest.warns(UserWarning, match="engines such as vLLM do not load factors of convolutions: stem"):
        export_lora(model, tmp_path / "out", base, 1)
