"""Embedding tables of different length, and tokenizers that number tokens differently."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM

from com_lightning import (
    Average,
    ChainOfMerges,
    ChainOfMergesCallback,
    MergeDataModule,
    MergeError,
    MergeOptions,
    MergeTrainer,
    TaskArithmetic,
    TaskLoaders,
)
from com_lightning.core.tensors.modules import tied_names
from com_lightning.experts.load import load_expert
from com_lightning.plan import MergePlan, make_plan
from tests.helpers import perturb, quiet_trainer
from tests.helpers.adapters import LoraModule, adapted
from tests.helpers.running import save_lightning
from tests.helpers.texts import WORDS, TextModule, expert_folder, make_bert, make_texts, merge, save_tokenizer


class Words(LightningModule):
    """Embeddings and a head over the vocabulary of its own, without transformers."""

    def __init__(self, rows: int = 12, classes: int = 3, tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.table = nn.Embedding(rows, 4, padding_idx=padding)
        self.layer = nn.Linear(4, 4)
        self.words = nn.Linear(4, rows)
        self.head = nn.Linear(4, classes)
        if tied:
            self.words.weight = self.table.weight

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        hidden = self.layer(self.table(batch))
        self.log("val_mean", self.head(hidden).mean() + self.words(hidden).mean())


def words(*rows: int, **kwargs: Any) -> list[Words]:
    """Experts of one base whose tables have these numbers of rows."""
    torch.manual_seed(0)
    longest = Words(max(rows), **kwargs)
    experts = []
    for number, count in enumerate(rows):
        expert = Words(count, **kwargs)
        state = {n: t[: len(expert.state_dict()[n])] for n, t in longest.state_dict().items()}
        expert.load_state_dict(state)
        experts.append(perturb(expert, 0.1, seed=number + 1))
    return experts  # type: ignore[return-value]


def run(experts: dict[str, Any], model: Any, rows: dict[str, int], **kwargs: Any) -> ChainOfMergesCallback:
    loaders = {}
    for number, (task, count) in enumerate(rows.items()):
        ids = torch.randint(0, count, (20, 5), generator=torch.Generator().manual_seed(number))
        loaders[task] = TaskLoaders(val=DataLoader(ids, batch_size=10))  # type: ignore[arg-type]
    callback = ChainOfMergesCallback(experts, **{"baselines": False, **kwargs})
    data = MergeDataModule(loaders, num_samples=20)
    quiet_trainer(callbacks=[callback]).validate(model, datamodule=data, verbose=False)
    return callback


def test_tables_that_differ_are_an_error() -> None:
    """Rather than private by their shape, and quietly not merged."""
    a, b = words(12, 15)
    with pytest.raises(MergeError) as caught:
        run({"a": a, "b": b}, Words(), {"a": 12, "b": 15})
    problem = caught.value.problems[0]
    assert "table.weight: model 12, a 12, b 15" in problem
    assert "set resize_embeddings" in problem
    assert len(caught.value.problems) == 1


def test_tables_that_the_user_names_stay_private() -> None:
    a, b = words(12, 15)
    callback = run({"a": a, "b": b}, Words(), {"a": 12, "b": 15}, private=["table", "words", "head"])
    torch.testing.assert_close(callback.modules["b"].get_parameter("table.weight"), b.table.weight)
    assert callback.report.parameters["layer.weight"].status == "solved"


def test_heads_with_other_classes_are_no_vocabulary() -> None:
    a, b = words(12)[0], Words(12, classes=5)
    callback = run({"a": a, "b": b}, Words(), {"a": 12, "b": 12}, method=ChainOfMerges(refit_heads=False))
    assert callback.report.parameters["head.weight"].status == "private"


@pytest.mark.parametrize("tied", [False, True])
def test_common_rows_are_merged_and_the_others_kept(tied: bool) -> None:
    a, b, c = words(12, 15, 15, tied=tied)
    model = Words(tied=tied)
    callback = run(
        {"a": a, "b": b, "c": c}, model, {"a": 12, "b": 15, "c": 15}, private=["head"], resize_embeddings=True
    )
    merged = callback.modules["a"]
    assert isinstance(merged, Words)
    table = merged.table.weight
    assert table.shape == (15, 4)
    assert merged.table.num_embeddings == merged.words.out_features == 15
    assert (tied_names(merged)["words.weight"] == "table.weight") is tied
    assert model.table.weight.shape == (15, 4)
    for row in range(15):
        own = torch.stack([e.table.weight.detach()[row] for e in (a, b, c) if row < len(e.table.weight)])
        assert bool((table[row] <= own.amax(0) + 1e-6).all())
        assert bool((table[row] >= own.amin(0) - 1e-6).all())
    assert a.table.weight.shape == (12, 4)  # the user's
    assert callback.report.parameters["words.weight"].status == "solved"


def test_rows_of_one_expert_alone_are_its_own() -> None:
    a, b = words(12, 15)
    merged = run({"a": a, "b": b}, Words(), {"a": 12, "b": 15}, private=["head"], resize_embeddings=True).modules
    for task in "ab":
        table = merged[task].get_parameter("table.weight")
        torch.testing.assert_close(table[12:], b.table.weight[12:])
        assert not torch.equal(table[:12], b.table.weight[:12])


def test_a_grown_result_is_read_again(tmp_path: Path) -> None:
    """Though the class would build shorter tables."""
    a, b = words(12, 15)
    save_lightning(a, tmp_path / "a.ckpt")
    experts: dict[str, Any] = {"a": tmp_path / "a.ckpt", "b": b}
    rows, kwargs = {"a": 12, "b": 15}, {"private": ["head"], "resize_embeddings": True}
    callback = run(experts, Words(), rows, output_dir=str(tmp_path / "out"), **kwargs)
    for task in "ab":
        again = load_expert(task, tmp_path / "out" / f"{task}.ckpt", Words())
        torch.testing.assert_close(again.state_dict(), callback.modules[task].state_dict(), rtol=0, atol=0)


# Transformers


def test_transformers_tables_grow(tmp_path: Path) -> None:
    """The configuration says so, and the result is read by `from_pretrained`; a head over the vocabulary stays tied."""

    class Masked(TextModule):
        def __init__(self, vocabulary: int = 30) -> None:
            super().__init__()
            self.net = make_bert(vocabulary=vocabulary, kind=BertForMaskedLM)

    a = expert_folder(tmp_path / "a", 1, kind=BertForMaskedLM)
    b = expert_folder(tmp_path / "b", 2, kind=BertForMaskedLM, vocabulary=33)
    with pytest.raises(MergeError, match=r"word_embeddings.weight: model 30, a 30, b 33"):
        merge({"a": a, "b": b}, Masked())
    callback = merge({"a": a, "b": b}, Masked(), resize_embeddings=True, private=[], output_dir=str(tmp_path / "out"))
    net: Any = AutoModelForMaskedLM.from_pretrained(tmp_path / "out" / "transformers")
    assert net.config.vocab_size == 33
    merged: Any = callback.modules["a"].net
    ids = torch.randint(5, 33, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(net(ids).logits, merged.eval()(ids).logits)
    assert net(ids).logits.shape[-1] == 33
    own: Any = BertForMaskedLM.from_pretrained(b).get_input_embeddings().weight
    torch.testing.assert_close(merged.get_input_embeddings().weight[30:], own[30:])
    assert merged(ids, labels=ids).loss > 0  # which views its logits by the configured length


def test_the_model_of_merge_trainer_does_not_grow(tmp_path: Path) -> None:
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2, vocabulary=33)
    model, folder = TextModule(), str(tmp_path / "out")
    before = copy.deepcopy(model.state_dict())
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    data = MergeDataModule({"a": make_texts(0), "b": make_texts(1, 33)}, num_samples=8)
    experts = {"a": str(a), "b": str(b)}
    trainer.merge(model, data, experts, private=[], baselines=False, output_dir=folder, resize_embeddings=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_tokens_that_differ(tmp_path: Path) -> None:
    """Tables of one length, whose rows stand for other words."""
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2)
    save_tokenizer(a)
    save_tokenizer(b, [*WORDS[:3], "other", *WORDS[4:20], "more", *WORDS[21:]])
    told = r"the tokenizers of 'a' and 'b' differ: number 8 is 'word3' in 'a' and 'other' in 'b'; number 25 is 'w"
    with pytest.raises(MergeError, match=told):
        merge({"a": a, "b": b}, private=[])
    table = "net.bert.embeddings.word_embeddings"
    assert merge({"a": a, "b": b}, private=[table]).report.parameters[f"{table}.weight"].status.startswith("private")


def test_longer_vocabularies_with_the_same_beginning(tmp_path: Path) -> None:
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2, vocabulary=33)
    save_tokenizer(a)
    save_tokenizer(b, [*WORDS, "x", "y", "z"])
    callback = merge({"a": a, "b": b}, private=[], resize_embeddings=True)
    assert callback.modules["a"].net.config.vocab_size == 33  # type: ignore[union-attr]


TABLE = "net.bert.embeddings.word_embeddings"


def adapter_folder(folder: Path, seed: int, words: list[str]) -> Path:
    """With trained embeddings, and the tokenizer that they were trained with, as trainers leave it."""
    model = adapted(seed, target_modules=["query"], modules_to_save=["word_embeddings", "classifier"])
    model.save_pretrained(str(folder))
    save_tokenizer(folder, words)
    return folder


def plan_of(experts: dict[str, Any], model: Any = None, private: Any = ()) -> MergePlan:
    return make_plan(model or TextModule(), experts, None, Average(), MergeOptions(private=list(private)))


SWAPPED = [*WORDS[:-2], WORDS[-1], WORDS[-2]]


@pytest.mark.parametrize("kind", ["adapters", "folders"])
@pytest.mark.parametrize("held", [False, True])
def test_tokenizers_beside_experts_are_compared(kind: str, held: bool, tmp_path: Path) -> None:
    """Also where the module holds the base's. All that differ are told of, wherever the first expert has no say."""
    model = TextModule(tokenizer=save_tokenizer(tmp_path / "base", WORDS[:20]) if held else None)
    experts = {}
    for seed, (task, words) in enumerate({"a": WORDS[:20], "b": WORDS, "c": SWAPPED}.items()):
        if kind == "adapters":
            experts[task] = adapter_folder(tmp_path / task, seed, words)
        else:
            experts[task] = expert_folder(tmp_path / task, seed)
            save_tokenizer(experts[task], words)
    with pytest.raises(MergeError) as caught:
        plan_of(experts, model)
    (problem,) = caught.value.problems
    assert problem.startswith(
        "the tokenizers of 'b' and 'c' differ: number 28 is 'word23' in 'b' and 'word24' in 'c'; number 29 is 'word24' "
        "in 'b' and 'word23' in 'c'; rows of different tokens cannot be merged"
    )
    assert plan_of(experts, model, [TABLE]).parameters.private["a"] == [f"{TABLE}.weight"]
    assert plan_of({task: experts[task] for task in "ab"}, model)


