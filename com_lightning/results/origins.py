"""Where experts come from, and what their folders say about them, for reports and model cards."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from com_lightning.experts.hub import is_hub_name

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LONGEST = 2**20
"""Bytes of a model card or a configuration that are read."""


@dataclass(frozen=True)
class Origin:
    """Where an expert comes from.

    Attributes:
        source: Path, name on the Hub (``hf://owner/name``), or class of what was in memory.
        base: Name on the Hub of the model that it was fine-tuned from, by its own card or configuration.
        license: Its licence, by its own card.
        pipeline_tag: Its kind of task in the Hub's words, by its own card.
    """

    source: str
    base: str | None = None
    license: str | None = None
    pipeline_tag: str | None = None

    @property
    def hub_name(self) -> str | None:
        """``owner/name`` of an expert from the Hub."""
        return self.source.removeprefix("hf://").partition("@")[0] if is_hub_name(self.source) else None


def origin_of(source: Any, local: Path | None = None) -> Origin:
    """Find out where an expert comes from.

    Args:
        source: The expert, in any form that a merge takes.
        local: The file or folder that it was loaded from, if it was.

    Returns:
        Its origin. What its folder does not say is ``None``.
    """
    if not isinstance(source, (str, Path)):
        what = "a state dict" if isinstance(source, Mapping) else type(source).__qualname__
        return Origin(f"{what} in memory")
    folder = local if local is not None and local.is_dir() else None
    if folder is None:
        return Origin(str(source))
    card = _front_matter(folder / "README.md")
    config = _read(folder / "adapter_config.json", json.loads)
    named = card.get("base_model") or config.get("base_model_name_or_path")
    base = named[0] if isinstance(named, list) and len(named) == 1 else named
    known = [_word(card.get(name)) for name in ("license", "pipeline_tag")]
    return Origin(str(source), base if _is_hub_model(base) else None, *known)


def _is_hub_model(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_NAME.fullmatch(name)) and not Path(name).exists()


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]+", value) else None


def _front_matter(path: Path) -> dict[str, Any]:
    """The metadata in YAML that a model card begins with."""

    def parse(text: str) -> Any:
        _, _, rest = text.partition("---\n")
        return yaml.safe_load(rest.partition("\n---")[0]) if text.startswith("---\n") else {}

    return _read(path, parse)


def _read(path: Path, parse: Any) -> dict[str, Any]:
    """What a small file holds; nothing if it cannot be read: it describes an expert, and no merge depends on it."""
    try:
        if path.stat().st_size > _LONGEST:
            return {}
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
