"""Resize embedding tables of different length, and check that their rows stand for the same tokens."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from com_lightning.core.tensors.modules import average, matches_any
from com_lightning.errors import MergeError, MergeWarning
from com_lightning.experts.state_dicts import plain, some
from com_lightning.experts.tokenizers import TokenSource, find_tokenizer
from com_lightning.experts.transformers_models import input_table, pretrained_parts

_UNLIKE = "rows of different tokens cannot be merged: name the embedding table in `private`, with whatever else differs"
_UNLIKE_ORIGIN = "load {} with the tokenizer of the experts, or name the embedding table in `private`"
_SIZES = ("vocab_size", "max_position_embeddings", "type_vocab_size")  # as transformers' configurations name them


def match_vocabularies(
    model: nn.Module, experts: Mapping[str, nn.Module], private: Sequence[str] | None, resize: bool
) -> list[str]:
    """Prepare embedding tables to be merged row by row.

    Args:
        model: the base.
        experts: task -> its module.
        private: patterns of parameters that stay with their task; their tables may differ.
        resize: give all tables the rows of the longest one, in ``model`` and the experts, in place. Rows that a table
            lacks become the average of the experts that have them, so that a merge leaves them at this average.

    Returns:
        The problems: tables that differ in length (unless they are resized), and tokenizers that number tokens
        differently. A tokenizer that cannot be loaded, and therefore not compared, is a :class:`MergeWarning`.
    """
    if not experts:
        return []
    modules = {"model": model, **experts}
    tables = {name: rows for name, rows in _lengths(modules).items() if not matches_any(name, private or ())}
    differing = {name: rows for name, rows in tables.items() if len(set(rows.values())) > 1}
    problems = token_problems("your model", model, experts, tables)
    if differing and not resize:
        lengths = [f"{name}: {', '.join(f'{who} {n}' for who, n in rows.items())}" for name, rows in differing.items()]
        problems.append(
            f"embedding tables have different numbers of rows: {some(lengths, '; ')}. To merge the rows that all have "
            "and keep the others, set resize_embeddings; to leave each task its own table, name it in `private`, with "
            "whatever else differs"
        )
    elif not problems:
        for name, rows in differing.items():
            for parameter in [name, *_outputs(modules, rows)]:
                _resize(model, experts, parameter, max(rows.values()))
    return problems


def resize_to(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Lengthen the embedding tables of a module, and the heads over the same vocabulary, to fit a state dict.

    The new rows are zero. Nothing is made shorter.

    Args:
        module: changed in place.
        state: plain name -> tensor.
    """
    names = {plain(name): name for name, _ in module.named_parameters()}
    saved = {names[name]: len(t) for name, t in state.items() if name in names and isinstance(t, Tensor) and t.dim()}
    lengths = {name: (len(module.get_parameter(name)), length) for name, length in saved.items()}
    longer = {lengths[name] for name in _tables(module) if name in lengths and lengths[name][0] < lengths[name][1]}
    for name, (old, new) in lengths.items():
        if (old, new) in longer:
            parameter = module.get_parameter(name)
            _lengthen(module, name, parameter.new_zeros(new - old, *parameter.shape[1:]))


def _tables(module: nn.Module) -> dict[str, nn.Embedding]:
    return {
        f"{name}.weight" if name else "weight": part
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, nn.Embedding)
    }


def _lengths(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, int]]:
    """Name of each table that all modules have, with rows of one width -> module -> number of rows."""
    tables = {key: _tables(module) for key, module in modules.items()}
    return {
        name: {key: entry[name].num_embeddings for key, entry in tables.items()}
        for name in tables["model"]
        if len({entry[name].embedding_dim if name in entry else None for entry in tables.values()}) == 1
    }


def _outputs(modules: Mapping[str, nn.Module], rows: Mapping[str, int]) -> list[str]:
    """Other parameters that have one row per token in every module: heads over the vocabulary, tied or not."""
    named = {key: dict(module.named_parameters(remove_duplicate=False)) for key, module in modules.items()}
    return [
        name
        for name in named["model"].keys() - _tables(modules["model"]).keys()
        if all(name in entry and entry[name].dim() and len(entry[name]) == rows[key] for key, entry in named.items())
        and len({entry[name].shape[1:] for entry in named.values()}) == 1
    ]


def _resize(model: nn.Module, experts: Mapping[str, nn.Module], name: str, length: int) -> None:
    """Give one parameter the same length everywhere, with the average of the experts that have a row in new rows."""
    base, *values = (m.get_parameter(name).detach() for m in (model, *experts.values()))
    lengths = sorted({len(value) for value in (base, *values)})
    longest = [
        average([value[start:end] for value in values if len(value) >= end] or [base[start:end]])
        for start, end in zip([0, *lengths], lengths)
    ]
    rows = torch.cat([part.to(base) for part in longest])
    for module in (model, *experts.values()):
        _lengthen(module, name, rows[len(module.get_parameter(name)) : length])