def test_a_token_that_the_model_numbers_differently(tmp_path: Path) -> None:
    """Its data are numbered by it. That experts give a reserved token a name is no difference."""
    experts = {task: expert_folder(tmp_path / task, seed) for seed, task in enumerate("ab")}
    for folder in experts.values():
        save_tokenizer(folder)
    model = TextModule(tokenizer=save_tokenizer(tmp_path / "base", SWAPPED))
    told = (
        "the tokenizers of your model and 'a' differ: 'word23' is number 29 in your model and 28 in 'a'; 'word24' is "
    )
    with pytest.raises(MergeError, match=told):
        plan_of(experts, model)
    reserved = save_tokenizer(tmp_path / "named", [*WORDS[:-2], "reserved0", "reserved1"])
    assert plan_of(experts, TextModule(tokenizer=reserved))


def test_a_base_with_other_tokens(tmp_path: Path) -> None:
    folders = {who: expert_folder(tmp_path / who, seed) for seed, who in enumerate(("a", "b", "base"))}
    for who, folder in folders.items():
        save_tokenizer(folder, SWAPPED if who == "base" else WORDS)
    base = str(folders.pop("base"))
    with pytest.raises(MergeError, match=r"of base \(.*base\) and 'a' differ: 'word23' is number 29 in base") as caught:
        make_plan(TextModule(), {**folders}, None, TaskArithmetic(), MergeOptions(base=base, private=[]))
    assert "base) with the tokenizer of the experts" in caught.value.problems[0]


