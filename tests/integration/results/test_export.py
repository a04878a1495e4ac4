"""``com-lightning export``: a folder for ``from_pretrained``, without the user's class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from com_lightning import MergeError
from com_lightning.cli import main
from com_lightning.results.export import export
from tests.helpers import perturb
from tests.helpers.running import save_lightning
from tests.helpers.texts import TextModule, expert_folder, make_bert, merge, same, save_tokenizer


def save(module: Any, path: Path) -> Path:
    save_lightning(module, path)
    return path


def read(folder: Path) -> nn.Module:
    model: nn.Module = BertForSequenceClassification.from_pretrained(folder, local_files_only=True)
    return model


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, Any]:
    folders = {task: expert_folder(tmp_path / task, seed) for seed, task in enumerate(("reviews", "spam"))}
    save_tokenizer(folders["reviews"])
    return {**folders}


@pytest.mark.parametrize("private", [[], ["net.classifier"]])
def test_of_a_merge(private: list[str], experts: dict[str, Any], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    callback = merge(experts, private=private, output_dir=str(merged))
    task = ["--task", "reviews"] if private else []
    main(["export", str(merged), "--output_dir", str(tmp_path / "out"), *task])
    same(read(tmp_path / "out"), callback.modules["reviews"].net)  # type: ignore[arg-type]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").vocab_size > 5
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "BertForSequenceClassification.from_pretrained" in card
    assert "Chain of Merges" in card  # what is told of the merge goes along
    assert "load_from_checkpoint" not in card
    assert "report.html" not in card  # which is not there


def test_a_task_has_to_be_named_where_models_differ(experts: dict[str, Any], tmp_path: Path) -> None:
    merge(experts, private=["net.classifier"], output_dir=str(tmp_path / "merged"))
    for task in (None, "other"):
        with pytest.raises(MergeError, match=r"merged/transformers/reviews, .*merged/transformers/spam; name a task"):
            export(tmp_path / "merged", tmp_path / "out", task)
    assert not (tmp_path / "out").exists()


def test_of_a_checkpoint(experts: dict[str, Any], tmp_path: Path) -> None:
    module = TextModule()
    perturb(module, 0.1, seed=3)
    path = save(module, tmp_path / "further.ckpt")
    export(path, tmp_path / "out", base=experts["reviews"])
    same(read(tmp_path / "out"), module.net)


def test_of_a_checkpoint_with_adapters(experts: dict[str, Any], tmp_path: Path) -> None:
    module = TextModule()
    module.net = get_peft_model(make_bert(), LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(MergeError, match=r"the weights of a PeftModel .* export the folder of the merge"):
        export(save(module, tmp_path / "expert.ckpt"), tmp_path / "out", base=experts["spam"])


def test_of_a_model_that_its_class_would_not_load_alone(tmp_path: Path) -> None:
    """Without the pooler that the class has by default, which no configuration tells."""
    net: Any = BertModel(make_bert().config, add_pooling_layer=False)
    net.save_pretrained(tmp_path / "net", max_shard_size="5KB")
    export(tmp_path / "net", tmp_path / "out", precision="float16")
    settings: dict[str, Any] = {"add_pooling_layer": False, "output_loading_info": True, "dtype": "auto"}
    loaded: Any = BertModel.from_pretrained(tmp_path / "out", **settings)
    again, told = loaded
    assert not told["missing_keys"]
    assert {value.dtype for value in again.parameters()} == {torch.float16}
    torch.testing.assert_close(again.state_dict(), net.half().state_dict())


def test_precision(experts: dict[str, Any], tmp_path: Path) -> None:
    model = read(export(experts["spam"], tmp_path / "out", precision="bfloat16"))
    assert {value.dtype for value in model.parameters()} <= {torch.bfloat16, torch.float32}
    from safetensors.torch import load_file

    assert {v.dtype for v in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}


def test_chat_templates_go_along(experts: dict[str, Any], tmp_path: Path) -> None:
    inner = experts["spam"] / "additional_chat_templates"
    inner.mkdir()
    (inner / "tools.jinja").write_text("hello")
    (experts["spam"] / "tekken.json").write_text("null")  # no configuration of transformers
    for name, precision in (("same", None), ("half", "float16")):
        out = export(experts["spam"], tmp_path / name, precision=precision)
        assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "hello"
        assert (out / "tekken.json").read_text() == "null"


def test_a_generation_config_that_transformers_refuses_is_no_obstacle(tmp_path: Path) -> None:
    def model() -> Any:
        return GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1, n_positions=9))

    base, net = model(), model()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.7}')
    torch.save(net.state_dict(), tmp_path / "x.pt")
    written: Any = GPT2LMHeadModel.from_pretrained(export(tmp_path / "x.pt", tmp_path / "out", base=tmp_path / "base"))
    torch.testing.assert_close(written.state_dict(), net.state_dict())
    assert written.generation_config.temperature == 0.7


def test_links_that_lead_out_are_not_published(experts: dict[str, Any], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(experts, private=[], output_dir=str(merged))
    secret = tmp_path / "secret"
    for name in ("model.safetensors", "tokenizer.json", "notes.txt", "config.json", "README.md"):
        path = merged / "transformers" / name
        exists = path.exists()
        path.rename(secret) if exists else secret.write_text("{}")
        path.symlink_to(secret)
        for source in (merged, merged / "transformers"):
            with pytest.raises(MergeError, match=f"{name} is a link that leads out of the folder"):
                export(source, tmp_path / "out")
        path.unlink()
        if exists:
            secret.rename(path)
    assert not (tmp_path / "out").exists()


def test_a_card_or_a_folder_that_is_a_link_is_not_followed(experts: dict[str, Any], tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    merge(experts, private=[], output_dir=str(merged))
    (merged / "README.md").rename(tmp_path / "secret.md")
    (merged / "README.md").symlink_to(tmp_path / "secret.md")
    assert "Chain of Merges" not in (export(merged, tmp_path / "out") / "README.md").read_text()
    (merged / "transformers").rename(tmp_path / "secret")
    (merged / "transformers").symlink_to(tmp_path / "secret")
    with pytest.raises(MergeError, match="transformers is a link that leads out"):
        export(merged, tmp_path / "other")


def test_a_folder_without_weights_is_not_published(experts: dict[str, Any], tmp_path: Path) -> None:
    """As older versions left it behind where transformers refused to write a model."""
    (experts["spam"] / "model.safetensors").unlink()
    with pytest.raises(MergeError, match="spam: has no weights, only a configuration; give a checkpoint"):
        export(experts["spam"], tmp_path / "out")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (experts["spam"] / "model.safetensors.index.json").write_text(json.dumps(index))
    (experts["spam"] / "model-1.safetensors").write_text("")
    with pytest.raises(MergeError, match=r"names weights that are not there: model-2.safetensors"):
        export(experts["spam"], tmp_path / "out")


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"[" * 100_000, b"\xff", b"", b"{"])
def test_configurations_that_are_none(content: bytes, experts: dict[str, Any], tmp_path: Path) -> None:
    """They are refused before anything is written, also of a base."""
    (experts["spam"] / "config.json").write_bytes(content)
    torch.save(make_bert().state_dict(), tmp_path / "x.pt")
    for source, base in ((experts["spam"], None), (tmp_path / "x.pt", experts["spam"])):
        with pytest.raises(MergeError, match=r"spam: config.json (holds|cannot be read)"):
            export(source, tmp_path / "out", base=base, precision="float16")


def test_odd_configurations_can_be_copied(experts: dict[str, Any], tmp_path: Path) -> None:
    odd: list[Any] = [[[]], {}, None, 3]
    for number, names in enumerate(odd):
        (experts["spam"] / "config.json").write_text(json.dumps({"architectures": names, "metadata": 3}))
        assert (export(experts["spam"], tmp_path / str(number), precision="float16") / "README.md").is_file()


def test_all_that_is_wrong_is_told(experts: dict[str, Any], tmp_path: Path) -> None:
    path = save(TextModule(), tmp_path / "further.ckpt")
    (tmp_path / "out").mkdir()
    with pytest.raises(MergeError) as caught:
        export(path, tmp_path / "out", precision="int4")
    told = caught.value.problems
    assert [problem.split(":")[0] for problem in told] == ["output_dir", "precision", "base"]
    with pytest.raises(SystemExit, match="no transformers model is in it"):
        main(["export", str(tmp_path / "out"), "--output_dir", str(tmp_path / "other")])
    other = make_bert()
    other.config.num_labels = 5
    type(other)(other.config).save_pretrained(tmp_path / "wide")
    with pytest.raises(MergeError, match=r"classifier.weight is \(3, 16\), in the model \(5, 16\)"):
        export(path, tmp_path / "other", base=tmp_path / "wide")
    torch.save({"x": torch.zeros(2)}, tmp_path / "x.pt")
    with pytest.raises(MergeError, match=r"BertForSequenceClassification .* lacks bert.embeddings"):
        export(tmp_path / "x.pt", tmp_path / "other", base=experts["spam"])
    assert not (tmp_path / "other").exists()
    assert not list(tmp_path.glob(".*partial"))
