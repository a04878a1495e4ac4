"""What shapes the outputs of a module without being a parameter: its settings.

Two modules with the same parameters may compute different things: by the configuration of a transformers model (rotary
embeddings, epsilons, activations), by the classes and attributes of submodules, by hyperparameters that a ``forward``
reads, and by buffers that checkpoints leave out. :func:`settings_of` collects them, so that modules can be compared.

What acts in training only (dropout, momentum), in losses and metrics, or nowhere (names, paths, versions) is left out.
An attribute or hyperparameter counts if a method that runs in a forward names it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo import OptimizedModule

from com_lightning.core.tensors.modules import named_tensors
from com_lightning.errors import MergeError, reason
from com_lightning.experts.state_dicts import plain, some
from com_lightning.experts.transformers_models import pretrained_parts
from com_lightning.weak_cache import weak_cache

_IDLE_KEYS = {  # mostly of a transformers configuration; ties and the sizes of tables show in the parameters
    "architectures",
    "attn_implementation",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "gradient_checkpointing",
    "id2label",
    "initializer_factor",
    "initializer_range",
    "label2id",
    "merged_adapters",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "training",
    "type_vocab_size",
    "use_cache",
    "vocab_size",
}
_IDLE_WORDS = ("drop", "momentum", "version")
_IDLE_MODULES = ("torch.nn.modules.dropout", "torch.nn.modules.loss", "torchmetrics")
_BASES = (
    *("torch.nn.modules.module.", "lightning.", "lightning_fabric."),
    *("transformers.generation", "transformers.integrations", "transformers.modeling_", "transformers.utils"),
)
"""Modules of classes whose methods run around forwards, and name much that does not act."""
_OTHER_METHODS = (
    *("__", "_init_weights", "configure_", "extra_repr", "load_", "on_", "predict_", "reset_", "save_", "setup"),
    *("teardown", "test_", "train_", "training_", "val_", "validation_"),
)
"""Beginnings of the names of methods that do not run in a forward, or do not shape what shared layers compute."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.Size)

_MISSING = "missing"


def settings_of(module: nn.Module) -> dict[str, Any]:
    """Collect what shapes the outputs of a module without being a parameter.

    Args:
        module: a module; names of compiled and wrapped modules are :func:`~com_lightning.experts.state_dicts.plain`.

    Returns:
        Name -> value. Names are those of submodules (the value is the name of its class), of attributes, of keys in
        ``hparams`` or a transformers ``config``, and of buffers that checkpoints leave out (the value is the tensor).
    """
    result: dict[str, Any] = {}
    for name, part in module.named_modules():
        place = plain(name)
        kind: Any = type(part)
        if isinstance(part, (OptimizedModule, nn.Identity)) or kind.__module__.startswith(_IDLE_MODULES):
            continue
        if "drop" in kind.__name__.lower():
            continue
        prefix = f"{place}." if place else ""
        if place:
            result[place] = kind.__name__
        names = _named_in_forwards(kind)
        for key, value in vars(part).items():
            if key in names and not key.startswith("_") and not _is_idle(key) and _is_plain(value):
                result[f"{prefix}{key}"] = _comparable(value)
        if isinstance(part, LightningModule):
            hyperparameters = {key: value for key, value in dict(part.hparams).items() if key in names}
            result.update(_flat(f"{prefix}hparams", hyperparameters))
    networks = pretrained_parts(module)
    for place, network in networks.items() if "" not in networks else [("", module)]:
        config: Any = network.config
        result.update(_flat(f"{place}.config" if place else "config", config.to_dict()))
    result.update((plain(name), tensor) for name, tensor in computed_buffers(module).items())
    return result


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Name -> buffer, for those that checkpoints leave out. Whoever loads the module computes them anew."""
    return {
        f"{name}.{key}" if name else key: part.get_buffer(key)
        for name, part in module.named_modules(remove_duplicate=False)
        for key in part._non_persistent_buffers_set
        if part._buffers.get(key) is not None
    }


def has_configuration(part: nn.Module, folder: Path) -> bool:
    """Whether a transformers model has the configuration in a folder, as far as it shapes outputs.

    Args:
        part: the model.
        folder: as ``save_pretrained`` writes it.

    Returns:
        Whether they are the same.

    Raises:
        MergeError: if the configuration cannot be read.
    """
    config: Any = part.config
    try:
        saved = type(config).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # anything can be in a file
        raise MergeError([f"{folder}: its configuration cannot be read ({reason(error)})"]) from error
    return not differing({"given": _flat("config", config.to_dict()), "saved": _flat("config", saved.to_dict())})


def differing(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Find the settings in which modules differ.

    Where the configurations of a transformers model differ, its submodules differ for that reason, and are not listed.

    Args:
        settings: label of each module -> its settings, see :func:`settings_of`.

    Returns:
        Name -> label -> value.
    """
    names = dict.fromkeys(name for values in settings.values() for name in values)
    first, *others = settings.values()
    found = [n for n in names if any(not _same(first.get(n, _MISSING), v.get(n, _MISSING)) for v in others)]
    found = [n for n in found if not any(n.startswith(f"{outer}.") for outer in found)]  # these follow from a class
    configured = [n.partition("config.")[0] for n in found if "config" in n.split(".")]
    found = [n for n in found if "config" in n.split(".") or not any(map(n.startswith, configured))]
    return {name: {label: values.get(name, _MISSING) for label, values in settings.items()} for name in found}