def test_a_token_that_two_experts_number_differently(tmp_path: Path) -> None:
    a, b = expert_folder(tmp_path / "a", 1), expert_folder(tmp_path / "b", 2)
    save_tokenizer(a, [*WORDS[:20], "x"])
    save_tokenizer(b, WORDS[:20])
    content = json.loads((b / "tokenizer.json").read_text())
    content["model"]["vocab"]["x"] = 27
    (b / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="the tokenizers of 'a' and 'b' differ: 'x' is number 25 in 'a' and 27 in 'b'"):
        plan_of({"a": a, "b": b})


def test_a_tokenizer_that_cannot_be_compared_is_told_of(tmp_path: Path) -> None:
    experts = {task: expert_folder(tmp_path / task, seed) for seed, task in enumerate("abc")}
    for folder in experts.values():
        save_tokenizer(folder)
    for task in "bc":
        (experts[task] / "tokenizer.json").write_text("null")
    (told,) = [warning for warning in plan_of(experts).parameters.warnings if "tokenizer" in warning]
    assert told.startswith(f"the tokenizer of 'b', 'c' ({experts['b']}) cannot be loaded (")
    assert told.endswith("): it is not known whether it numbers tokens as the others do")
    assert not [w for w in plan_of(experts, private=[TABLE, "net.classifier"]).parameters.warnings if "tokenizer" in w]


