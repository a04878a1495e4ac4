"""The model card of a merge: ``README.md``, in the format of the Hugging Face Hub."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from com_lightning.results.report import MergeReport

_PAPERS = {
    "ChainOfMerges": ("Chain of Merges", "2508.21421"),
    "RegMean": ("RegMean", "2212.09849"),
    "TaskArithmetic": ("Task arithmetic", "2212.04089"),
    "TIES": ("TIES-Merging", "2306.01708"),
}

_WHOLE = "The whole report: `report.md`, `report.html`, `report.json`."


def model_card(report: MergeReport, files: Sequence[str], kinds: Mapping[str, str]) -> str:
    """Experts, data, method, metrics, and how to load what was merged.

    Args:
        report: of the merge.
        files: what is beside the card.
        kinds: task -> class of its module, with the module it is in.
    """
    method = str(report.method.get("class"))
    about = {"library_name": "lightning", "tags": ["merge", "model-merging", method.lower()]}
    if metrics := _results(report):
        about["model-index"] = [{"name": "merged", "results": metrics}]  # type: ignore[list-item]
    settings = "\n".join(f"- `{name}`: {value}" for name, value in report.method.items() if name != "class")
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True).strip()}\n---",
        f"# {len(report.tasks)} models in one: {', '.join(report.tasks)}",
        f"Merged without retraining by {_named(method)} with com_lightning{_of(report.versions.get('com_lightning'))}.",
        "## Experts",
        "\n".join(f"- **{task}**{_of(kinds.get(task), '`')}{_samples(report, task)}" for task in report.tasks),
        "## Metrics" if report.metrics else "",
        f"`{report.metric}` on validation data:\n\n{report.task_table()}" if report.metrics else "",
        "## How to load it",
        _loading(report.tasks, files, kinds),
        "## How it was made",
        report.summary(),
        settings,
        "\n".join(f"> {warning}" for warning in report.warnings),
        _WHOLE,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pretrained_card(kind: str, source: str, made_by: str = "") -> str:
    """The card of a transformers model that has been exported.

    Args:
        kind: its class.
        source: what it was exported from.
        made_by: the card of the merge, where it is known; what follows its first heading is taken over.
    """
    about = {"library_name": "transformers", "tags": ["merge", "model-merging"]}
    _, _, rest = made_by.partition("\n# ")
    rest, _, after = rest.partition("\n## How to load it\n")
    _, _, after = after.partition("\n## How it was made\n")
    loading = f'```python\nfrom transformers import {kind}\n\nmodel = {kind}.from_pretrained(".")\n```'
    parts = [
        f"---\n{yaml.safe_dump(about, sort_keys=False).strip()}\n---",
        f"# {rest.strip()}" if rest else f"# {kind}, exported from {source}",
        "## How to load it",
        loading,
        f"## How it was made\n{after}".rstrip().removesuffix(_WHOLE).rstrip() if after else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _named(method: str) -> str:
    name, paper = _PAPERS.get(method, (method, ""))
    return f"{name} ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else name


def _of(what: str | None, quote: str = "") -> str:
    return f" {quote}{what}{quote}" if what else ""


def _samples(report: MergeReport, task: str) -> str:
    count = report.samples.get(task)
    return f", {count} calibration samples" if count else ""


def _results(report: MergeReport) -> list[dict[str, Any]]:
    """For the Hub's index of results."""
    found = []
    for task in report.tasks:
        value = report.metrics.get("merged", {}).get(task, {}).get(report.metric or "")
        if value is not None and math.isfinite(value):
            data = {"name": task, "type": task}
            measured = [{"name": report.metric, "type": report.metric, "value": round(float(value), 6)}]
            found.append({"task": {"type": "other", "name": task}, "dataset": data, "metrics": measured})
    return found


def _loading(tasks: Sequence[str], files: Sequence[str], kinds: Mapping[str, str]) -> str:
    first = tasks[0]
    module, _, name = kinds.get(first, "MyModule").partition(".<locals>")[0].rpartition(".")
    shown = next((file for file in (f"{first}.ckpt", "merged.ckpt") if file in files), None)
    lines = [f"from {module} import {name}", ""] if module and module != "__main__" else []
    if shown:
        lines.append(f'model = {name}.load_from_checkpoint("{shown}", weights_only=True)  # {first}')
    if folders := [file.removesuffix("/config.json") for file in files if file.endswith("/config.json")]:
        own = next((folder for folder in folders if first in folder.split("/")), folders[0])
        lines += ["", "from transformers import AutoModel", "", f'network = AutoModel.from_pretrained("{own}")']
    return "\n".join(["```python", *lines, "```"])
