"""Folders of transformers' ``save_pretrained``: experts in, the merged model out."""

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

CONFIG = "config.json"
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
    """The transformers model in a folder, of the class that its ``config.json`` names.

    Only classes of the installed transformers are used, and only files in the folder.

    Raises:
        MergeError: if transformers is missing, the class is not one of its own, or the weights are not exactly those
            that the class needs.
    """
    try:
        import transformers
    except ImportError as error:
        raise MergeError([f'{label}: needs transformers: pip install "com_lightning[text]"']) from error
    if found := folder_problems(folder):
        raise MergeError([f"{label}: {problem}" for problem in found])
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        names = config.get("architectures") or []
        names = [str(name) for name in (names if isinstance(names, list) else [names])]
        kernels = [v for n, v in config.items() if "attn_implementation" in n and "/" in str(v)]
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise MergeError([f"{label}: {CONFIG} cannot be read ({error})"]) from error
    if kernels:  # which transformers would download and run
        raise MergeError([f"{label}: {CONFIG} names code of others, {kernels[0]}, which is not run; remove it there"])
    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        named = f"names {names[0]}" if names else "names no architecture"
        raise MergeError(
            [
                f"{label}: {CONFIG} {named}, which is no model of transformers {transformers.__version__}; code of the "
                "folder is not run. Load it yourself, and give the module"
            ]
        )
    try:
        loaded: Any = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    except pickle.UnpicklingError as error:  # its text advises to load the file unsafely
        problem = f"{label}: {names[0]} cannot be loaded: its weights hold objects that safe loading refuses"
        raise MergeError([problem]) from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise MergeError([f"{label}: {names[0]} cannot be loaded ({type(error).__name__}: {reason})"]) from error
    model, told = loaded
    problems = []
    if missing := sorted(told["missing_keys"]):
        problems.append(f"{label}: missing keys, which {names[0]} would fill at random: {some(missing)}")
    if extra := sorted(told["unexpected_keys"]):
        problems.append(f"{label}: keys that {names[0]} does not have: {some(extra)}")
    if wrong := sorted(str(entry) for entry in told["mismatched_keys"]):
        problems.append(f"{label}: shapes that differ from those of {CONFIG}: {some(wrong)}")
    if problems:
        raise MergeError(problems)
    assert isinstance(model, nn.Module)
    return model


def pretrained_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> each transformers model in a module that is not part of another one."""
    if "transformers" not in sys.modules:
        return {}
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        own = plain(name)
        if isinstance(part, PreTrainedModel) and not any(own.startswith(f"{outer}.") for outer in found):
            found.setdefault(own, part)
    return found


def source_folder(part: nn.Module) -> Path | None:
    """The local folder that a transformers model came from, where it is one."""
    name = getattr(getattr(part, "config", None), "_name_or_path", None)
    return Path(name) if name and Path(name).is_dir() else None


def input_table(part: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model, where it has one."""
    try:
        return part.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def tokenizer_of(module: nn.Module, part: nn.Module) -> Any:
    """The tokenizer that a module has as an attribute, else that in the folder which its model came from, else None."""
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    for value in vars(module).values():
        if isinstance(value, PreTrainedTokenizerBase):
            return value
    source = source_folder(part)
    if source is None or not any((source / name).is_file() for name in ("tokenizer_config.json", "tokenizer.json")):
        return None
    try:
        return AutoTokenizer.from_pretrained(str(source), local_files_only=True, trust_remote_code=False)
    except Exception:  # made by another version, or of a class that is not installed: nothing can be said of it
        return None


def save_pretrained(modules: Mapping[str, nn.Module], shared: Sequence[str], folder: Path) -> None:
    """Write every transformers model in the merged modules so that ``from_pretrained`` loads it.

    Adapters that have been folded are left out, and tokenizers are written along where they are known: an attribute of
    the module, or files in the folder that the model came from.

    Args:
        modules: task -> merged module.
        shared: names of parameters and buffers that all tasks share.
        folder: gets one folder per task, or holds the model itself where the tasks' do not differ; and a folder
            per attribute in them where a module has several models.
    """
    for task, module in modules.items():
        parts = pretrained_parts(_without_adapters(module))
        merged = {plain(name) for name in (*shared, *adapter_parameters(module))}
        private = {plain(name) for name in module.state_dict()} - merged
        for name, part in parts.items():
            own = any(key.startswith(f"{name}.") for key in private)
            target = folder / task if own else folder
            target = target / name if len(parts) > 1 else target
            if target.exists():  # written for an earlier task already
                continue
            try:
                part.save_pretrained(target)  # type: ignore[operator]
                save_tokenizer(module, part, target)
            except ValueError as error:  # a generation config that it refuses, say; the checkpoints have all weights
                rank_zero_warn(f"{name or 'the model'} is not written to {folder.name} ({error})")


def _without_adapters(module: nn.Module) -> nn.Module:
    """A copy with the very tensors of ``module``, in which folded adapters are gone."""
    if "peft" not in sys.modules:
        return module
    from peft import PeftModel

    if not any(isinstance(part, PeftModel) for part in module.modules()):
        return module
    module = copy_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the adapters have been folded already
        for name, part in list(module.named_modules()):
            if isinstance(part, PeftModel):
                module.set_submodule(name, part.merge_and_unload())
    return module


def save_tokenizer(module: nn.Module, part: nn.Module, target: Path) -> None:
    """Write the tokenizer, or the files of it, that belongs to a transformers model of a module, where it is known."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

    for value in vars(module).values():
        if isinstance(value, (PreTrainedTokenizerBase, ProcessorMixin)):
            value.save_pretrained(target)
            return
    source = source_folder(part)
    for name in _TOKENIZER_FILES if source else ():
        if source and (source / name).is_file():
            shutil.copyfile(source / name, target / name)
