"""Which tokenizer belongs to an expert, what is read of it, and what is written for tasks that share a folder."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import AutoTokenizer, BertTokenizer

from com_lightning import MergeError
from com_lightning.experts.tokenizers import TokenSource, find_tokenizer, remember_folder, write_tokenizer
from tests.helpers.texts import WORDS, TextModule, save_tokenizer


def folder_with(folder: Path, words: list[str] = WORDS, template: str | None = None, **settings: Any) -> Path:
    tokenizer = save_tokenizer(folder, words)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_the_folder_of_the_expert_comes_first_then_the_module_then_the_base(tmp_path: Path) -> None:
    module = TextModule()
    assert find_tokenizer(module, module.net) is None
    module.net.config._name_or_path = str(folder_with(tmp_path / "base", WORDS[:20]))
    sizes = [len(find_tokenizer(module, module.net).vocabulary)]  # type: ignore[union-attr]
    module.tokenizer = AutoTokenizer.from_pretrained(folder_with(tmp_path / "own", WORDS[:22]))
    sizes.append(len(find_tokenizer(module, module.net).vocabulary))  # type: ignore[union-attr]
    remember_folder(module.net.bert, folder_with(tmp_path / "expert"))  # an adapter of a part, or around it
    sizes.append(len(find_tokenizer(module, module.net).vocabulary))  # type: ignore[union-attr]
    assert sizes == [25, 27, 30]


def test_a_folder_of_weights_alone_has_no_tokenizer(tmp_path: Path) -> None:
    module = TextModule(tokenizer=save_tokenizer(tmp_path / "own"))
    (tmp_path / "expert").mkdir()
    (tmp_path / "expert" / "chat_template.jinja").write_text("only a template")
    remember_folder(module.net, tmp_path / "expert")
    source = find_tokenizer(module, module.net)
    assert source is not None
    assert source.folder is None


def test_of_several_models_each_has_the_tokenizer_of_its_name(tmp_path: Path) -> None:
    module: Any = nn.Module()
    for name, words in (("left", WORDS), ("right", WORDS[:9])):
        part = TextModule().net
        part.config._name_or_path = str(folder_with(tmp_path / name, words))
        setattr(module, name, part)
        setattr(module, f"{name}_tokenizer", AutoTokenizer.from_pretrained(tmp_path / name))
    for name, size in (("left", 30), ("right", 14)):
        source = find_tokenizer(module, module.get_submodule(name))
        assert source is not None
        assert len(source.vocabulary) == size


def test_all_files_of_a_tokenizer_and_nothing_else_are_copied(tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a", template="hello")
    inner = folder / "additional_chat_templates"
    inner.mkdir()
    wanted = ["merges.txt", "source.spm", "tekken.json", "video_preprocessor_config.json", "tokenizer.tiktoken"]
    wanted.append("additional_chat_templates/tools.jinja")
    unwanted = ["tokenizer.py", "tokenizer.bin", "hf_token.txt", "data.json", "README.md", "config.json", ".env"]
    for name in [*wanted, *unwanted]:
        (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (folder / "tokenizer_secret.json").symlink_to(secret)
    (tmp_path / "out").mkdir()
    TokenSource(folder).write(tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert written == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vocab.txt", *wanted}
    (tmp_path / "out" / "tekken.json").unlink()  # which is not what it says
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == {"default": "hello", "tools": "{}"}


BROKEN = [
    "",
    "[]",
    "null",
    "3",
    "{",
    "[" * 100_000,
    '{"tokenizer_class": 5}',
    '{"tokenizer_class": "BertModel"}',
    "\x80",
]


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("name", ["tokenizer_config.json", "tokenizer.json"])
def test_what_cannot_be_loaded_is_one_error_and_is_copied(name: str, text: str, tmp_path: Path) -> None:
    folder = folder_with(tmp_path / "a")
    (folder / name).write_bytes(text.encode("latin-1"))
    source = TokenSource(folder)
    with contextlib.suppress(MergeError):  # some of them can be loaded after all
        assert source.vocabulary
    assert source.template is None
    assert isinstance(source.settings, dict)
    (tmp_path / "out").mkdir()
    assert not write_tokenizer({"a": source}, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == text.encode("latin-1")


def test_a_panic_in_rust_is_an_error_like_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class derives from BaseException. An interruption by the user is not caught."""
    folder = folder_with(tmp_path / "a")
    panic = type("PanicException", (BaseException,), {})

    def load(*args: Any, **kwargs: Any) -> None:
        raise kinds[0]("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", load)
    kinds: list[Any] = [panic]
    with pytest.raises(MergeError, match="PanicException: called `Option::unwrap"):
        assert TokenSource(folder).vocabulary
    kinds[0] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        assert TokenSource(folder).vocabulary


