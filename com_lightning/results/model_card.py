"""Model cards: ``README.md`` in the format of the Hugging Face Hub, which begins with metadata in YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from com_lightning.results.report import MergeReport
from com_lightning.results.tables import labelled

_PAPERS = {
    "ChainOfMerges": ("Chain of Merges", "2508.21421"),
    "RegMean": ("RegMean", "2212.09849"),
    "TaskArithmetic": ("Task arithmetic", "2212.04089"),
    "TIES": ("TIES-Merging", "2306.01708"),
}

_CARRIED = ("base_model", "base_model_relation", "license", "pipeline_tag")
_PICTURE = re.compile(r"\n!\[[^\]]*\]\(report\.png\)\n")
"""Is not exported."""

_ADAPTERS = "`adapters` has one base and an adapter of PEFT for each task. Their READMEs show how to load them."
_LICENSE = "No license is set: those of the experts, and of what they were fine-tuned from, say what is allowed."
_FULL_REPORT = "Full report: `report.md`, `report.html`, `report.json`."


def model_card(report: MergeReport, files: Sequence[str], classes: Mapping[str, str]) -> str:
    """The model card of a merge: its experts, data, method and metrics, and how to load the result.

    Args:
        report: Report of the merge.
        files: Names of the files beside the card.
        classes: Task -> full name of its module's class.

    Returns:
        The text.
    """
    method = str(report.method.get("class"))
    metadata = _metadata("lightning", report)
    name, paper = _PAPERS.get(method, (method, ""))
    reference = f"{name} ([arXiv {paper}](https://arxiv.org/abs/{paper}))" if paper else name
    metric = labelled(f"`{report.monitor}`", report.lower_is_better)
    library = f"com_lightning {report.versions.get('com_lightning', '')}".strip()
    parts = [
        _front(metadata),
        f"# {len(report.tasks)} models in one: {', '.join(report.tasks)}",
        f"Merged without retraining by {reference} with {library}. {report.headline}".strip(),
        "## Experts",
        "\n".join(_expert(report, task, classes.get(task)) for task in report.tasks),
        "" if "license" in metadata else _LICENSE,
        "## Metrics" if report.metrics else "",
        f"{metric}, on validation data:\n\n{report.task_table()}" if report.metrics else "",
        "![each task before and after the merge, and the drift of inputs](report.png)" if "report.png" in files else "",
        "## How to load it",
        f"```python\n{loading_code(report.tasks, files, classes)}\n```",
        _ADAPTERS if any(file.endswith("/adapter_config.json") for file in files) else "",
        "## How it was made",
        f"```text\n{report.command}\n```" if report.command else "",
        report.summary(),
        "\n".join(f"- `{name}`: {value}" for name, value in report.method.items() if name != "class"),
        "\n".join(f"> {warning}" for warning in report.warnings),
        _FULL_REPORT,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def pretrained_card(model_class: str, source: str, merge_card: str = "", task: str | None = None) -> str:
    """The model card of an exported transformers model.

    Args:
        model_class: Name of its class.
        source: What it was exported from.
        merge_card: The card of the merge if it is known. Everything but how to load it is taken over.
        task: The task that the model is for, if there is one for each.

    Returns:
        The text.
    """
    front = yaml.safe_load(merge_card.split("---\n")[1]) if merge_card.startswith("---\n") else {}
    known = {name: front[name] for name in _CARRIED if name in front} if isinstance(front, dict) else {}
    metadata = {"library_name": "transformers", **known, "tags": ["merge", "model-merging"]}
    _, _, rest = merge_card.partition("\n# ")
    about, _, rest = rest.partition("\n## How to load it\n")
    about = _PICTURE.sub("", about)
    if task and about:
        heading, _, told = about.partition("\n")
        about = f"{task}: the model of one task, from {heading}\n{told}"
    _, _, history = rest.partition("\n## How it was made\n")
    code = f'from transformers import {model_class}\n\nmodel = {model_class}.from_pretrained(".")'
    parts = [
        _front(metadata),
        f"# {about.strip()}" if about else f"# {model_class}, exported from {source}",
        "## How to load it",
        f"```python\n{code}\n```",
        f"## How it was made\n{history}".rstrip().removesuffix(_FULL_REPORT).rstrip() if history else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapter_card(name: str, model_class: str, base: str, notes: Sequence[str] = (), merge_card: str = "") -> str:
    """The model card of an adapter of PEFT.

    Args:
        name: of the adapter's folder.
        model_class: name of the class of the model that it is for.
        base: folder or name of that model.
        notes: what is to be known of it, each a paragraph.
        merge_card: the card of the merge if it is known. How it was made is taken over.

    Returns:
        The text.
    """
    metadata = {"library_name": "peft", "base_model": base, "tags": ["lora", "merge", "model-merging"]}
    _, _, history = merge_card.partition("\n## How it was made\n")
    is_checkpoint = base.endswith(".ckpt")
    load = f'load_from_checkpoint("{base}", weights_only=True)' if is_checkpoint else f'from_pretrained("{base}")'
    lines = ["from peft import PeftModel", *[f"from transformers import {model_class}"] * (not is_checkpoint), ""]
    lines += [f"base = {model_class}.{load}", f'model = PeftModel.from_pretrained(base, "{name}").eval()']
    parts = [
        _front(metadata),
        f"# {name.rpartition('/')[2]}: an adapter of PEFT",
        *notes,
        "## How to load it",
        "\n".join(["```python", *lines, "```"]),
        f"## How it was made\n{history}".rstrip().removesuffix(_FULL_REPORT).rstrip() if history else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def adapters_card(model_class: str, tasks: Sequence[str], rank: int, is_plain: bool) -> str:
    """How to load one base with many adapters.

    Args:
        model_class: name of the base's class.
        tasks: names of the adapters' folders.
        rank: the largest rank.
        is_plain: whether it is a causal language model with adapters that engines load.

    Returns:
        The text.
    """
    first, *others = tasks
    lines = ["from peft import PeftModel", f"from transformers import {model_class}", ""]
    lines += [f'base = {model_class}.from_pretrained("base")']
    lines += [f'model = PeftModel.from_pretrained(base, "{first}", adapter_name="{first}").eval()']
    lines += [f'model.load_adapter("{task}", adapter_name="{task}")' for task in others]
    lines += [f'model.set_adapter("{tasks[-1]}")  # the task of the next forwards']
    parts = [f"# One model and {len(tasks)} adapters: {', '.join(tasks)}", "\n".join(["```python", *lines, "```"])]
    if is_plain:
        largest = next((size for size in (8, 16, 32, 64, 128, 256, 320, 512) if size >= rank), rank)
        names = " ".join(f"{task}={task}" for task in tasks)
        serve = f"vllm serve base --enable-lora --max-lora-rank {largest} --lora-modules {names}"
        parts.append(f"An engine for many adapters:\n\n```bash\n{serve}\n```")
    return "\n\n".join(parts) + "\n"


def _expert(report: MergeReport, task: str, module_class: str | None) -> str:
    samples, origin = report.samples.get(task), report.origins.get(task)
    source = origin.source if origin else ""
    if origin and origin.hub_name:
        source = f"[{origin.hub_name}](https://huggingface.co/{origin.hub_name})"
    elif source and not source.endswith(" in memory"):
        source = f"`{source}`"
    notes = [source, f"`{module_class}`" if module_class else "", f"{samples} calibration samples" if samples else ""]
    notes += [f"fine-tuned from {origin.base}" if origin and origin.base else ""]
    notes += [f"license {origin.license}" if origin and origin.license else ""]
    return f"- **{task}**: {', '.join(filter(None, notes))}".removesuffix(": ")


def _metadata(library: str, report: MergeReport) -> dict[str, Any]:
    """What the Hub reads: only what the experts' own cards and names say, and what they agree on."""
    origins = [report.origins.get(task) for task in report.tasks]
    bases = dict.fromkeys(name for o in origins if o for name in [o.hub_name or o.base] if name)
    licenses, tags = ({getattr(origin, name, None) for origin in origins} for name in ("license", "pipeline_tag"))
    found: dict[str, Any] = {"library_name": library}
    found.update({"base_model": list(bases), "base_model_relation": "merge"} if bases else {})
    found.update({"license": licenses.pop()} if len(licenses) == 1 and None not in licenses else {})
    found.update({"pipeline_tag": tags.pop()} if len(tags) == 1 and None not in tags else {})
    return {**found, "tags": ["merge", "model-merging", str(report.method.get("class")).lower()]}