def test_the_tokenizer_beside_adapters_is_written(tmp_path: Path) -> None:
    """And not the base's, which the module holds, and which is shorter."""
    experts: dict[str, Any] = {}
    for seed, task in enumerate("ab"):
        experts[task] = adapter_folder(tmp_path / task, seed, WORDS)
        tokenizer = AutoTokenizer.from_pretrained(experts[task])
        tokenizer.chat_template = "hello"
        tokenizer.save_pretrained(experts[task])
    model = TextModule(tokenizer=save_tokenizer(tmp_path / "base", WORDS[:20]))
    merger = ChainOfMergesCallback(experts, Average(), private=[], output_dir=str(tmp_path / "out"))
    merger.merge(model)
    written = AutoTokenizer.from_pretrained(tmp_path / "out" / "transformers")
    assert (len(written), written.chat_template) == (30, "hello")
    assert not [warning for warning in merger.report.warnings if "tokenizer" in warning]


def test_each_task_s_folder_has_its_tokenizer(tmp_path: Path) -> None:
    """Where tables are private, because their rows are of different tokens."""
    experts: dict[str, Any] = {task: expert_folder(tmp_path / task, seed) for seed, task in enumerate("ab")}
    for (task, folder), words in zip(experts.items(), (WORDS, SWAPPED)):
        tokenizer = save_tokenizer(folder, words)
        tokenizer.chat_template = task
        tokenizer.save_pretrained(folder)
    merger = ChainOfMergesCallback(experts, Average(), private=[TABLE], output_dir=str(tmp_path / "out"))
    merger.merge(TextModule(tokenizer=save_tokenizer(tmp_path / "base", WORDS[:20])))
    for task, number in (("a", 29), ("b", 28)):
        written = AutoTokenizer.from_pretrained(tmp_path / "out" / "transformers" / task)
        assert (written.chat_template, written.get_vocab()[WORDS[-1]]) == (task, number)
    assert not [warning for warning in merger.report.warnings if "token" in warning or "template" in warning]


def test_an_adapter_that_takes_the_place_of_the_model_s_own(tmp_path: Path) -> None:
    """Its folder is known after the PeftModel has been merged, too."""
    experts: dict[str, Any] = {}
    for seed, task in enumerate("ab"):
        adapted(seed).save_pretrained(str(tmp_path / task))
        save_tokenizer(tmp_path / task)
        experts[task] = tmp_path / task
    merger = ChainOfMergesCallback(experts, Average(), private=[], output_dir=str(tmp_path / "out"))
    merger.merge(LoraModule())
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "transformers")) == 30


def test_warnings_of_writing_stand_in_the_report(tmp_path: Path) -> None:
    experts: dict[str, Any] = {}
    for seed, task in enumerate("ab"):
        tokenizer = save_tokenizer(expert_folder(tmp_path / task, seed))
        tokenizer.chat_template = task
        tokenizer.save_pretrained(tmp_path / task)
        experts[task] = tmp_path / task
    merger = ChainOfMergesCallback(experts, Average(), private=[])
    merger.merge(TextModule())
    with pytest.warns(UserWarning, match="chat templates differ"):
        merger.save(tmp_path / "out")
    assert "chat templates differ" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "transformers" / "chat_template_b.jinja").read_text() == "b"
