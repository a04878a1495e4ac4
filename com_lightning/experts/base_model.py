"""The base model: what the experts were fine-tuned from."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from com_lightning.core.tensors.modules import average, named_tensors
from com_lightning.errors import MergeError, collected_warnings
from com_lightning.experts.adapters import adapter_parameters
from com_lightning.experts.load import ExpertSource, load_expert
from com_lightning.experts.similarity import is_finite, unrelated_base
from com_lightning.experts.state_dicts import some
from com_lightning.experts.vocabulary import token_problems


def load_base(
    source: ExpertSource | None,
    model: LightningModule,
    experts: Mapping[str, LightningModule],
    shared: Collection[str],
    resize_embeddings: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """Load the base.

    Args:
        source: as for an expert, see :func:`~com_lightning.experts.load.load_expert`. ``None``: the tensors of
            ``model``, without a copy.
        model: a module of the experts' class.
        experts: task -> its module.
        shared: names of what is merged.
        resize_embeddings: fill rows that an embedding table of the base lacks with the average of the experts' rows.
            The task vector of an expert is then its difference from this average.

    Returns:
        Name of each shared floating-point parameter or buffer -> its value in the base; and warnings.

    Raises:
        MergeError: if the base cannot be read, lacks what is shared, holds NaN or infinity, numbers tokens differently,
            or if the experts seem not to descend from ``model``, where that is all there is.
    """
    label = f"base ({source})" if isinstance(source, (str, Path)) else "base"
    with collected_warnings() as warnings:
        as_it_is = source is None and not adapter_parameters(model)  # adapters are merged, in a copy
        module = model if as_it_is else load_expert("base", model if source is None else source, model, label)
    state = {name: tensor for name, tensor, _ in named_tensors(module)}
    if absent := [name for name in shared if name in state and state[name].is_meta]:
        raise MergeError(
            [
                f"{label}: the rule needs the weights that the experts were fine-tuned from, and "
                f"{some(absent, most=2)} of your model are on the meta device; name a checkpoint as `base`"
            ]
        )
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts.values()]
    base, unfit = {}, []
    for name in shared:
        if not states[0][name].is_floating_point():
            continue
        value, shape = state.get(name), states[0][name].shape
        if value is not None and resize_embeddings and value.dim() and value.shape[1:] == shape[1:]:
            rows = average([expert[name].detach()[len(value) :] for expert in states])
            value = torch.cat([value.detach(), rows.to(value)]) if len(rows) else value
        if value is None or value.shape != shape:
            base_shape = "missing" if value is None else tuple(value.shape)
            unfit.append(f"{name} is {base_shape}, in the experts {tuple(shape)}")
        else:
            base[name] = value
    if source is not None:  # or else its tokenizer has been compared
        with collected_warnings() as more:
            unlike = token_problems(label, module, experts, shared, compare_experts=False)
        warnings += more
        if unlike:
            raise MergeError(unlike)
    if unfit:
        raise MergeError([f"{label}: it does not fit the experts: {some(unfit, '; ', 2)}"])
    parameters = {name for name, _, is_parameter in named_tensors(module) if is_parameter}
    if broken := [name for name, value in base.items() if name in parameters and not is_finite(value)]:
        raise MergeError([f"{label}: NaN or infinity in {some(broken)}; give the weights that training started from"])
    if doubt := unrelated_base(base, experts, shared):
        if source is None:
            raise MergeError(
                [
                    f"base: the rule needs the weights that the experts were fine-tuned from, and takes those of your "
                    f"model, but {doubt}. Give them as `base`: a checkpoint, or a module"
                ]
            )
        warnings.append(f"{label}: {doubt}")
    for task, expert in zip(experts, states):
        if all(torch.equal(value.to(expert[name]), expert[name]) for name, value in base.items()):
            warnings.append(f"{label} has the weights of expert '{task}', which has then learned nothing")
    return base, list(warnings)