def _front(metadata: Mapping[str, Any]) -> str:
    return f"---\n{yaml.safe_dump(dict(metadata), sort_keys=False, allow_unicode=True).strip()}\n---"


def loading_code(tasks: Sequence[str], files: Sequence[str], classes: Mapping[str, str]) -> str:
    """Code that loads the first task's module, and the transformers model if there is one.

    Args:
        tasks: Names of the tasks.
        files: Names of the files beside the report.
        classes: Task -> full name of its module's class.

    Returns:
        The lines.
    """
    first = tasks[0]
    module, _, name = classes.get(first, "MyModule").partition(".<locals>")[0].rpartition(".")
    lines = [f"from {module} import {name}", ""] if module and module != "__main__" else []
    if checkpoint := next((file for file in (f"{first}.ckpt", "merged.ckpt") if file in files), None):
        lines.append(f'model = {name}.load_from_checkpoint("{checkpoint}", weights_only=True)  # {first}')
    configs = [file for file in files if file.endswith("/config.json") and not file.startswith("adapters/")]
    if folders := [file.removesuffix("/config.json") for file in configs]:
        folder = next((folder for folder in folders if first in folder.split("/")), folders[0])
        lines += ["", "from transformers import AutoModel", "", f'network = AutoModel.from_pretrained("{folder}")']
    return "\n".join(lines)
