"""Adapters of PEFT for engines that serve one base with many of them, and a LoRA of a merged model over its base.

Engines such as vLLM load the factors of linear layers, and neither modules that an adapter replaces as a whole
(``modules_to_save``) nor biases. :func:`refused_by_engines` says what an adapter has of these.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from com_lightning.errors import MergeError, paths_told
from com_lightning.experts.adapter_config import ADAPTER_CONFIG, read_config
from com_lightning.experts.files import folder_problems, leads_out, read_json
from com_lightning.experts.state_dicts import some
from com_lightning.experts.transformers_models import MODEL_CONFIG, architectures, load_as
from com_lightning.results.corrections import BASE, BASE_CHECKPOINT
from com_lightning.results.export import (
    PRECISIONS,
    copy_model,
    load_source,
    locate,
    merge_card,
    model_folder_problems,
    output_problems,
    publish,
)
from com_lightning.results.folder import ADAPTERS
from com_lightning.results.lora import Adapter, adapter_between, grouped, write_adapter
from com_lightning.results.model_card import adapter_card, adapters_card

_WEIGHTS = "adapter_model.safetensors"


def export_adapters(
    source: Path,
    output_dir: Path,
    task: str | None = None,
    precision: str | None = None,
    base_name: str | None = None,
) -> Path:
    """Write the merged base and the tasks' adapters, from the result of a merge with corrections of low rank.

    The folder has ``base`` (model and tokenizer, for ``from_pretrained``) and a folder for each task, as
    ``PeftModel.from_pretrained`` and engines for many adapters load them, and a README that says how.

    Args:
        source: the folder of a merge.
        output_dir: where to write. The folder must not exist yet.
        task: the only task whose adapter is wanted; by default all.
        precision: precision of all weights, a name of :data:`~com_lightning.results.export.PRECISIONS`. By default they
            are not converted.
        base_name: what the adapters name as their base, for example the name that it will have on the Hub; by default
            its folder.

    Returns:
        ``output_dir``.

    Raises:
        MergeError: if the folder exists, an option is wrong, or the source has no adapters that can be read.
    """
    problems, folders = output_problems(output_dir, precision), []
    try:
        with paths_told("export"):
            folders = _adapters_in(source, task)
    except MergeError as error:
        problems += error.problems
    if problems:
        raise MergeError(problems)
    base, dtype = source / ADAPTERS / BASE, PRECISIONS[precision] if precision else None
    name, history = base_name or str(output_dir / BASE), merge_card(source)
    model_class = (architectures(read_json(base / MODEL_CONFIG)) or ["AutoModel"])[0]
    refused = {folder.name: refused_by_engines(folder) for folder in folders}

    def write(made: Path) -> None:
        (made / BASE).mkdir()
        copy_model(base, made / BASE, dtype)
        for folder in folders:
            target = made / folder.name
            target.mkdir()
            settings = {**read_json(folder / ADAPTER_CONFIG), "base_model_name_or_path": name}
            (target / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            _copy_weights(folder / _WEIGHTS, target / _WEIGHTS, dtype)
            card = adapter_card(folder.name, model_class, name, _told(refused[folder.name]), history)
            (target / "README.md").write_text(card, encoding="utf-8")
        ranks = [int(read_json(folder / ADAPTER_CONFIG)["r"]) for folder in folders]
        is_plain = model_class.endswith(("ForCausalLM", "LMHeadModel")) and not any(refused.values())
        card = adapters_card(model_class, [folder.name for folder in folders], max(ranks), is_plain)
        (made / "README.md").write_text(card, encoding="utf-8")

    publish(output_dir, write)
    told: dict[str, list[str]] = {}
    for folder in folders:
        for problem in refused[folder.name]:
            told.setdefault(problem, []).append(folder.name)
    for problem, tasks in told.items():
        rank_zero_warn(f"{', '.join(tasks)}: engines such as vLLM do not load {problem}; with PEFT all of it is loaded")
    return output_dir


def export_lora(
    source: Path | nn.Module,
    output_dir: Path,
    base: Path | nn.Module,
    rank: int,
    task: str | None = None,
    precision: str | None = None,
    base_name: str | None = None,
    lora_only: bool = False,
) -> Adapter:
    """Write a merged model as a LoRA of its base: the nearest adapter of a rank.

    Args:
        source: the folder of a merge or of a transformers model, a checkpoint of a module that holds one, or a module.
        output_dir: where to write. The folder must not exist yet.
        base: what the experts were fine-tuned from: the folder of a transformers model, or a module with the modules
            of ``source``. A head that the folder lacks is written as a whole.
        rank: the largest rank of a layer.
        task: which task's model, if the tasks of a merge have parameters of their own.
        precision: precision of the adapter, a name of :data:`~com_lightning.results.export.PRECISIONS`; by default that
            of the base.
        base_name: what the adapter names as its base, for example its name on the Hub; by default its folder.
        lora_only: leave out biases, and normalisations and heads, which engines for many adapters do not load.

    Returns:
        The adapter. ``kept`` is the share of the squared difference that it has.

    Raises:
        MergeError: if the folder exists, an option is wrong, a model cannot be read, or they are not alike.
    """
    problems = output_problems(output_dir, precision)
    if rank < 1:
        problems.append(f"rank: must be 1 or more, got {rank}")
    if isinstance(base, Path):
        with paths_told("base"):
            if (base / ADAPTER_CONFIG).is_file():
                problems.append(f"base: {base} is an adapter; name the folder of the model that it was trained on")
            elif not (base / MODEL_CONFIG).is_file():
                problems.append(f"base: {base} has no {MODEL_CONFIG}; name the folder of the model that was fine-tuned")
            else:
                problems += [f"base: {base} {problem}" for problem in folder_problems(base)]
    if problems:
        raise MergeError(problems)
    history = ""
    if isinstance(source, Path):
        with paths_told("export"):
            folder, checkpoint = locate(source, task, base if isinstance(base, Path) else None)
        if found := model_folder_problems(folder, has_weights=checkpoint is None):
            raise MergeError(found)
        model, history = load_source(folder, checkpoint), merge_card(source)
    else:
        model = source
    origin, missing = load_as(model, base, f"base ({base})") if isinstance(base, Path) else (base, [])
    adapter = adapter_between(origin, model, rank, approximate=True, lora_only=lora_only, missing=missing)
    name = base_name or (str(base) if isinstance(base, Path) else "base")

    def write(made: Path) -> None:
        write_adapter(adapter, origin, model, made, name)
        if precision:
            _copy_weights(made / _WEIGHTS, made / _WEIGHTS, PRECISIONS[precision])
        notes = [*adapter.notes(), *_told(refused_by_engines(made))]
        card = adapter_card(str(output_dir), type(model).__name__, name, notes, history)
        (made / "README.md").write_text(card, encoding="utf-8")

    publish(output_dir, write)
    if adapter.left_out:
        rank_zero_warn(f"{output_dir.name}: these layers stay as in the base: {grouped(adapter.left_out)}")
    if missing and lora_only:
        rank_zero_warn(f"{output_dir.name}: {some(missing)} is neither in the base's folder nor in the adapter")
    for problem in refused_by_engines(output_dir):
        rank_zero_warn(
            f"{output_dir.name}: engines such as vLLM do not load {problem}; with PEFT all of it is loaded. lora_only "
            "leaves it out"
        )
    return adapter


def refused_by_engines(folder: Path) -> list[str]:
    """Say what an adapter has that engines for many adapters do not load.

    These are the limits of vLLM's LoRA (``vllm.lora.peft_helper``): factors of linear layers and embeddings alone.

    Args:
        folder: of an adapter of PEFT.

    Returns:
        What it is, in words; nothing if engines load all of it.
    """
    with safe_open(folder / _WEIGHTS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    names = [name.removeprefix("base_model.model.") for name in shapes]
    whole = dict.fromkeys(name.rpartition(".")[0] for name in names if ".lora_" not in name)
    biases = [name.partition(".lora_")[0] for name in names if name.endswith(".lora_B.bias")]
    filters = [n.partition(".lora_")[0] for n, s in zip(names, shapes.values()) if ".lora_A" in n and len(s) > 2]
    told = [f"modules that the adapter replaces as a whole: {grouped([*whole])}"] * bool(whole)
    told += [f"biases, which it changes at {grouped(biases)}"] * bool(biases)
    return told + [f"factors of convolutions: {grouped(filters)}"] * bool(filters)


def _told(refused: Sequence[str]) -> list[str]:
    return [f"Engines such as vLLM do not load {problem}." for problem in refused]


def _adapters_in(source: Path, task: str | None) -> list[Path]:
    """The folders of the tasks' adapters in the result of a merge, which are complete and harmless."""
    place = source / ADAPTERS
    if not source.is_dir():
        raise MergeError([f"{source}: is not the folder of a merge; adapters are in the result of one with task_rank"])
    if leads_out(place, source):
        raise MergeError([f"{source}: {ADAPTERS} is a link that leads out of it; give the folder itself"])
    found = sorted(path.parent for path in place.glob(f"*/{ADAPTER_CONFIG}"))
    if not found:
        advice = "merge with task_rank (--config adapters); or give a rank and a base, for a LoRA of the whole"
        raise MergeError([f"{source}: no adapters are in it; {advice}"])
    if (place / BASE_CHECKPOINT).is_file():
        advice = f"{place} is as PEFT loads it; engines for many adapters serve transformers models alone"
        raise MergeError([f"{source}: the base is a Lightning checkpoint, not a transformers model: {advice}"])
    chosen = [folder for folder in found if task in (None, folder.name)]
    if not chosen:
        raise MergeError([f"task: {source} has adapters of {some([f.name for f in found])}, and none of '{task}'"])
    problems = model_folder_problems(place / BASE, has_weights=True)
    for folder in chosen:
        faults = folder_problems(folder)
        faults += [] if (folder / _WEIGHTS).is_file() else [f"has no {_WEIGHTS}"]
        problems += [f"{folder}: {fault}" for fault in faults]
        if not faults:
            read_config(folder, str(folder))
    if problems:
        raise MergeError(problems)
    return chosen


def _copy_weights(path: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy a file of weights, converted to another precision if one is given."""
    if dtype is None:
        shutil.copyfile(path, target)
        return
    tensors: dict[str, Any] = load_file(path)
    mode = path.stat().st_mode
    save_file({n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}, target, {"format": "pt"})
    target.chmod(mode)  # safetensors makes its files private to their owner
