"""The tokenizer or processor of a transformers model: which one belongs to an expert, and how it is written.

It is looked for in the folder that the expert was read from, then in the module, then in the folder of the base. Files
of a folder are copied as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from com_lightning.errors import MergeError, reason
from com_lightning.experts.files import TOKENIZER_FOLDERS, leads_out, read_json
from com_lightning.experts.state_dicts import some

_VOCABULARIES = ("*tokenizer*", "*vocab*", "*.model", "*.spm", "*.tiktoken", "tekken.json")
_PROCESSORS = ("*processor*.json",)
_BESIDE = (
    *("added_tokens*.json", "special_tokens*.json", "merges*", "*.bpe", "bpe.codes", "dict.txt", "emoji.json"),
    *("normalizer.json", "chat_template*", "*.jinja"),
)
"""Files that a tokenizer or processor may need, and that are none alone."""
_SUFFIXES = (".bpe", ".codes", ".jinja", ".json", ".model", ".spm", ".tiktoken", ".txt")
"""No code, no weights."""
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", *_PROCESSORS)
_NAMES = (
    *("_name_or_path", "name_or_path", "processor_class", "transformers_version"),
    *("added_tokens_decoder", "additional_special_tokens", "chat_template", "extra_special_tokens"),
)
"""Settings that do not change what a tokenizer does; and tokens and templates, which are compared by themselves."""
_FOLDER = "_expert_folder"


def remember_folder(part: nn.Module, folder: Path) -> None:
    """Note the folder that the weights of a module were read from, for :func:`find_tokenizer`."""
    setattr(part, _FOLDER, str(folder))


def source_folder(part: nn.Module) -> Path | None:
    """The local folder that a transformers model was loaded from; ``None`` if it was not loaded from a folder."""
    name = getattr(getattr(part, "config", None), "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def find_tokenizer(module: nn.Module, part: nn.Module) -> TokenSource | None:
    """Find the tokenizer or processor of a transformers model.

    Args:
        module: has the model as a part.
        part: the model.

    Returns:
        That of the expert's own folder; else that which the module holds as an attribute; else that of the folder which
        the model was loaded from. ``None`` if there is none.
    """
    own = _expert_folder(module, part)
    if own and (not own.is_dir() or _has_tokenizer(own)):  # a folder that is gone is told of
        return TokenSource(own)
    if held := _held(module, part):
        return TokenSource(held)
    base = source_folder(part)
    return TokenSource(base) if base and _has_tokenizer(base) else None


class TokenSource:
    """A tokenizer or processor, in a folder or in memory.

    Args:
        where: the folder, or the object.
    """

    def __init__(self, where: Any) -> None:
        self.folder = where if isinstance(where, Path) else None
        self._held = None if isinstance(where, Path) else where

    def __str__(self) -> str:
        return str(self.folder) if self.folder else f"the module's {type(self._held).__name__}"

    @cached_property
    def key(self) -> Any:
        """Equal for two sources of the same content."""
        return tuple((name, _digest(path)) for name, path in self.files.items()) or self.folder or id(self._held)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Name in the folder -> path, for all files of the tokenizer or processor. No file outside of it."""
        if not (self.folder and self.folder.is_dir()):
            return {}
        paths = {path.name: path for path in self.folder.iterdir() if _belongs(path.name)}
        for inner in self.folder.iterdir():
            if inner.is_dir() and _matches(inner.name, TOKENIZER_FOLDERS) and not leads_out(inner, self.folder):
                paths.update({f"{inner.name}/{path.name}": path for path in inner.iterdir()})
        return {
            name: path
            for name, path in sorted(paths.items())
            if path.is_file() and path.suffix in _SUFFIXES and not leads_out(path, self.folder)
        }

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; ``None`` if there is none, as with a processor of images.

        Raises:
            MergeError: if it cannot be loaded.
        """
        if self.folder is None:
            held = getattr(self._held, "tokenizer", self._held)
            return held if hasattr(held, "get_vocab") else None
        if not any(_matches(name, _VOCABULARIES) for name in self.files):
            return None
        from transformers import AutoTokenizer, PreTrainedTokenizerBase

        try:
            loaded = AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True, trust_remote_code=False)
        except BaseException as error:  # a tokenizer in Rust panics with an error that is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise MergeError([_printable(text)]) from error
        if not isinstance(loaded, PreTrainedTokenizerBase):
            raise MergeError([f"its class, {type(loaded).__name__}, is no tokenizer"])
        return loaded

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token -> number; empty if there is no tokenizer.

        Raises:
            MergeError: if it cannot be loaded.
        """
        if self.tokenizer is None:
            return {}
        try:
            return dict(self.tokenizer.get_vocab())
        except Exception as error:
            raise MergeError([reason(error)]) from error

    @cached_property
    def template(self) -> str | None:
        """The default chat template."""
        try:
            template = getattr(self.tokenizer, "chat_template", None)
        except MergeError:
            template = None
            with suppress(KeyError, OSError):
                template = self.files["chat_template.jinja"].read_text(encoding="utf-8", errors="replace")
        return template.get("default") if isinstance(template, dict) else template

    @cached_property
    def settings(self) -> dict[str, str]:
        """Settings of the tokenizer or processor, from its files, as text."""
        found: dict[str, str] = {}
        for name, path in self.files.items():
            if _matches(name, _SETTINGS):
                with suppress(MergeError, RecursionError):  # whoever loads it is told
                    settings = {key: value for key, value in read_json(path).items() if key not in _NAMES}
                    found |= {_printable(f"{key} of {name}"): json.dumps(v) for key, v in settings.items()}
        return found

    def write(self, target: Path) -> None:
        """Copy the files to a folder, or save the object there.

        Raises:
            MergeError: if there is nothing to write, or it cannot be read or saved.
        """
        try:
            if self._held is not None:
                self._held.save_pretrained(target)
            contents = {name: path.read_bytes() for name, path in self.files.items()}
        except Exception as error:
            raise MergeError([reason(error)]) from error
        if self.folder and not contents:
            raise MergeError(["it is no longer there"])
        for name, content in contents.items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)


