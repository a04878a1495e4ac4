"""A folder for transformers' ``from_pretrained`` out of a merge's result or a Lightning checkpoint: ``com-lightning
export``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from com_lightning.core.tensors.modules import tied_names
from com_lightning.errors import MergeError
from com_lightning.experts.files import read_checkpoint
from com_lightning.experts.state_dicts import fill, is_peft, plain_state, some
from com_lightning.experts.transformers_models import CONFIG, load_pretrained, save_tokenizer
from com_lightning.experts.vocabulary import grow_to
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

    Neither the user's LightningModule nor its data is needed.

    Args:
        source: the folder of a merge, or a Lightning checkpoint or state dict of a module that holds a transformers
            model: of an expert, or of a merged model that was trained further.
        output_dir: where to; it does not exist yet.
        task: which, where the tasks of a merge have parameters of their own.
        base: for a checkpoint: the folder of a transformers model of the same class, for its ``config.json`` and
            tokenizer.
        precision: of the weights, a name of :data:`PRECISIONS`; by default as they are.

    Returns:
        ``output_dir``.

    Raises:
        MergeError: if there is nothing to export, the model is not in it, or the folder is there.
    """
    problems = []
    if output_dir.exists():
        problems.append(f"output_dir: {output_dir} exists already; remove it, or name another")
    if precision and precision not in PRECISIONS:
        problems.append(f"precision: one of {', '.join(PRECISIONS)}; got {precision}")
    try:
        found = _found(source, task, base)
    except MergeError as error:
        raise MergeError(problems + error.problems) from error
    if problems:
        raise MergeError(problems)
    folder, checkpoint = found
    dtype = PRECISIONS[precision] if precision else None
    part: Any = _taken(folder, checkpoint) if checkpoint else None
    whole = next(
        (path / "README.md" for path in (source, *source.parents[:3]) if (path / "report.json").is_file()), None
    )
    merged_card = whole.read_text(encoding="utf-8") if whole is not None and whole.is_file() else ""

    def write(made: Path) -> None:
        if part is None:
            _copy(folder, made, dtype)
        else:
            (part.to(dtype) if dtype else part).save_pretrained(made)
            save_tokenizer(part, part, made)
        kind = json.loads((made / CONFIG).read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
        card = pretrained_card(kind[0], source.name, merged_card)
        (made / "README.md").write_text(card, encoding="utf-8")

    workplace = Workplace(output_dir)
    try:
        workplace.publish(write)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise MergeError([f"output_dir: {output_dir} could not be written ({error})"]) from error
    finally:
        workplace.close()
    return output_dir


def _found(source: Path, task: str | None, base: Path | None) -> tuple[Path, Path | None]:
    """The folder of a transformers model, and the checkpoint of its weights if they are elsewhere."""
    if source.is_dir():
        if (source / CONFIG).is_file():
            return source, None
        models = sorted(path.parent for path in (source / PRETRAINED).rglob(CONFIG))
        fitting = [model for model in models if task in model.relative_to(source).parts] if len(models) > 1 else models
        if len(fitting) == 1:
            return fitting[0], None
        if models:
            raise MergeError([f"task: {source} has {some(list(map(str, models)))}; name a task, or give one of them"])
        raise MergeError([f"{source}: no transformers model is in it; give a checkpoint, and the folder of its base"])
    if base is None or not (base / CONFIG).is_file():
        given = f"{base} has no {CONFIG}" if base else f"{source} holds weights alone"
        raise MergeError([f"base: {given}; name the folder of a transformers model of the same class"])
    return base, source


def _copy(folder: Path, made: Path, dtype: torch.dtype | None) -> None:
    """The files of a model, in another precision."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.suffix == ".md":
            continue
        if dtype is None or path.suffix not in (".json", ".safetensors"):
            shutil.copyfile(path, made / path.name)
        elif path.suffix == ".safetensors":
            tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in load_file(path).items()}
            save_file(tensors, made / path.name, {"format": "pt"})
            shutil.copymode(path, made / path.name)  # which safetensors makes private to its owner
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            if path.name == CONFIG:
                content["torch_dtype" if "torch_dtype" in content else "dtype"] = str(dtype).removeprefix("torch.")
            elif "weight_map" in content:  # of a model in several files
                content.get("metadata", {}).pop("total_size", None)
            (made / path.name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _taken(folder: Path, checkpoint: Path) -> nn.Module:
    part = load_pretrained(folder, str(folder))
    state = plain_state(read_checkpoint(checkpoint)["state_dict"])
    if adapted := sorted(filter(is_peft, state)):
        raise MergeError(
            [
                f"{checkpoint}: the weights of a PeftModel ({some(adapted, most=1)}); export the folder of the merge, "
                "which has the model without adapters, or call merge_and_unload() before saving"
            ]
        )
    own, ties = list(part.state_dict()), tied_names(part)
    needed = {name for name in own if ties.get(name, name) == name}
    prefixes = {key.removesuffix(own[0]) for key in state if key == own[0] or key.endswith(f".{own[0]}")}
    lacking = {prefix: sorted(name for name in needed if prefix + name not in state) for prefix in prefixes}
    whole = [prefix for prefix, missing in lacking.items() if not missing]
    kind = type(part).__name__
    if len(whole) != 1:
        nearest = min(lacking.items(), key=lambda item: len(item[1]), default=("", own))
        why = f"holds several ({', '.join(sorted(whole))})" if whole else f"lacks {some(nearest[1])} of it"
        raise MergeError(
            [
                f"{checkpoint}: of the {kind} in {folder} it {why}; give the folder of a model of the class that is in "
                "the module, an expert's say"
            ]
        )
    inner = {key.removeprefix(whole[0]): value for key, value in state.items() if key.startswith(whole[0])}
    grow_to(part, inner)
    fill(part, inner, str(checkpoint))
    return part
