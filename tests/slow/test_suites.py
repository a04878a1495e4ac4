"""The benchmark suites on stand-in data: no package is fetched, and every suite takes seconds."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.suites import SUITES, images, lm4, make_suite, packages, runner, texts, texts6
from benchmarks.suites.__main__ import main
from benchmarks.suites.oracle import train_jointly
from benchmarks.suites.packages import FetchError, Package, sha256
from benchmarks.suites.rules import NAMES, settings_for
from benchmarks.suites.suite import Recipe, trained_or_kept
from com_lightning import MergeError
from com_lightning.core.tensors.modules import matches_any

WORDS = ["good", "bad", "film", "price", "law", "the", "of", "a", "is", "not", "very", "it"]
SOURCES = {"mnist": 1, "fashion": 2}


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random images and texts, a tiny encoder, and three steps of training."""
    monkeypatch.setenv(packages.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(images, "read_source", _images)
    monkeypatch.setattr(texts, "CLASSIFICATION", {task: _labelled(task) for task in texts6.CLASSES})
    monkeypatch.setattr(texts, "KINDS", {kind: _documents(kind) for kind in texts.KINDS})
    monkeypatch.setattr(texts, "minilm_folder", lambda: _encoder(tmp_path / "encoder"))
    for cached in (images.source_splits, texts6.task_splits, texts6._tokenizer, lm4.kind_splits):
        cached.cache_clear()
    for name in SUITES:
        suite = make_suite(name)
        if hasattr(suite, "joint_batch_size"):
            monkeypatch.setattr(type(suite), "joint_batch_size", 8)
        for recipe in ("base_recipe", "recipe", "fashion_recipe"):
            if isinstance(whole := getattr(suite, recipe, None), Recipe):
                monkeypatch.setattr(type(suite), recipe, replace(whole, steps=3, batch_size=8))


def _images(name: str) -> dict[str, images.Labelled]:
    """Every fourth image of train is one of test, or another of train."""
    generator = torch.Generator().manual_seed(SOURCES[name])
    test = torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8, generator=generator)
    train = torch.randint(256, (120, 1, 28, 28), dtype=torch.uint8, generator=generator)
    train[:20], train[20:30] = test[:20], train[30:40]
    return {"test": (test, torch.arange(40) % 10), "train": (train, torch.arange(120) % 10)}


def _labelled(task: str) -> Callable[[], texts.Labelled]:
    def make() -> texts.Labelled:
        choose = random.Random(task)
        rows = [(" ".join(choose.choices(WORDS, k=8)), number % texts6.CLASSES[task]) for number in range(120)]
        return [*rows, *((text.upper() + "!", label) for text, label in rows[:60])]

    return make


def _documents(kind: str) -> Callable[[], list[str]]:
    def make() -> list[str]:
        choose = random.Random(kind)
        documents = [" ".join(choose.choices(WORDS, k=200)) for _ in range(40)]
        return [*documents, *documents[:20]]

    return make