def write_tokenizer(sources: Mapping[str, TokenSource | None], target: Path) -> list[str]:
    """Write one tokenizer or processor for all tasks that share a folder.

    It is the one with the most tokens; of equal ones, the first with a chat template. Chat templates of the others are
    written beside it.

    Args:
        sources: task -> its tokenizer.
        target: the folder.

    Returns:
        Warnings of what the other tasks' tokenizers have that is not written.
    """
    found = {task: source for task, source in sources.items() if source is not None}
    if not found:
        return []
    chosen, told = next(iter(found)), []
    if len({source.key for source in found.values()}) > 1:
        chosen = max(found, key=lambda task: (_size(found[task]), bool(found[task].template)))
    source = found[chosen]
    try:
        source.write(target)
    except MergeError as error:
        told.append(f"{target.name}: the tokenizer of '{chosen}' ({source}) is not written: {error.problems[0]}")
    others = {task: other for task, other in found.items() if other.key != source.key}
    return told + _differences(chosen, source, others, target)


def _differences(chosen: str, source: TokenSource, others: Mapping[str, TokenSource], target: Path) -> list[str]:
    """Say what the tokenizers of other tasks have that the one which is written has not."""
    told = []
    templates = {t: other.template for t, other in others.items() if other.template not in (None, source.template)}
    for task, template in templates.items():
        (target / f"chat_template_{task}.jinja").write_text(_printable(str(template)), encoding="utf-8")
    if templates:
        has = f"has that of '{chosen}'" if source.template else f"is that of '{chosen}', which has none"
        told.append(
            f"{target.name}: the tasks' chat templates differ; the tokenizer {has}, and those of "
            f"{_quoted(list(templates))} are beside it, as chat_template_<task>.jinja"
        )
    for task, other in others.items():
        try:
            lacking = [repr(token) for token in other.vocabulary if token not in source.vocabulary]
        except MergeError:  # pre-flight has told of it
            lacking = []
        if lacking:
            told.append(
                f"{target.name}: the tokenizer is that of '{chosen}'; it lacks tokens of '{task}': {some(lacking)}"
            )
        keys = sorted({key for key, _ in source.settings.items() ^ other.settings.items()})
        if keys and source.folder and other.folder:
            told.append(f"{target.name}: the tokenizer is that of '{chosen}'; that of '{task}' differs in {some(keys)}")
    return told


def _printable(text: str) -> str:
    """Returns a text of any file so that it can be written as UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # whoever reads it is told
        return str(error)


def _quoted(tasks: Sequence[str]) -> str:
    return ", ".join(f"'{task}'" for task in tasks)


def _size(source: TokenSource) -> int:
    try:
        return len(source.vocabulary)
    except MergeError:
        return 0


def _expert_folder(module: nn.Module, part: nn.Module) -> Path | None:
    """The folder that an expert's part, what is in it or what it is in was read from."""
    inside = {id(inner) for inner in part.modules()}
    for holder in module.modules():
        folder = vars(holder).get(_FOLDER)
        if folder is not None and (id(holder) in inside or any(inner is part for inner in holder.modules())):
            return Path(folder)
    return None


def _held(module: nn.Module, part: nn.Module) -> Any:
    """The tokenizer or processor that a module holds: one of the model's name, or the first."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from transformers.feature_extraction_utils import FeatureExtractionMixin
    from transformers.image_processing_base import ImageProcessingMixin

    kinds = (ProcessorMixin, PreTrainedTokenizerBase, ImageProcessingMixin, FeatureExtractionMixin)
    held = [value for kind in kinds for value in vars(module).values() if isinstance(value, kind)]
    name = getattr(getattr(part, "config", None), "_name_or_path", None)
    named = [v for v in held if name and getattr(getattr(v, "tokenizer", v), "name_or_path", None) == name]
    return next(iter([*named, *held]), None)


def _has_tokenizer(folder: Path) -> bool:
    files = TokenSource(folder).files
    return any(_matches(name, (*_VOCABULARIES, *_PROCESSORS)) for name in files)


def _belongs(name: str) -> bool:
    return _matches(name, (*_VOCABULARIES, *_PROCESSORS, *_BESIDE))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