def write(sources: dict[str, Path], target: Path) -> tuple[Any, list[str]]:
    target.mkdir()
    told = write_tokenizer({task: TokenSource(folder) for task, folder in sources.items()}, target)
    return AutoTokenizer.from_pretrained(target), told


def test_the_longest_of_several_is_written(tmp_path: Path) -> None:
    a, b = folder_with(tmp_path / "a"), folder_with(tmp_path / "b", [*WORDS, "x", "y"])
    tokenizer, told = write({"a": a, "b": b}, tmp_path / "out")
    assert not told
    assert len(tokenizer) == 32
    c = folder_with(tmp_path / "c", [*WORDS[:-1]])
    assert json.loads((c / "tokenizer.json").read_text())["model"]["vocab"]
    content = json.loads((c / "tokenizer.json").read_text())
    content["model"]["vocab"]["new"] = 40
    (c / "tokenizer.json").write_text(json.dumps(content))
    (told_of,) = write({"a": a, "b": b, "c": c}, tmp_path / "more")[1]
    assert told_of == "more: the tokenizer is that of 'b'; it lacks tokens of 'c': 'new'"


def test_templates_that_differ_are_kept_and_told_of(tmp_path: Path) -> None:
    sources = {task: folder_with(tmp_path / task, template=text) for task, text in (("a", "A"), ("b", "B"), ("c", "A"))}
    tokenizer, told = write(sources, tmp_path / "out")
    assert tokenizer.chat_template == "A"
    assert (tmp_path / "out" / "chat_template_b.jinja").read_text() == "B"
    assert not (tmp_path / "out" / "chat_template_c.jinja").exists()
    assert told == [
        "out: the tasks' chat templates differ; the tokenizer has that of 'a', and those of 'b' are beside it, as "
        "chat_template_<task>.jinja"
    ]


def test_a_template_that_one_task_has_is_not_lost(tmp_path: Path) -> None:
    tokenizer, told = write(
        {"a": folder_with(tmp_path / "a"), "b": folder_with(tmp_path / "b", template="B")}, tmp_path / "out"
    )
    assert (tokenizer.chat_template, told) == ("B", [])


def test_a_template_of_the_shorter_of_two_tokenizers_is_kept(tmp_path: Path) -> None:
    a, b = folder_with(tmp_path / "a", template="A"), folder_with(tmp_path / "b", [*WORDS, "x"])
    tokenizer, (told,) = write({"a": a, "b": b}, tmp_path / "out")
    assert (tokenizer.chat_template, len(tokenizer)) == (None, 31)
    assert (tmp_path / "out" / "chat_template_a.jinja").read_text() == "A"
    assert "the tokenizer is that of 'b', which has none, and those of 'a' are beside it" in told


def test_files_that_cannot_be_read_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TokenSource(folder_with(tmp_path / "a"))

    def refuse(path: Path, *args: Any, **kwargs: Any) -> None:
        raise PermissionError(f"no access to {path.name}")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    other = TokenSource(tmp_path / "a")
    assert source.key == other.key
    (told,) = write_tokenizer({"a": source, "b": other}, tmp_path / "out")
    assert "is not written: PermissionError: no access to tokenizer.json" in told


def test_settings_that_differ_are_told_of(tmp_path: Path) -> None:
    sources = {"a": folder_with(tmp_path / "a"), "b": folder_with(tmp_path / "b", padding_side="left")}
    _, told = write(sources, tmp_path / "out")
    assert told == ["out: the tokenizer is that of 'a'; that of 'b' differs in padding_side of tokenizer_config.json"]


def test_the_same_files_in_several_folders_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = {task: TokenSource(folder_with(tmp_path / task)) for task in "ab"}
    monkeypatch.setattr(BertTokenizer, "from_pretrained", None)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", None)
    (tmp_path / "out").mkdir()
    assert not write_tokenizer({**sources, "c": None}, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_folder_that_is_gone_is_told_of(tmp_path: Path) -> None:
    module = TextModule(tokenizer=save_tokenizer(tmp_path / "own"))
    remember_folder(module.net, tmp_path / "gone")
    (tmp_path / "out").mkdir()
    (told,) = write_tokenizer({"a": find_tokenizer(module, module.net)}, tmp_path / "out")
    assert told == f"out: the tokenizer of 'a' ({tmp_path / 'gone'}) is not written: it is no longer there"
