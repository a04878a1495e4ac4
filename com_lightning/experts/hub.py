"""Experts by their name on the Hugging Face Hub: ``hf://owner/name``, or ``hf://owner/name@revision``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from com_lightning.errors import MergeError, reason

_SCHEME = "hf://"
_NAME = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_CONFIGS = ("config.json", "adapter_config.json")
_SUFFIXES = (".jinja", ".json", ".model", ".safetensors", ".txt")
"""Of what is downloaded: weights, configurations and tokenizers. No code, and nothing that is unpickled."""


def is_hub_name(source: Any) -> bool:
    """Whether an expert is given by its name on the Hub."""
    return isinstance(source, str) and source.startswith(_SCHEME)


def local_folders(sources: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Sources with a local folder in place of each name on the Hub.

    All names are looked up before the first is downloaded, and nothing is downloaded where one of them is amiss. A
    model is a folder that ``save_pretrained`` of transformers or PEFT has written, in safetensors. Downloads go to the
    cache of ``huggingface_hub``, and what it has is used without a network, too.

    Args:
        sources: what messages call it -> a name on the Hub, or any other source, which stays as it is.

    Returns:
        The sources without those that cannot be had, and what is wrong with these, each as one sentence.
    """
    found: dict[str, Any] = {label: source for label, source in sources.items() if not is_hub_name(source)}
    models: dict[str, _Model] = {}
    problems = []
    for label, source in sources.items():
        if label not in found:
            try:
                models[label] = _looked_up(source)
            except Exception as error:
                problems.append(f"{label} ({source}): {_told(error)}")
    for label, model in {} if problems else models.items():
        try:
            found[label] = model.folder()
        except Exception as error:  # the network, or the disk
            problems.append(f"{label} ({sources[label]}): {_told(error)}")
    return {label: found[label] for label in sources if label in found}, problems


class _Model:
    """A model on the Hub, or in the cache: its name, the commit, and the files that are wanted of it."""

    def __init__(self, name: str, commit: str | None, files: Sequence[str], cached: Path | None = None) -> None:
        self.name, self.commit, self.cached = name, commit, cached
        self.files = [file for file in files if file.endswith(_SUFFIXES) and "/" not in file]
        if not any(config in files for config in _CONFIGS):
            raise MergeError([f"there is no {' or '.join(_CONFIGS)} in it; only what save_pretrained writes is read"])
        if not any(file.endswith(".safetensors") for file in self.files):
            raise MergeError(["it has no weights in safetensors, and others are not downloaded"])

    def folder(self) -> Path:
        from huggingface_hub import snapshot_download

        return self.cached or Path(snapshot_download(self.name, revision=self.commit, allow_patterns=self.files))


def _looked_up(source: str) -> _Model:
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise MergeError(['needs huggingface_hub: pip install "com_lightning[text]"']) from error
    match = _NAME.fullmatch(source)
    if match is None:
        raise MergeError(["a name on the Hub is hf://owner/name or hf://owner/name@revision"])
    name, revision = match.groups()
    try:
        info = HfApi().model_info(name, revision=revision)
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception:  # there is no network, or it is not to be used
        try:
            cached = Path(snapshot_download(name, revision=revision, local_files_only=True))
        except FileNotFoundError:
            cached = None
        if cached is None:
            raise
        return _Model(name, revision, [path.name for path in cached.iterdir()], cached)
    return _Model(name, info.sha, [file.rfilename for file in info.siblings or ()])


def _told(error: Exception) -> str:
    """What went wrong, without the Hub's advice on how its own functions are called."""
    if isinstance(error, MergeError):
        return error.problems[0]
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "GatedRepoError" in kinds:
        return "is gated: ask for access on its page, and log in with `hf auth login`"
    if "RepositoryNotFoundError" in kinds:
        return "there is no such model on the Hub; if it is private, log in with `hf auth login`"
    if "RevisionNotFoundError" in kinds:
        return "the model has no such revision"
    return f"cannot be had from the Hub, nor is it in the cache ({reason(error)})"