def _lengthen(module: nn.Module, name: str, rows: Tensor) -> None:
    """Append rows to a parameter. It stays the same object, so that tied parameters stay tied."""
    parameter = module.get_parameter(name)
    old = len(parameter)
    parameter.data = torch.cat([parameter.data, rows.to(parameter)])
    for part in module.modules():
        if part._parameters.get("weight") is parameter:
            if isinstance(part, nn.Embedding):
                part.num_embeddings = len(parameter)
            elif isinstance(part, nn.Linear):
                part.out_features = len(parameter)
    for transformer in pretrained_parts(module).values():
        config: Any = transformer.config
        for holder in (config, config.get_text_config(), *transformer.modules()):
            for size in _SIZES if len(rows) else ():
                if vars(holder).get(size) == old:
                    setattr(holder, size, len(parameter))


def token_problems(
    who: str, module: nn.Module, experts: Mapping[str, nn.Module], tables: Collection[str], compare_experts: bool = True
) -> list[str]:
    """Find tokenizers that give the number of a row to different tokens, or another number to a token.

    Args:
        who: the name of ``module`` in messages.
        module: what the experts descend from. A number may have another token there than in the experts: fine-tuning
            gives names to reserved tokens.
        experts: task -> its module.
        tables: names of the embedding tables that are merged.
        compare_experts: whether the experts are compared with each other, too.

    Returns:
        The problems. A tokenizer that cannot be loaded is a :class:`MergeWarning`.
    """
    found: dict[str, dict[str, TokenSource]] = {}
    for name, holder in {who: module, **{f"'{task}'": expert for task, expert in experts.items()}}.items():
        parts = pretrained_parts(holder)
        for place, part in parts.items():
            table, source = input_table(part), find_tokenizer(holder, part)
            shared = any(t is table for table_name, t in _tables(holder).items() if table_name in tables)
            # In a module with several models, it is not known whose tokenizer it holds.
            if source and shared and (source.folder or len(parts) == 1):
                found.setdefault(place, {})[name] = source
    problems = []
    for sources in found.values():
        vocabularies = _vocabularies(sources)
        origin = vocabularies.pop(who, {})
        for number, (name, tokens) in enumerate(vocabularies.items()):
            others = list(vocabularies.items())[: number if compare_experts else 0]
            for other, known in [*others, (who, origin)]:
                if differing := _differing(known, tokens, other, name, by_number=other != who):
                    what = f"the tokenizers of {other} and {name} differ: {some(differing, '; ', 3)}"
                    problems.append(f"{what}; {_UNLIKE if other != who else _UNLIKE_ORIGIN.format(who)}")
                    break
    return problems


def _vocabularies(sources: Mapping[str, TokenSource]) -> dict[str, dict[str, int]]:
    """Who -> token -> number. A tokenizer that cannot be loaded is a warning."""
    vocabularies: dict[Any, dict[str, int]] = {}
    failed: dict[Any, str] = {}
    for source in sources.values():
        if source.key not in {**vocabularies, **failed}:
            try:
                vocabularies[source.key] = source.vocabulary
            except MergeError as error:
                failed[source.key] = error.problems[0]
    for key, problem in failed.items():
        users = {who: source for who, source in sources.items() if source.key == key}
        where = next(iter(users.values()))
        warnings.warn(
            f"the tokenizer of {some(list(users))} ({where}) cannot be loaded ({problem}): it is "
            "not known whether it numbers tokens as the others do",
            MergeWarning,
            stacklevel=2,
        )
    return {who: vocabularies[source.key] for who, source in sources.items() if source.key in vocabularies}


def _differing(one: Mapping[str, int], other: Mapping[str, int], who: str, whose: str, by_number: bool) -> list[str]:
    """Numbers that stand for different tokens, and tokens that have different numbers."""
    if one == other:
        return []
    numbers = {number: token for token, number in one.items()}
    changed = [(token, n) for token, n in other.items() if one.get(token) != n]
    clashes = [(n, numbers[n], token) for token, n in changed if by_number and n in numbers]
    moved = [(token, one[token], n) for token, n in changed if token in one and not (by_number and n in numbers)]
    return [
        *(f"number {n} is {first!r} in {who} and {second!r} in {whose}" for n, first, second in sorted(clashes)),
        *(f"{token!r} is number {first} in {who} and {second} in {whose}" for token, first, second in sorted(moved)),
    ]
