"""Check that a module computes the same with adapters and with these merged into its weights."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.errors import MergeError, MergeWarning, reason
from com_lightning.experts.state_dicts import some

_ROWS = 4
"""Random rows that a layer is compared on, before and after its adapter is merged."""


def adapter_layers(module: nn.Module) -> dict[str, Any]:
    """The layers of a module that have adapters, by name."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: part for name, part in module.named_modules() if isinstance(part, BaseTunerLayer)}


def adapter_type(layer: Any) -> str:
    """What kind of adapter a layer has, in words for messages."""
    variants = [type(v).__name__ for v in getattr(layer, "lora_variant", {}).values()]
    return ", ".join(variants) or f"{type(layer).__module__.split('.')[-2]} {type(layer).__name__}"


class Fold:
    """What a module with adapters computes, to be compared with what it computes when they are merged.

    Layers are compared one by one on random rows. That is cheap, and does not depend on the model. What it cannot see
    are weights that several layers use: an adapter changes one of these uses, and merging would change all. So each
    use gets its own copy of them, as in a transformers model that ties nothing.

    Args:
        module: changed in place: it is in eval mode until :meth:`finish`, and shared weights are copied.
        label: names it in messages.

    Raises:
        MergeError: if adapters are disabled or partly merged, or weights are not there.
    """

    def __init__(self, module: nn.Module, label: str) -> None:
        self.label = label
        self.layers = adapter_layers(module)
        if problems := _state_problems(self.layers):
            raise MergeError([f"{label}: {problem}" for problem in problems])
        self.modes = [(part, part.training) for part in module.modules()]
        module.eval()
        self.models = _pretrained(module)
        configs = [config for model in self.models for config in (model.config, model.config.get_text_config())]
        self.tied_configs = [config for config in configs if getattr(config, "tie_word_embeddings", False)]
        self.ties = _shared(module, self.layers)
        self.whole = [self._run_whole(model) for model in self.models] if self.ties else []
        for tie in self.ties:
            for owner, name in tie[1:]:
                parameter = owner._parameters[name]
                assert parameter is not None
                owner._parameters[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        self.before: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name, layer in self.layers.items():
            base = layer.get_base_layer()
            if (rows := _random_rows(base, layer)) is None:
                continue
            try:
                self.before[name] = rows, self._run(layer, rows), self._run(base, rows)
            except Exception as error:  # a class of the user's, which may want other inputs
                warnings.warn(
                    f"{label}: the adapted layer {name} cannot be run by itself ({reason(error)}), so it is not "
                    "checked that it computes the same with its adapter merged",
                    MergeWarning,
                    stacklevel=4,
                )

    def finish(self) -> None:
        """Compare, once the adapters are merged.

        Copies of shared weights that the adapters left equal are shared again. Transformers models in which they differ
        are told so in their configuration.

        Raises:
            MergeError: if a layer computes something else than before.
        """
        wrong = []
        for name, (rows, adapted, base) in self.before.items():
            merged = self._run(self.layers[name].get_base_layer(), rows)
            # Merging rounds to the precision of the weights; what an adapter changes is often small beside them.
            rounding = 8 * torch.finfo(self._precision(name)).eps
            allowed = rounding * (adapted.norm() + base.norm()) + 0.01 * (adapted - base).norm()
            if not bool((merged - adapted).norm() <= allowed):
                change = float((merged - adapted).norm() / (adapted - base).norm().clamp_min(1e-30))
                wrong.append(f"{name} ({adapter_type(self.layers[name])}: off by {change:.2g} of what it changes)")
        if wrong:
            raise MergeError(
                [
                    f"{self.label}: merging changes what adapted layers compute, because PEFT cannot merge such an "
                    f"adapter exactly: {some(wrong, most=3)}"
                ]
            )
        self._tie()
        for model, outputs in zip(self.models, self.whole):
            merged = self._run_whole(model)
            if not bool((merged - outputs).norm() <= 0.1 * outputs.norm()):
                raise MergeError(
                    [
                        f"{self.label}: an adapter changes weights that {type(model).__name__} uses in several places, "
                        "and without that tie the model computes something else. Train an adapter that leaves the "
                        "embedding and the output layer out, or give the modules with the adapter merged"
                    ]
                )

        for part, training in self.modes:
            part.training = training

    def _tie(self) -> None:
        """Share again what the adapters left equal (PEFT's `ensure_weight_tying`), and tell models of the rest."""
        different = False
        for (first, name), *others in self.ties:
            value = first._parameters[name]
            assert value is not None
            limit = 8 * torch.finfo(value.dtype).eps * float(value.abs().max())
            values = [owner._parameters[other_name] for owner, other_name in others]
            if all(v is not None and float((v - value).abs().max()) <= limit for v in values):
                for owner, other_name in others:
                    owner._parameters[other_name] = value
            else:
                different = True
        for config in self.tied_configs if self.ties else ():
            config.tie_word_embeddings = not different

    def _precision(self, name: str) -> torch.dtype:
        weight = self.layers[name].get_base_layer().weight
        return weight.dtype  # type: ignore[no-any-return]

    @staticmethod
    def _run(layer: nn.Module, rows: Tensor) -> Tensor:
        with torch.no_grad():
            return layer(rows).float()  # type: ignore[no-any-return]

    def _run_whole(self, model: Any) -> Tensor:
        """What a transformers model computes from its dummy inputs."""
        try:
            with torch.no_grad():
                return model(**model.dummy_inputs)[0].float()  # type: ignore[no-any-return]
        except Exception as error:
            raise MergeError(
                [
                    f"{self.label}: an adapter changes weights that {type(model).__name__} uses in several places, and "
                    f"it cannot be checked what it computes ({reason(error)})"
                ]
            ) from error


def _state_problems(layers: Mapping[str, Any]) -> list[str]:
    """What in the state of adapted layers makes it unclear what they compute, or keeps them from being merged."""
    problems = []
    if meta := [n for n, layer in layers.items() if any(p.is_meta for p in layer.parameters())]:
        problems.append(
            f"weights of {some(meta, most=2)} are not in memory (accelerate keeps them on disk or another device): "
            "load the model without device_map, or with device_map='cpu'"
        )
    if disabled := [n for n, layer in layers.items() if layer.disable_adapters]:
        problems.append(
            f"adapters are disabled at {some(disabled, most=2)}: call enable_adapter_layers() to merge them, or "
            "unload() to leave them out"
        )
    partly = [n for n, layer in layers.items() if layer.merged and {*layer.merged_adapters} != _active(layer)]
    if partly:
        problems.append(f"other adapters are merged at {some(partly, most=2)} than are active: call unmerge_adapter()")
    return problems


def _active(layer: Any) -> set[str]:
    """The active adapters that a layer has."""
    return {*layer.active_adapters} & {*layer._get_available_adapters()}


def _pretrained(module: nn.Module) -> list[Any]:
    """The transformers models in a module that are not part of another one."""
    if "transformers" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    inner = {id(part) for model in models for part in model.modules() if part is not model}
    return [model for model in models if id(model) not in inner]


def _shared(module: nn.Module, layers: Mapping[str, Any]) -> list[list[tuple[nn.Module, str]]]:
    """Find parameters of adapted layers that other modules use too.

    Returns:
        For each, its uses as (module, attribute).
    """
    adapted = {id(part) for layer in layers.values() for part in layer.get_base_layer().modules()}
    uses: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                uses.setdefault(id(parameter), []).append((part, name))
    return [places for places in uses.values() if len(places) > 1 and any(id(part) in adapted for part, _ in places)]


def _random_rows(base: nn.Module, layer: Any) -> Tensor | None:
    """Input for an adapted layer: random rows, or numbers of tokens; ``None`` for layers of other kinds."""
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(0)
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    if isinstance(base, nn.Embedding):
        known = [n for numbers in getattr(layer, "token_indices", {}).values() for n in numbers][:_ROWS]
        numbers = torch.randint(base.num_embeddings, (_ROWS,), generator=generator)
        return torch.cat([numbers, torch.tensor(known, dtype=torch.long)]).to(weight.device)
    if isinstance(base, nn.modules.conv._ConvNd):
        shape = (1, base.in_channels, *(d * (k - 1) + 2 for k, d in zip(base.kernel_size, base.dilation)))
    elif isinstance(base, Conv1D):
        shape = (_ROWS, len(weight))
    elif isinstance(base, nn.Linear):
        shape = (_ROWS, base.in_features)
    elif isinstance(base, nn.LayerNorm) or type(base).__name__.endswith("RMSNorm"):
        shape = (_ROWS, *weight.shape)
    else:
        return None
    return torch.randn(shape, generator=generator).to(weight)
