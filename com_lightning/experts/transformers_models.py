"""Folders of transformers' ``save_pretrained``: experts are read from them, and merged models written to them."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import pickle
import sys
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from com_lightning.core.tensors.modules import copy_module
from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts.adapters import adapter_parameters
from com_lightning.experts.files import folder_problems, read_json
from com_lightning.experts.state_dicts import plain, some
from com_lightning.experts.tokenizers import TokenSource, find_tokenizer, remember_folder, write_tokenizer
from com_lightning.extras import check_installed

MODEL_CONFIG = "config.json"
LARGEST_FILE = "5GB"
"""Size from which on weights are written to several files, as the Hub advises."""
_GENERATION_CONFIG = "generation_config.json"


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
    check_installed("transformers", f"{label}: folders of models")
    import transformers

    if problems := folder_problems(folder):
        raise MergeError([f"{label}: {problem}" for problem in problems])
    try:
        config = read_json(folder / MODEL_CONFIG)
        if (folder / _GENERATION_CONFIG).exists():  # transformers would ignore a broken one
            read_json(folder / _GENERATION_CONFIG)
    except MergeError as error:
        raise MergeError([f"{label}: {error.problems[0]}"]) from error
    names = architectures(config)
    if kernels := _kernels(config):  # which transformers would download and run
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
        with _quiet():
            model, info = _loaded(model_class, folder)
    except pickle.UnpicklingError as error:  # its text advises to load the file unsafely
        problem = f"{label}: {names[0]} cannot be loaded: its weights hold objects that safe loading refuses"
        raise MergeError([problem]) from error
    except Exception as error:
        text = " ".join(str(error).split())
        raise MergeError([f"{label}: {names[0]} cannot be loaded ({type(error).__name__}: {text})"]) from error
    if missing := sorted(info["missing_keys"]):
        problems.append(f"{label}: missing keys, which {names[0]} would fill at random: {some(missing)}")
    extra = sorted(info["unexpected_keys"])
    if body := [key for key in extra if _is_of_body(model, key)]:
        problems.append(
            f"{label}: keys that {names[0]} does not have: {some(body)}. The weights are of another model than that in "
            f"{MODEL_CONFIG}"
        )
    if wrong := sorted(str(entry) for entry in info["mismatched_keys"]):
        problems.append(f"{label}: shapes that differ from those of {MODEL_CONFIG}: {some(wrong)}")
    if problems:
        raise MergeError(problems)
    if extra:
        warnings.warn(
            f"{label}: {names[0]}, the class in {MODEL_CONFIG}, has no place for {some(extra)}: left out, as "
            "from_pretrained does",
            MergeWarning,
            stacklevel=2,
        )
    assert isinstance(model, nn.Module)
    remember_folder(model, folder)
    return model


def load_as(model: Any, folder: Path, label: str) -> tuple[nn.Module, list[str]]:
    """Load the transformers model in a folder into the class and the configuration of another model.

    Args:
        model: a transformers model, for example one with a head that the folder does not have.
        folder: as transformers' ``save_pretrained`` writes it.
        label: names it in messages.

    Returns:
        The model, and the names of parameters that the folder lacks, which are random.

    Raises:
        MergeError: if it cannot be loaded, or is another model: most of the parameters are missing, or have other
            shapes.
    """
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with _quiet():
            loaded, info = type(model).from_pretrained(str(folder), config=copy.deepcopy(model.config), **options)
    except Exception as error:
        raise MergeError([f"{label}: {type(model).__name__} cannot be loaded ({reason(error)})"]) from error
    sizes = {name: tensor.numel() for name, tensor in loaded.named_parameters()}
    mismatched = {str(entry[0]) if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"]}
    missing = sorted({*info["missing_keys"], *mismatched} & sizes.keys())
    if sum(sizes[name] for name in missing) > sum(sizes.values()) / 2:
        raise MergeError(
            [f"{label}: is another model than the {type(model).__name__}: it lacks {some(missing)}; name its base"]
        )
    table = input_table(loaded)
    tables = {name for name, part in loaded.named_modules() if part is table}
    if resized := [name for name in missing if name.rpartition(".")[0] in tables]:
        raise MergeError(
            [f"{label}: {resized[0]} has another shape than in the merged model; resize it first, and save it"]
        )
    return loaded, missing


def _loaded(model_class: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A model, and what was missing. It has a pooler only if the file has one: a configuration does not say so."""
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    model, info = model_class.from_pretrained(str(folder), **options)
    missing = info["missing_keys"]
    has_choice = "add_pooling_layer" in inspect.signature(model_class).parameters
    if missing and has_choice and all(key.startswith("pooler.") for key in missing):
        model, info = model_class.from_pretrained(str(folder), add_pooling_layer=False, **options)
    return model, info


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, transformers does not print which keys were missing or extra: this module says so."""
    from transformers.utils.logging import get_verbosity, set_verbosity

    level = get_verbosity()
    set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        set_verbosity(level)


def architectures(config: Mapping[str, Any]) -> list[str]:
    """The names of the classes that a model's configuration names."""
    names = config.get("architectures") or []
    return [str(name) for name in (names if isinstance(names, list) else [names])]


