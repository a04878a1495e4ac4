"""Experts by their name on the Hugging Face Hub: ``hf://owner/name``, or ``hf://owner/name@revision``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from com_lightning.errors import MergeError, reason
from com_lightning.extras import check_installed

_SCHEME = "hf://"
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CONFIGS = ("config.json", "adapter_config.json")
_SUFFIXES = (".jinja", ".json", ".model", ".safetensors", ".spm", ".tiktoken", ".txt")
"""Suffixes of files that are downloaded: weights, configurations and tokenizers. No code, and no pickles."""
_FOLDER = "additional_chat_templates/"
"""The folder whose files are downloaded, too."""


def is_hub_name(source: Any) -> bool:
    """Whether an expert is given by its name on the Hub."""
    return isinstance(source, str) and source.startswith(_SCHEME)


def local_folders(sources: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Sources with a local folder in place of each name on the Hub.

    All names are looked up before the first is downloaded. Nothing is downloaded if there is a problem with one of
    them. A model is a folder that ``save_pretrained`` of transformers or PEFT has written, in safetensors. Downloads go
    to the cache of ``huggingface_hub``, and models in this cache are used without a network.

    Args:
        sources: label for messages -> a name on the Hub, or any other source, which stays as it is.

    Returns:
        The sources, without those that cannot be downloaded; and the problems with those, each as one sentence.
    """
    local: dict[str, Any] = {label: source for label, source in sources.items() if not is_hub_name(source)}
    models: dict[str, _Model] = {}
    problems = []
    for label, source in sources.items():
        if label not in local:
            try:
                models[label] = _look_up(source)
            except Exception as error:
                problems.append(f"{label} ({source}): {_message(error)}")
    for label, model in {} if problems else models.items():
        try:
            local[label] = model.folder()
        except Exception as error:  # the network, or the disk
            problems.append(f"{label} ({sources[label]}): {_message(error)}")
    return {label: local[label] for label in sources if label in local}, problems


class _Model:
    """A model on the Hub or in the cache: its name, its commit, and those of its files that are downloaded."""

    def __init__(self, name: str, commit: str | None, files: Sequence[str], cached: Path | None = None) -> None:
        self.name, self.commit, self.cached = name, commit, cached
        self.files = [f for f in files if f.endswith(_SUFFIXES) and "/" not in f.removeprefix(_FOLDER)]
        if not any(config in files for config in _CONFIGS):
            raise MergeError([f"there is no {' or '.join(_CONFIGS)} in it; only what save_pretrained writes is read"])
        if not any(file.endswith(".safetensors") for file in self.files):
            raise MergeError(["it has no weights in safetensors, and others are not downloaded"])

    def folder(self) -> Path:
        from huggingface_hub import snapshot_download

        return self.cached or Path(snapshot_download(self.name, revision=self.commit, allow_patterns=self.files))


def _look_up(source: str) -> _Model:
    check_installed("huggingface_hub", "models on the Hub")
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    match = _NAME.fullmatch(source)
    if match is None:
        raise MergeError(["a name on the Hub is hf://owner/name or hf://owner/name@revision"])
    name, revision = match.groups()
    try:
        info = HfApi().model_info(name, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # there is no network, or it must not be used
        try:
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except FileNotFoundError:
            cached = None
        if cached is None:
            raise
        return _Model(name, revision, [path.name for path in cached.iterdir()], cached)
    return _Model(name, info.sha, [file.rfilename for file in info.siblings or ()])


def _message(error: Exception) -> str:
    """What went wrong, without the Hub's advice on calling its functions."""
    if isinstance(error, MergeError):
        return error.problems[0]
    types = {base.__name__ for base in type(error).__mro__}
    if "GatedRepoError" in types:
        return "is gated: ask for access on its page, and log in with `hf auth login`"
    if "RepositoryNotFoundError" in types:
        return "there is no such model on the Hub; if it is private, log in with `hf auth login`"
    if "RevisionNotFoundError" in types:
        return "the model has no such revision"
    return f"cannot be downloaded from the Hub, and is not in the cache ({reason(error)})"
