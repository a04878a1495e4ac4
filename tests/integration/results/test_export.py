"""``com-lightning export``: a folder for ``from_pretrained``, without the user's class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel

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