def _kernels(config: Mapping[str, Any]) -> list[Any]:
    """Code of others that a configuration names, wherever in it, which transformers would download and run."""
    kernels, rest = [], [config]
    while rest:
        entries = rest.pop()
        rest += [value for value in entries.values() if isinstance(value, dict)]
        kernels += [v for n, v in entries.items() if "attn_implementation" in n and isinstance(v, str) and "/" in v]
    return kernels


def _is_of_body(model: nn.Module, key: str) -> bool:
    """Whether an extra weight belongs to a layer, or a stack of layers, that the model has, and not to another head."""
    modules, prefix = dict(model.named_modules()), f"{getattr(model, 'base_model_prefix', '')}."
    for name in (key, f"{prefix}{key}", key.removeprefix(prefix)):
        parts = name.split(".")
        for cut in range(1, len(parts)):
            owner = modules.get(".".join(parts[:cut]))
            if owner is None:
                break
            if isinstance(owner, (nn.ModuleList, nn.Sequential)) or (owner._parameters and not owner._modules):
                return True
    return False


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


def input_table(part: nn.Module) -> nn.Module | None:
    """The token embedding of a transformers model; ``None`` if it has none."""
    try:
        return part.get_input_embeddings()  # type: ignore[operator, no-any-return]
    except (AttributeError, NotImplementedError):
        return None


def writing_warnings(experts: Mapping[str, nn.Module]) -> list[str]:
    """Find out, before the merge, which configurations transformers refuses to write.

    Args:
        experts: task -> its module.

    Returns:
        Warnings that say what :func:`save_pretrained` will do.
    """
    told: dict[str, list[str]] = {}
    for task, module in experts.items():
        for name, part in pretrained_parts(module).items():
            config, left_out = _writable(part.config)
            if left_out:
                what = f"the {MODEL_CONFIG} of {name or 'the model'} will lack {some(left_out)}"
                why = f"transformers takes them from {_GENERATION_CONFIG}; set them in generation_config"
                told.setdefault(f"{what}: {why}", []).append(task)
            if problem := _refusal(config):
                what = f"{name or 'the model'} cannot be written for from_pretrained, only to checkpoints: {problem}"
                told.setdefault(what, []).append(task)
            if problem := _refused_generation(part):
                what = f"transformers would not write the {_GENERATION_CONFIG} of {name or 'the model'}: {problem}"
                told.setdefault(f"{what}. It is written as it is, beside the weights", []).append(task)
    return [f"{', '.join(f'expert {task!r}' for task in tasks)}: {what}" for what, tasks in told.items()]


