"""Folders of transformers' save_pretrained: experts in, the merged model out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
)

from com_lightning import (
    Average,
    ChainOfMerges,
    ChainOfMergesCallback,
    MergeDataModule,
    MergeError,
    MergeTrainer,
)
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.errors import collected_warnings
from com_lightning.experts.load import load_expert
from com_lightning.experts.transformers_models import save_model, writing_warnings
from com_lightning.plan import make_plan
from com_lightning.results.folder import load_results
from tests.helpers import NAMES_OF_5, perturb
from tests.helpers.texts import TextModule, expert_folder, make_bert, make_texts, merge, same, save_tokenizer

# In


def test_a_folder_is_an_expert(tmp_path: Path) -> None:
    folder = expert_folder(tmp_path / "a", 1)
    expert = load_expert("a", str(folder), TextModule())
    assert isinstance(expert, TextModule)
    same(expert.net, BertForSequenceClassification.from_pretrained(folder))


def test_a_sharded_folder_is_an_expert(tmp_path: Path) -> None:
    model = perturb(make_bert(), seed=1)
    model.save_pretrained(tmp_path, max_shard_size="5KB")  # type: ignore[operator]
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    same(load_expert("a", tmp_path, TextModule()).net, model)  # type: ignore[arg-type]


def test_a_folder_without_a_head_is_put_where_it_fits(tmp_path: Path) -> None:
    folder = expert_folder(tmp_path / "a", 1, kind=BertModel)
    with pytest.warns(UserWarning, match=r"is taken for net.bert; net.classifier.weight, net.classifier.bias stay"):
        expert = load_expert("a", folder, TextModule())
    torch.testing.assert_close(
        expert.get_submodule("net.bert").state_dict(), BertModel.from_pretrained(folder).state_dict()
    )


def test_what_is_left_of_all_experts_is_told_once(tmp_path: Path) -> None:
    folders = {task: str(expert_folder(tmp_path / task, seed, kind=BertModel)) for seed, task in enumerate("abc")}
    plan = make_plan(TextModule(), folders, None, Average())
    (told,) = [warning for warning in plan.parameters.warnings if "is taken for" in warning]
    assert told.startswith("expert 'a', expert 'b', expert 'c': is taken for net.bert; ")


def test_heads_may_differ(tmp_path: Path) -> None:
    """In their number of labels, and in their class."""
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2, labels=5)
    c = perturb(make_bert(kind=BertForTokenClassification), 0.1, seed=3)
    callback = merge({"a": a, "b": b, "c": c}, method=ChainOfMerges(refit_heads=False))
    head = {"net.classifier.weight", "net.classifier.bias"}
    private = {name for name, what in callback.report.parameters.items() if what.status.startswith("private")}
    assert private == head | {"net.bert.pooler.dense.weight", "net.bert.pooler.dense.bias"}
    net = callback.modules["b"].get_submodule("net")
    assert net.config.num_labels == 5  # type: ignore[union-attr]
    assert isinstance(callback.modules["c"].get_submodule("net"), BertForTokenClassification)
    expected = BertForSequenceClassification.from_pretrained(b).classifier
    torch.testing.assert_close(net.get_submodule("classifier").state_dict(), expected.state_dict())


def test_half_precision_folders(tmp_path: Path) -> None:
    make_bert().half().save_pretrained(tmp_path)
    expert = load_expert("a", tmp_path, TextModule())
    assert {p.dtype for p in expert.parameters()} == {torch.float32}


def edit(folder: Path, **settings: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    content.update(settings)
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            {"architectures": ["MyBert"], "auto_map": {"AutoModel": "code.MyBert"}},
            "names MyBert, .* code of the folder",
        ),
        ({"architectures": ["AutoTokenizer"]}, "names AutoTokenizer, which is no model"),
        ({"architectures": None}, "names no architecture"),
        ({"num_hidden_layers": 3}, "missing keys, which BertForSequenceClassification would fill at random: bert.enc"),
        ({"num_hidden_layers": 1}, "keys that BertForSequenceClassification does not have: bert.encoder.layer.1"),
        ({"architectures": ["GPT2Model"]}, "GPT2Model"),
    ],
)
def test_folders_that_are_refused(settings: dict[str, Any], told: str, tmp_path: Path) -> None:
    edit(expert_folder(tmp_path, 1), **settings)
    (tmp_path / "code.py").write_text("raise SystemExit('code of the folder was run')")
    with pytest.raises(MergeError, match=told):
        load_expert("a", tmp_path, TextModule())


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b"{", b"\xff", b"[" * 100_000])
def test_configurations_that_are_none(name: str, content: bytes, tmp_path: Path) -> None:
    """Transformers would fall back to its own settings for generating, without a word."""
    (expert_folder(tmp_path, 1) / name).write_bytes(content)
    with pytest.raises(MergeError, match=rf"{name} (holds|cannot be read)"):
        load_expert("a", tmp_path, TextModule())


def test_heads_that_the_class_does_not_have_are_told_of(tmp_path: Path) -> None:
    """As in the folders of the first BERTs: the class is for masked words, and the file has all heads."""
    make_bert(kind=BertForPreTraining).save_pretrained(tmp_path)
    edit(tmp_path, architectures=["BertForMaskedLM"])

    class Masked(TextModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = make_bert(kind=BertForMaskedLM)

    with collected_warnings() as told:
        expert = load_expert("a", tmp_path, Masked())
    same(expert.get_submodule("net"), BertForMaskedLM.from_pretrained(tmp_path))
    (warning,) = told
    assert "BertForMaskedLM, the class in config.json, has no place for bert.pooler.dense.bias, bert.pooler" in warning
    assert warning.endswith("left out, as from_pretrained does")


@pytest.mark.parametrize("name", ["encoder.layer.0.attention.gate.weight", "encoder.layer.0.output.dense.scale"])
def test_weights_of_layers_that_are_left_over_are_an_error(name: str, tmp_path: Path) -> None:
    folder = expert_folder(tmp_path, 1)
    state = load_file(folder / "model.safetensors")
    save_file({**state, f"bert.{name}": torch.zeros(2)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=f"does not have: bert.{name}. The weights are of another model than that in"):
        load_expert("a", tmp_path, TextModule())


def test_position_ids_of_older_versions(tmp_path: Path) -> None:
    folder = expert_folder(tmp_path, 1)
    state = load_file(folder / "model.safetensors")
    state["bert.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    same(load_expert("a", tmp_path, TextModule()).net, BertForSequenceClassification.from_pretrained(folder))  # type: ignore[arg-type]


def test_a_folder_of_another_architecture(tmp_path: Path) -> None:
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(tmp_path)
    with pytest.raises(
        MergeError, match="the BertModel has little in common with any part of TextModule; its net is a"
    ):
        load_expert("a", tmp_path, TextModule())


# Out


def test_the_merged_model_is_written_as_transformers_reads_it(tmp_path: Path) -> None:
    """One folder a task where heads differ, with the tokenizer of where it came from."""
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2, labels=5)
    tokenizer = save_tokenizer(a)
    callback = merge({"a": a, "b": b}, output_dir=str(tmp_path / "out"))
    written = tmp_path / "out" / "transformers"
    assert {path.name for path in written.iterdir()} == {"a", "b"}
    for task, module in callback.modules.items():
        same(AutoModelForSequenceClassification.from_pretrained(written / task), module.net)  # type: ignore[arg-type]
    assert AutoTokenizer.from_pretrained(written / "a").get_vocab() == tokenizer.get_vocab()
    again = load_expert("a", written / "a", TextModule())
    torch.testing.assert_close(again.state_dict(), callback.modules["a"].state_dict(), rtol=0, atol=0)


def test_a_large_result_is_written_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("com_lightning.experts.transformers_models.LARGEST_FILE", "5KB")
    model = perturb(make_bert(), seed=1)
    save_model(model, tmp_path / "x")
    assert len(list((tmp_path / "x").glob("*.safetensors"))) > 1
    same(load_expert("a", tmp_path / "x", TextModule()).net, model)  # type: ignore[arg-type]


def test_one_folder_where_nothing_is_private(tmp_path: Path) -> None:
    """With the tokenizer that the module has."""
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2)
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    model = TextModule(tokenizer=tokenizer)
    callback = merge({"a": a, "b": b}, model, private=[], output_dir=str(tmp_path / "out"))
    written = tmp_path / "out" / "transformers"
    assert not [path for path in written.iterdir() if path.is_dir()]
    same(AutoModelForSequenceClassification.from_pretrained(written), callback.modules["b"].net)  # type: ignore[arg-type]
    assert AutoTokenizer.from_pretrained(written).get_vocab() == tokenizer.get_vocab()


class TwoTowers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = make_bert(kind=BertModel), perturb(make_bert(kind=BertModel), seed=9)
        self.head = nn.Linear(16, 2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        out: Any = self.right(batch["ids"]).pooler_output + self.left(batch["ids"]).pooler_output
        self.log("val_mean", self.head(out).mean())


def test_several_models_are_named_by_attribute(tmp_path: Path) -> None:
    torch.manual_seed(0)
    experts: dict[str, Any] = {}
    for number, task in enumerate("ab"):
        experts[task] = perturb(TwoTowers(), 0.1, seed=number)
    callback = merge(experts, TwoTowers(), private=["head"], output_dir=str(tmp_path / "out"))
    written = tmp_path / "out" / "transformers"
    assert {path.name for path in written.iterdir()} == {"left", "right"}
    for name in ("left", "right"):
        part = callback.modules["a"].get_submodule(name)
        torch.testing.assert_close(BertModel.from_pretrained(written / name).state_dict(), part.state_dict())


def test_what_is_trained_on_is_not_changed_by_writing(tmp_path: Path) -> None:
    callback = merge({"a": expert_folder(tmp_path / "a", 1), "b": expert_folder(tmp_path / "b", 2)}, private=[])
    before = {name: tensor for name, tensor, _ in named_tensors(callback.modules["a"])}
    callback.save(tmp_path / "out")
    after = {name: tensor for name, tensor, _ in named_tensors(callback.modules["a"])}
    assert all(after[name] is tensor for name, tensor in before.items())


class Scaled(TextModule):
    """With a parameter beside its transformers model."""

    def __init__(self, labels: int = 3, scale: float = 2.0) -> None:
        super().__init__(labels)
        self.scale = nn.Parameter(torch.tensor(scale))


@pytest.mark.filterwarnings("ignore:.*(differ from your|stay as they are)")
def test_results_with_heads_that_the_class_does_not_build(tmp_path: Path) -> None:
    """Are read from the transformers folder, and the rest from the checkpoint."""
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2, labels=5)
    callback = merge({"a": a, "b": b}, Scaled(), output_dir=str(tmp_path / "out"))
    modules = load_results(tmp_path / "out", Scaled(scale=3.0), ["a", "b"])
    for task, module in callback.modules.items():
        torch.testing.assert_close(modules[task].state_dict(), module.state_dict(), rtol=0, atol=0)
    assert float(modules["b"].scale) == 2.0  # type: ignore[arg-type]


def test_a_model_that_cannot_be_written_does_not_lose_the_merge(tmp_path: Path) -> None:
    """Transformers refuses to write a generation config that it does not like, for instance."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no temperature without sampling")

    callback = merge({"a": expert_folder(tmp_path / "a", 1), "b": expert_folder(tmp_path / "b", 2)}, private=[])
    object.__setattr__(callback.modules["a"].net, "save_pretrained", refuse)
    told = r"net is not written to .*transformers \(ValueError: no temperature without sampling\)"
    with pytest.warns(UserWarning, match=told):
        callback.save(tmp_path / "out")
    assert (tmp_path / "out" / "merged.ckpt").is_file()
    assert not (tmp_path / "out" / "transformers").exists()
    assert "no temperature" in (tmp_path / "out" / "report.md").read_text()