def described(found: Mapping[str, Mapping[str, Any]], most: int = 4) -> str:
    """Put the differences that :func:`differing` finds into words.

    Args:
        found: name -> label -> value.
        most: how many are named.

    Returns:
        The text; empty if there are none.

    Example::

        >>> described({"net.eps": {"'a'": 1e-5, "'b'": 1e-3}})
        "net.eps is 1e-05 in 'a' and 0.001 in 'b'"
    """
    texts = []
    for name, values in found.items():
        if any(isinstance(value, Tensor) for value in values.values()):
            texts.append(f"the buffer {name}, which checkpoints leave out, has different values")
            continue
        groups: dict[str, list[str]] = {}
        for label, value in values.items():
            groups.setdefault(str(value) if isinstance(value, str) else repr(value), []).append(label)
        texts.append(
            f"{name} is " + " and ".join(f"{value} in {some(labels, most=3)}" for value, labels in groups.items())
        )
    return some(texts, "; ", most)


def differences_of_experts(
    experts: Mapping[str, nn.Module], private: Mapping[str, Collection[str]]
) -> dict[str, dict[str, Any]]:
    """Find the settings in which experts differ, and which act on shared layers.

    Args:
        experts: task -> its module.
        private: task -> names of the parameters that stay with it. What acts on these alone is left out.

    Returns:
        Name -> quoted task -> value.
    """
    found = differing({f"'{task}'": settings_of(expert) for task, expert in experts.items()})
    alone = set[str]()
    sizes: list[set[int]] = []
    for task, expert in experts.items():
        tensors = {name: tensor for name, tensor, is_parameter in named_tensors(expert) if is_parameter}
        sizes.append({size for name in private[task] if name in tensors for size in tensors[name].shape})
        for name, part in expert.named_modules():
            inside = [f"{name}.{key}" for key, _ in part.named_parameters(remove_duplicate=False)]
            if name and inside and all(key in private[task] for key in inside):
                alone.add(plain(name))
    return {
        name: values
        for name, values in found.items()
        if not any(name == place or name.startswith(f"{place}.") for place in alone)
        and not all(type(value) is int and value in own for value, own in zip(values.values(), sizes))
    }


@weak_cache
def _named_in_forwards(kind: type) -> frozenset[str]:
    """All names and texts in the methods of a class that may run in a forward."""
    names: set[str] = set()
    for base in kind.__mro__:
        if base is object or f"{base.__module__}.".startswith(_BASES):
            continue
        for name, function in vars(base).items():
            function = getattr(function, "fget", function)  # of a property
            function = getattr(function, "__func__", function)
            function = getattr(function, "__wrapped__", function)
            code = getattr(function, "__code__", None)
            if isinstance(code, CodeType) and (name in ("__call__",) or not name.startswith(_OTHER_METHODS)):
                names.update(_names_in(code))
    return frozenset(names)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names_in(constant)


def _is_idle(key: str) -> bool:
    return key in _IDLE_KEYS or any(word in key.lower() for word in _IDLE_WORDS)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return isinstance(value, (*_PLAIN, FunctionType, BuiltinFunctionType))


def _comparable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_comparable, value))
    if isinstance(value, (FunctionType, BuiltinFunctionType)):
        return value.__name__
    return value


def _flat(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values under names with dots, without those that do not act."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        key = str(key)
        if key.startswith("_") or _is_idle(key):
            continue
        if isinstance(value, Mapping):
            result.update(_flat(f"{prefix}.{key}", value))
        elif _is_plain(value):
            result[f"{prefix}.{key}"] = _comparable(value)
    return result


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.dtype == other.dtype and torch.equal(one, other.to(one.device)))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return False
    return bool(one == other) or repr(one) == repr(other)  # NaN