def _refusal(config: Any) -> str:
    """Why transformers refuses to write a configuration; empty if it does not."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            config.save_pretrained(folder)
        except OSError:  # of the disk
            return ""
        except Exception as error:
            return " ".join(str(error).partition("\nIf you're using")[0].split()).rstrip(".")
    return ""


def _writable(config: Any) -> tuple[Any, list[str]]:
    """Returns a model's configuration without settings for generating, if it is refused for them, and their names."""
    if not _refusal(config):
        return config, []
    from transformers import GenerationConfig

    declared = {"transformers_version", "use_cache"}
    declared |= {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set()
    generating: Any = GenerationConfig
    names = [name for name in generating().to_dict() if name in vars(config) and name not in declared]
    rest = copy.deepcopy(config)
    for name in names:
        delattr(rest, name)
    return (config, []) if _refusal(rest) else (rest, [n for n in names if getattr(config, n) is not None])


def _refused_generation(part: Any) -> str:
    """Why transformers refuses to write a model's configuration for generating; empty if it does not."""
    config = getattr(part, "generation_config", None)
    return _refusal(config) if config is not None and part.can_generate() else ""


def save_pretrained(
    modules: Mapping[str, nn.Module], shared: Sequence[str], folder: Path, apart: Collection[str] = ()
) -> list[str]:
    """Write every transformers model in the merged modules so that ``from_pretrained`` loads it.

    Adapters that have been merged into the weights are left out. The tokenizer of a model is written with it, see
    :func:`~com_lightning.experts.tokenizers.find_tokenizer`. A folder has weights, or it is not there.

    Args:
        modules: task -> merged module.
        shared: names of parameters and buffers that all tasks share.
        folder: where to write. It gets one folder per task, or the model itself if the tasks' models do not differ. If
            a module has several models, each gets a folder with the name of its attribute.
        apart: names of the models that differ between tasks in more than their parameters.

    Returns:
        Warnings of what is not written.

    Raises:
        OSError: if the disk is full, for instance.
    """
    told: list[str] = []
    tokenizers: dict[Path, dict[str, TokenSource | None]] = {}
    failed: set[Path] = set()
    for task, module in modules.items():
        unadapted = without_adapters(module)
        parts = pretrained_parts(unadapted)
        merged = {plain(name) for name in (*shared, *adapter_parameters(module))}
        private = {plain(name) for name in module.state_dict()} - merged
        for name, part in parts.items():
            differs = name in apart or any(key.startswith(f"{name}.") for key in private)
            target = folder / task if differs else folder
            target = target / name if len(parts) > 1 else target
            if target not in tokenizers and target not in failed:  # or else it is written for an earlier task already
                try:
                    save_model(part, target)
                except OSError:
                    raise
                except Exception as error:  # transformers refuses to write it; checkpoints have all weights
                    failed.add(target)
                    _remove_files(target)
                    told.append(f"{name or 'the model'} is not written to {folder.name} ({reason(error)})")
            if target not in failed:
                tokenizers.setdefault(target, {})[task] = find_tokenizer(unadapted, part)
    return told + [warning for target, sources in tokenizers.items() for warning in write_tokenizer(sources, target)]


def save_model(part: Any, target: Path) -> None:
    """Write a model, even if transformers refuses to write its settings for generating. See :func:`writing_warnings`.

    Args:
        part: the model.
        target: the folder.
    """
    config: Any = part.config
    generation: Any = getattr(part, "generation_config", None)
    refused = bool(_refused_generation(part))
    try:
        part.config, _ = _writable(config)
        if refused:
            part.generation_config = type(generation)()
        part.save_pretrained(target, max_shard_size=LARGEST_FILE)
    finally:
        part.config = config
        if refused:
            part.generation_config = generation
    if refused:
        (target / _GENERATION_CONFIG).write_text(generation.to_json_string(), encoding="utf-8")


def _remove_files(folder: Path) -> None:
    """Remove what was written to a folder, and leave the folders in it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not path.is_dir():
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def without_adapters(module: nn.Module) -> nn.Module:
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