def generating(folder: Path, seed: int, **settings: Any) -> Any:
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=12, **settings)
    torch.manual_seed(0)
    model: Any = perturb(GPT2LMHeadModel(config), 0.1, seed=seed)
    model.generation_config.temperature = 0.7  # which transformers refuses to save without `do_sample`
    return model


class Generating(TextModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = generating(Path(), 0)


def test_a_generation_config_that_transformers_refuses_is_written_with_the_weights(tmp_path: Path) -> None:
    """As it is: transformers loads what it refuses to save. That it refuses is known before the merge."""
    experts: dict[str, Any] = {}
    for seed, task in enumerate("ab", start=1):
        experts[task] = Generating()
        experts[task].net = generating(tmp_path / task, seed)
    told = [w for w in make_plan(Generating(), experts, None, Average()).parameters.warnings if "temperature" in w]
    assert len(told) == 1
    assert told[0].startswith(
        "expert 'a', expert 'b': transformers would not write the generation_config.json of net: "
    )
    callback = merge(experts, Generating(), private=[], output_dir=str(tmp_path / "out"))
    assert told[0] in callback.report.warnings
    written: Any = GPT2LMHeadModel.from_pretrained(tmp_path / "out" / "transformers")
    same(written, callback.modules["a"].net)  # type: ignore[arg-type]
    assert written.generation_config.temperature == 0.7
    assert callback.modules["a"].net.generation_config.temperature == 0.7  # type: ignore[union-attr]


def test_settings_for_generating_in_the_configuration_of_a_model(tmp_path: Path) -> None:
    """Scripts for older versions set them there. Transformers 5 refuses to write them, and does not use them."""
    experts: dict[str, Any] = {}
    for seed, task in enumerate("ab", start=1):
        experts[task] = Generating()
        experts[task].net = make_bert(kind=BertForMaskedLM)
        experts[task].net.config.max_length, experts[task].net.config.num_beams = 50, 4
        perturb(experts[task].net, 0.1, seed)
    merger = ChainOfMergesCallback(experts, Average(), private=[], output_dir=str(tmp_path / "out"))
    model = Generating()
    model.net = make_bert(kind=BertForMaskedLM)
    merger.merge(model)
    merged: Any = merger.modules["a"].net
    same(BertForMaskedLM.from_pretrained(tmp_path / "out" / "transformers"), merged)
    assert merged.config.max_length == 50
    told = [warning for warning in merger.report.warnings if "generation_config" in warning]
    if NAMES_OF_5:
        assert told == [
            "expert 'a', expert 'b': the config.json of net will lack max_length, num_beams: transformers takes them "
            "from generation_config.json; set them in generation_config"
        ]


def test_that_a_configuration_is_refused_is_known_before_the_merge(tmp_path: Path) -> None:
    experts = {task: Generating() for task in "ab"}
    for expert in experts.values():
        expert.net.config.save_pretrained = None
    (told,) = [w for w in writing_warnings(experts) if "cannot be written for from_pretrained" in w]
    assert told.startswith("expert 'a', expert 'b': net cannot be written")


def test_on_the_command_line_trainer(tmp_path: Path) -> None:
    """Folders are paths to `MergeTrainer` too."""
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2, labels=5)
    data = MergeDataModule({"a": make_texts(0), "b": make_texts(1)}, num_samples=8)
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    experts, folder = {"a": str(a), "b": str(b)}, str(tmp_path / "out")
    with pytest.warns(
        UserWarning,
        match=r"classifier.weight \(\(5, 16\), in your model \(3, 16\)\).* metrics and hyper.* TextModule.load_from",
    ):
        report = trainer.merge(TextModule(), data, experts, baselines=False, output_dir=folder)
    again = trainer.validate(TextModule(), datamodule=data, merged=folder, verbose=False)
    assert again == list(report.metrics["merged"].values())
