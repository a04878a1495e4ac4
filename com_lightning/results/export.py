"""``com-lightning export``: a transformers model for ``from_pretrained``, from a merge's result or a checkpoint.

Neither the user's LightningModule nor data are needed. In the folder of a merge the model exists already and is copied.
In a checkpoint its weights have a prefix that depends on the user's class; the prefix is found by looking for one under
which all of the model's names exist.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from com_lightning.core.tensors.modules import tied_names
from com_lightning.errors import MergeError, paths_told
from com_lightning.experts.files import folder_problems, leads_out, read_checkpoint, read_json
from com_lightning.experts.state_dicts import fill, is_peft, plain_state, some
from com_lightning.experts.tokenizers import TokenSource, find_tokenizer, write_tokenizer
from com_lightning.experts.transformers_models import MODEL_CONFIG, architectures, load_pretrained, save_model
from com_lightning.experts.vocabulary import resize_to
from com_lightning.results.atomic import Workplace
from com_lightning.results.folder import PRETRAINED
from com_lightning.results.model_card import pretrained_card

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export(
    source: Path,
    output_dir: Path,
    task: str | None = None,
    base: Path | None = None,
    precision: str | None = None,
) -> Path:
    """Write a transformers model with its tokenizer and a model card, for ``from_pretrained`` and the Hub.

    Args:
        source: The folder of a merge; or a Lightning checkpoint or state dict of a module that holds a transformers
            model, for example an expert, or a merged model that was trained further.
        output_dir: Where to write. The folder must not exist yet.
        task: Which task's model to export, if the tasks of a merge have parameters of their own.
        base: Only for a checkpoint: the folder of a transformers model of the same class. Its ``config.json`` and its
            tokenizer are used.
        precision: Precision of the weights, a name of :data:`PRECISIONS`. By default they are not converted.

    Returns:
        ``output_dir``.

    Raises:
        MergeError: If the folder exists, an option is wrong, or the model cannot be found or read.
    """
    problems = output_problems(output_dir, precision)
    try:
        with paths_told("export"):
            folder, checkpoint = locate(source, task, base)
    except MergeError as error:
        raise MergeError(problems + error.problems) from error
    problems += model_folder_problems(folder, has_weights=checkpoint is None)
    if problems:
        raise MergeError(problems)
    dtype = PRECISIONS[precision] if precision else None
    model: Any = load_source(folder, checkpoint) if checkpoint else None
    history = merge_card(source)

    def write(made: Path) -> None:
        if model is None:
            copy_model(folder, made, dtype)
        else:
            save_model(model.to(dtype) if dtype else model, made)
            for warning in write_tokenizer({"the model": find_tokenizer(model, model)}, made):
                rank_zero_warn(warning)
        classes = architectures(read_json(made / MODEL_CONFIG)) or ["AutoModel"]
        stem = source.stem if source.is_file() and (source.parent / "report.json").is_file() else None
        own = task if task in folder.parts else stem if stem != "merged" else None
        card = pretrained_card(classes[0], source.name, history, own)
        (made / "README.md").write_text(card, encoding="utf-8")

    publish(output_dir, write)
    return output_dir


def output_problems(output_dir: Path, precision: str | None) -> list[str]:
    """What is wrong with the options that every export has."""
    problems = []
    with paths_told("output_dir"):
        if output_dir.exists():
            problems.append(f"output_dir: {output_dir} exists already; remove it, or name another")
    if precision and precision not in PRECISIONS:
        problems.append(f"precision: must be one of {', '.join(PRECISIONS)}; got {precision}")
    return problems


def publish(output_dir: Path, write: Callable[[Path], None]) -> None:
    """Write a folder whole or not at all.

    Args:
        output_dir: the folder.
        write: writes its files into another one, which then takes its place.

    Raises:
        MergeError: if it cannot be written.
    """
    workplace = Workplace(output_dir)
    try:
        workplace.publish(write)
    except MergeError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise MergeError([f"output_dir: {output_dir} could not be written ({error})"]) from error
    finally:
        workplace.close()


def locate(source: Path, task: str | None, base: Path | None) -> tuple[Path, Path | None]:
    """The folder of a transformers model, and the checkpoint with its weights if they are not in that folder."""
    if source.is_dir():
        if (source / MODEL_CONFIG).is_file():
            return source, None
        if leads_out(source / PRETRAINED, source):
            raise MergeError([f"{source}: {PRETRAINED} is a link that leads out of it; give the folder itself"])
        models = sorted(path.parent for path in (source / PRETRAINED).rglob(MODEL_CONFIG))
        of_task = [model for model in models if task in model.relative_to(source).parts] if len(models) > 1 else models
        if len(of_task) == 1:
            return of_task[0], None
        if models:
            raise MergeError([f"task: {source} has {some(list(map(str, models)))}; name a task, or give one of them"])
        raise MergeError([f"{source}: no transformers model is in it; give a checkpoint, and the folder of its base"])
    if base is None or not (base / MODEL_CONFIG).is_file():
        reason = f"{base} has no {MODEL_CONFIG}" if base else f"{source} holds only weights"
        raise MergeError([f"base: {reason}; name the folder of a transformers model of the same class"])
    return base, source


def model_folder_problems(folder: Path, has_weights: bool) -> list[str]:
    """Check the folder of a transformers model, which has to have weights if they are not taken from a checkpoint."""
    problems = folder_problems(folder)
    try:
        if not problems:
            read_json(folder / MODEL_CONFIG)
            problems += _missing_weights(folder) if has_weights else []
    except MergeError as error:
        problems += error.problems
    return [f"{folder}: {problem}" for problem in problems]


def _missing_weights(folder: Path) -> list[str]:
    """Say which weights are missing in a folder: its list of files names them, or there are none."""
    for index in sorted(folder.glob("*.index.json")):
        files = sorted({str(name) for name in read_json(index)["weight_map"].values()})
        if missing := [name for name in files if not (folder / name).is_file()]:
            return [f"{index.name} names weights that are not there: {some(missing)}"]
    if any(path.suffix in (".safetensors", ".bin") and path.is_file() for path in folder.iterdir()):
        return []
    return ["has no weights, only a configuration; give a checkpoint of the merge, with this folder as its base"]


def merge_card(source: Path) -> str:
    """The model card of the merge that the source belongs to; empty if there is none."""
    for folder in (source, *source.parents[:3]):
        if (folder / "report.json").is_file():
            card = folder / "README.md"
            is_own = card.is_file() and not leads_out(card, folder)
            return card.read_text(encoding="utf-8", errors="replace") if is_own else ""
    return ""


def copy_model(folder: Path, made: Path, dtype: torch.dtype | None) -> None:
    """Copy the files of a model, converted to another precision if one is given."""
    for name, path in TokenSource(folder).files.items():
        if "/" in name:
            (made / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, made / name)
    for path in sorted(folder.iterdir()):
        is_config = path.name == MODEL_CONFIG or path.name.endswith(".index.json")
        if path.is_dir() or path.suffix == ".md":
            continue
        if dtype is None or not (is_config or path.suffix == ".safetensors"):
            shutil.copyfile(path, made / path.name)
        elif path.suffix == ".safetensors":
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(path).items()}
            save_file(tensors, made / path.name, {"format": "pt"})
            shutil.copymode(path, made / path.name)  # safetensors makes its files private to their owner
        else:
            content = read_json(path)
            if path.name == MODEL_CONFIG:
                content["torch_dtype" if "torch_dtype" in content else "dtype"] = str(dtype).removeprefix("torch.")
            elif isinstance(content.get("metadata"), dict):  # of a model in several files
                content["metadata"].pop("total_size", None)
            (made / path.name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_source(folder: Path, checkpoint: Path | None) -> nn.Module:
    """The transformers model of a folder, with weights from a checkpoint of a module that holds such a model."""
    model = load_pretrained(folder, str(folder))
    if checkpoint is None:
        return model
    state = plain_state(read_checkpoint(checkpoint)["state_dict"])
    if adapters := sorted(filter(is_peft, state)):
        problem = (
            f"{checkpoint}: the weights of a PeftModel ({some(adapters, most=1)}); export the folder of the merge, "
            "which has the model without adapters, or call merge_and_unload() before saving"
        )
        raise MergeError([problem])
    prefix = _prefix(model, state, folder, checkpoint)
    weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    resize_to(model, weights)
    fill(model, weights, str(checkpoint))
    return model


def _prefix(model: nn.Module, state: Mapping[str, Any], folder: Path, checkpoint: Path) -> str:
    """The prefix under which a state dict has all names of a model; of tied names, the first is enough."""
    names, ties = list(model.state_dict()), tied_names(model)
    required = {name for name in names if ties.get(name, name) == name}
    prefixes = {key.removesuffix(names[0]) for key in state if key == names[0] or key.endswith(f".{names[0]}")}
    missing = {prefix: sorted(name for name in required if prefix + name not in state) for prefix in prefixes}
    complete = sorted(prefix for prefix, lacking in missing.items() if not lacking)
    if len(complete) == 1:
        return complete[0]
    fewest = min(missing.values(), key=len, default=names)
    reason = f"holds several ({', '.join(complete)})" if complete else f"lacks {some(fewest)} of it"
    problem = (
        f"{checkpoint}: of the {type(model).__name__} in {folder} it {reason}; give the folder of a model of the class "
        "that is in the module, for example an expert's"
    )
    raise MergeError([problem])