def _encoder(folder: Path) -> Path:
    if not folder.exists():
        folder.mkdir()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        (folder / "vocab.txt").write_text("\n".join([*special, *WORDS]))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
        config = BertConfig(
            vocab_size=len(special) + len(WORDS),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
        )
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_trains_merges_and_writes_its_results(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / name
    main([name, "--seeds", "0", "--samples", "16", "--methods", "average", "chain", "--output", str(output)])
    content = json.loads(output.with_suffix(".json").read_text())
    assert [entry["method"] for entry in content["entries"]] == ["expert", "average", "chain"]
    for entry in content["entries"]:
        assert list(entry["values"]) == list(make_suite(name).tasks)
        assert all(value > 0 for value in entry["values"].values()) or "perplexity" not in content["metric"]
    assert output.with_suffix(".png").stat().st_size > 1000
    table = output.with_suffix(".md").read_text()
    assert f"python -m benchmarks.suites {name} --seeds 0 --samples 16" in table
    assert "| chain " in table
    assert table in capsys.readouterr().out


@pytest.mark.parametrize("name", SUITES)
def test_an_oracle_is_one_model(name: str, tmp_path: Path) -> None:
    suite = make_suite(name)
    experts = suite.load(0)
    before = experts.base.state_dict()
    modules = train_jointly(suite, 0, experts)
    first, *others = (dict(module.state_dict(keep_vars=True)) for module in modules.values())
    private = {key for key in first if matches_any(key, suite.private)}
    assert bool(private) == (name != "lm4")
    for other in others:
        assert {key for key in first if first[key] is not other[key]} == private
    assert any(not torch.equal(value, before[key]) for key, value in first.items() if key not in private)
    main(
        [name, "--seeds", "0", "--samples", "16", "--oracle", "--methods", "average", "--output", str(tmp_path / "out")]
    )
    table = (tmp_path / "out.md").read_text()
    assert "| joint training |" in table
    assert f"{name} --seeds 0 --split test --oracle --methods average`" in table


@pytest.mark.parametrize("name", SUITES)
def test_no_sample_is_in_two_splits_or_twice_in_one(name: str) -> None:
    suite = make_suite(name)
    for task in suite.tasks:
        data = suite.data(task)
        for stage in ("fit", "test"):
            data.setup(stage)
        loaders: dict[str, Any] = {
            "val": data.val_dataloader(),
            "test": data.test_dataloader(),
            "train": data.train_dataloader(),
        }
        parts = {
            part: [_key(loader.dataset[i]) for i in range(len(loader.dataset))] for part, loader in loaders.items()
        }
        assert all(parts.values())
        for part in parts.values():
            assert len(set(part)) == len(part)
        for one, other in combinations(parts.values(), 2):
            assert not set(one) & set(other)


def _key(row: Any) -> bytes:
    return str(row["input_ids"]).encode() if isinstance(row, dict) else row[0].numpy().tobytes()


def test_all_views_of_a_source_have_the_same_splits() -> None:
    plain, rotated = images.ViewData("mnist"), images.ViewData("mnist-rotated")
    for name in ("train", "val", "test"):
        turned = [image.rot90(-1, (-2, -1)) for image, _ in rotated.make_split(name)]  # type: ignore[attr-defined]
        assert torch.equal(torch.stack(turned), torch.stack([x for x, _ in plain.make_split(name)]))  # type: ignore[attr-defined]


def test_trained_modules_and_results_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    suite = make_suite("images8-resnet")
    first = suite.load(0)
    (suite.folder(0) / "mnist.ckpt").unlink()
    trained: list[Path] = []

    def train(*arguments: Any) -> None:
        if not (path := arguments[3]).exists():
            trained.append(path)
        trained_or_kept(*arguments)

    monkeypatch.setattr("benchmarks.suites.suite.trained_or_kept", train)
    again = suite.load(0)
    assert trained == [suite.folder(0) / "mnist.ckpt"]  # and it is the same as before
    for task in suite.tasks:
        for name, value in first.experts[task].state_dict().items():
            assert torch.equal(again.experts[task].state_dict()[name], value), (task, name)

    command = ["images8-resnet", "--seeds", "0", "--output", str(tmp_path / "out"), "--methods", "average", "regmean"]
    command += ["--samples", "4", "8"]
    main(command)
    entries = json.loads((tmp_path / "out.json").read_text())["entries"]
    measured = [("expert", 0), ("average", 0), ("regmean", 4), ("regmean", 8)]
    assert [(entry["method"], entry["samples"]) for entry in entries] == measured
    for name in ("merge", "evaluate"):
        monkeypatch.setattr(runner, name, lambda *_: pytest.fail("nothing is missing"))
    main(command)


def test_other_settings_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = make_suite("texts6")
    folder = suite.folder(0)
    monkeypatch.setattr(type(suite), "recipe", replace(suite.recipe, learning_rate=0.5))
    assert suite.folder(0) != folder


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_training_leaves_nothing(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    suite = make_suite("images8-resnet")
    saved = torch.save

    def interrupted(content: Any, path: Path) -> None:
        saved(content, path)
        raise error

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(error):
        suite.load(0)
    assert not list(suite.folder(0).iterdir())


def test_an_interrupted_step_is_no_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    suite = make_suite("images8-resnet")

    def step(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(suite.base_module()), "training_step", step)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        suite.load(0)
    assert not suite.folder(0).exists() or not list(suite.folder(0).iterdir())


@pytest.mark.parametrize("name", SUITES)
def test_all_rules_are_there_or_do_not_apply(name: str) -> None:
    suite = make_suite(name)
    rules = {setting.name.partition("(")[0] for setting in settings_for(suite)}
    assert rules | set(suite.not_applicable) == {*NAMES} - {"combined", "refitted", "task_adapters"}
    assert not rules & set(suite.not_applicable)
    with pytest.raises(MergeError, match=f"slerp is not for {name}: it takes two experts"):
        settings_for(suite, ["slerp"])


def test_a_wrong_method_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lm4", "--methods", "tees", "chain"])
    assert "did you mean ties?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["images8-resnet", "texts6"])
def test_rules_with_gradients(name: str, tmp_path: Path) -> None:
    """Fisher on single samples, AdaMerging on the classes that the modules predict."""
    methods = ["fisher", "ada_merging(steps=2)"]
    main([name, "--seeds", "0", "--samples", "4", "--output", str(tmp_path / "out"), "--methods", *methods])
    entries = json.loads((tmp_path / "out.json").read_text())["entries"]
    assert [entry["method"] for entry in entries] == ["expert", *methods]


def _registry(monkeypatch: pytest.MonkeyPatch, content: Path, fails: bool = False) -> list[list[str]]:
    """In place of the clients: each call leaves an archive of ``content`` in its folder."""
    calls: list[list[str]] = []

    def run(command: list[str], cwd: Path, **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        with tarfile.open(cwd / "archive.tgz", "w:gz") as file:
            file.add(content, "package")
        if fails:
            raise KeyboardInterrupt
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return calls


@pytest.fixture
def content(tmp_path: Path) -> Path:
    (tmp_path / "content").mkdir()
    (tmp_path / "content" / "data.txt").write_text("data")
    return tmp_path / "content"


def test_a_package_is_fetched_once(monkeypatch: pytest.MonkeyPatch, content: Path) -> None:
    calls = _registry(monkeypatch, content)
    package = Package("npm", "@scope/name", "1.0.0")
    assert (package.folder() / "package" / "data.txt").read_text() == "data"
    assert package.folder().parent == packages.cache_folder() / "packages"
    assert calls == [["npm", "pack", "--silent", "@scope/name@1.0.0"]]


def test_an_interrupted_fetch_leaves_nothing(monkeypatch: pytest.MonkeyPatch, content: Path) -> None:
    _registry(monkeypatch, content, fails=True)
    with pytest.raises(KeyboardInterrupt):
        Package("npm", "name", "1.0.0").folder()
    assert not os.listdir(packages.cache_folder() / "packages")


def test_another_archive_than_expected_is_not_kept(monkeypatch: pytest.MonkeyPatch, content: Path) -> None:
    _registry(monkeypatch, content)
    with pytest.raises(FetchError, match="its SHA-256 is"):
        Package("pip", "name", "1.0.0", sha256(content / "data.txt")).folder()
    assert not os.listdir(packages.cache_folder() / "packages")


@pytest.mark.parametrize("client", ["npm", "apt-get"])
def test_a_missing_client_is_told(monkeypatch: pytest.MonkeyPatch, client: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match=f"the-package is fetched with {client}.* not on this machine"):
        Package(client, "the-package").folder()


def test_a_failing_client_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 100, "", "E: Unable to locate package x")
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"(?s)apt-get update.*Unable to locate"):
        Package("apt-get", "x").folder()


def test_the_text_of_a_mail_is_subject_and_body() -> None:
    raw = "Received: from x\nSubject: Hello\nX-Spam: no\n\n<style>p {}</style><p>An offer &amp; mo=\nre</p>"
    assert texts.mail_text(raw).split() == ["Hello", "An", "offer", "&", "more"]
