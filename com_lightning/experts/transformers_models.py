"""Folders of transformers' ``save_pretrained``: experts are read from them, and merged models written to them."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from com_lightning.core.tensors.modules import copy_module
from com_lightning.errors import MergeError
from com_lightning.experts.adapters import adapter_parameters
from com_lightning.experts.files import folder_problems
from com_lightning.experts.state_dicts import plain, some

MODEL_CONFIG = "config.json"
_TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)


def load_pretrained(folder: Path, label: str) -> nn.Module:
    """Load the transformers model in a folder, of the class that its ``config.json`` names.

    Only classes of the installed transformers are used, and only files in the folder.

    Args:
        folder: as transformers' ``save_pretrained`` writes it.
        label: names it in messages.

    Returns:
        The model.

    Raises:
        MergeError: if transformers is missing, the class is not one of its own, or the weights are not exactly those
            that the class needs.
    """
    try:
        import transformers
    except ImportError as error:
        raise MergeError([f'{label}: needs transformers: pip install "com_lightning[text]"']) from error
    if problems := folder_problems(folder):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    try:
        config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
        names = config.get("architectures") or []
        names = [str(name) for name in (names if isinstance(names, list) else [names])]
        kernels = [v for n, v in config.items() if "attn_implementation" in n and "/" in str(v)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise MergeError([f"{label}: {MODEL_CONFIG} cannot be read ({error})"]) from error
    if kernels:  # which transformers would download and run
        raise MergeError(
            [f"{label}: {MODEL_CONFIG} names code of others, {kernels[0]}, which is not run; remove it there"]
        )
    model_class = getattr(transformers, names[0], None) if names else None
    if not (isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)):
        version = transformers.__version__
        named = f"names {names[0]}, which is no model of transformers {version}" if names else "names no architecture"
        raise MergeError(
            [f"{label}: {MODEL_CONFIG} {named}; code of the folder is not run. Load it yourself, and give the module"]
        )
    try:
        loaded: Any = model_class.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except pickle.UnpicklingError as error:  # its text advises to load the file unsafely
        problem = f"{label}: {names[0]} cannot be loaded: its weights hold objects that safe loading refuses"
        raise MergeError([problem]) from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise MergeError([f"{label}: {names[0]} cannot be loaded ({type(error).__name__}: {text})"]) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        problems.append(f"{label}: missing keys, which {names[0]} would fill at random: {some(missing)}")
    if extra := sorted(info["unexpected_keys"]):
        problems.append(f"{label}: keys that {names[0]} does not have: {some(extra)}")
    if wrong := sorted(str(entry) for entry in info["mismatched_keys"]):
        problems.append(f"{label}: shapes that differ from those of {MODEL_CONFIG}: {some(wrong)}")
    if problems:
        raise MergeError(problems)
    assert isinstance(model, nn.Module)
    return model


def pretrained_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> transformers model, for each such model in a module that is not part of another one."""
    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    models: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        place = plain(name)
        if isinstance(part, PreTrainedModel) and not any(place.startswith(f"{outer}.") for outer in models):
            models.setdefault(place, part)
    return models


def source_folder(part: nn.Module) -> Path | None:
    """The local folder that a transformers model was loaded from; ``None`` if it was not loaded from a folder."""
    name = getattr(getattr(part, "config", None), "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def input_table(part: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model; ``None`` if it has none."""
    try:
        return part.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def tokenizer_of(module: nn.Module, part: nn.Module) -> Any:
    """Returns the tokenizer of a transformers model in a module; ``None`` if it has none.

    It is an attribute of the module, or else it is read from the folder that the model was loaded from.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    for value in vars(module).values():
        if isinstance(value, PreTrainedTokenizerBase):
            return value
    source = source_folder(part)
    if source is None or not any((source / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except Exception:  # made by another version, or its class is not installed: it cannot be checked
        return None


def save_pretrained(modules: Mapping[str, nn.Module], shared: Sequence[str], folder: Path) -> None:
    """Write every transformers model in the merged modules so that ``from_pretrained`` loads it.

    Adapters that have been merged into the weights are left out. The tokenizer of a model is written with it, see
    :func:`save_tokenizer`.

    Args:
        modules: task -> merged module.
        shared: names of parameters and buffers that all tasks share.
        folder: where to write. It gets one folder per task, or the model itself if the tasks' models do not differ. If
            a module has several models, each gets a folder with the name of its attribute.
    """
    for task, module in modules.items():
        parts = pretrained_parts(_without_adapters(module))
        merged = {plain(name) for name in (*shared, *adapter_parameters(module))}
        private = {plain(name) for name in module.state_dict()} - merged
        for name, part in parts.items():
            differs = any(key.startswith(f"{name}.") for key in private)
            target = folder / task if differs else folder
            target = target / name if len(parts) > 1 else target
            if target.exists():  # written for an earlier task already
                continue
            try:
                part.save_pretrained(target)  # type: ignore[operator]
                save_tokenizer(module, part, target)
            except ValueError as error:  # for example a generation config that it refuses; checkpoints have all weights
                rank_zero_warn(f"{name or 'the model'} is not written to {folder.name} ({error})")


def _without_adapters(module: nn.Module) -> nn.Module:
    """A copy that shares the tensors of ``module``, without adapters that have been merged into the weights."""
    if "peft" not in sys.modules:
        return module
    from peft import PeftModel

    if not any(isinstance(part, PeftModel) for part in module.modules()):
        return module
    module = copy_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the adapters have been merged already
        for name, part in list(module.named_modules()):
            if isinstance(part, PeftModel):
                module.set_submodule(name, part.merge_and_unload())
    return module


def save_tokenizer(module: nn.Module, part: nn.Module, target: Path) -> None:
    """Write the tokenizer or processor of a transformers model in a module, if there is one.

    It is an attribute of the module, or else its files are copied from the folder that the model was loaded from.
    """
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    for value in vars(module).values():
        if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)):
            value.save_pretrained(target)
            return
    source = source_folder(part)
    for name in _TOKENIZER_FILES if source else ():
        if source and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
