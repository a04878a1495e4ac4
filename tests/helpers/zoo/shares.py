"""How much of each architecture is solved in closed form."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from tests.helpers.zoo.merges import Merged, account, make_experts, merge, owner
from tests.helpers.zoo.models import REAL, ZOO


@dataclass
class Share:
    """How much of a model is solved.

    Attributes:
        parameters: number of values that influence the output.
        share: of them that was solved in closed form.
        rest: why the others were averaged -> their share.
    """

    parameters: int
    share: float
    rest: dict[str, float]


def shares(merged: Merged, module: nn.Module | None = None) -> Share:
    """What became of the parameters of a merged model of the zoo.

    Args:
        merged: the merge.
        module: the same architecture in another size, of which parameters of one name in one class are taken to fare as
            they did in the merge.
    """
    expert = merged.experts[0]
    fates: dict[str, set[str]] = {}
    for name, fate in account(merged).items():
        fates.setdefault(_pattern(expert, name), set()).add(fate)
    sizes: dict[str, int] = {}
    for name, parameter in (module or expert).named_parameters():
        known = fates.get(_pattern(module or expert, name), {"not in the tiny model"})
        fate = next(iter(known)) if len(known) == 1 else "differs from block to block"
        if fate != "not used by the forward":
            sizes[fate] = sizes.get(fate, 0) + parameter.numel()
    total, solved = sum(sizes.values()), sizes.pop("solved", 0)
    rest = {fate: size / total for fate, size in sorted(sizes.items(), key=lambda item: -item[1])}
    return Share(total, solved / total, rest)


def row(name: str) -> str:
    """A row of the table in docs/architectures.md."""
    merged = merge(*make_experts(name))
    tiny, real = shares(merged), shares(merged, REAL.get(name, ZOO[name][0])())
    reasons: dict[str, list[str]] = {}
    for fate in real.rest:
        what, _, why = fate.partition(": ")
        reasons.setdefault(why, []).append(what)
    told = []
    for why, whats in reasons.items():
        parts = [sum(share.rest.get(f"{what}: {why}", 0) for what in whats) for share in (tiny, real)]
        first = whats[0] if len(whats) == 1 else f"{whats[0]} and {len(whats) - 1} more"
        told.append(f"{first}: {why} ({parts[0]:.2%}; {parts[1]:.2%})")
    numbers = [f"{tiny.parameters:,}", f"{tiny.share:.2%}", f"{real.parameters:,}", f"{real.share:.2%}"]
    return f"| {' | '.join([name, *numbers, '; '.join(told)])} |"


def _pattern(module: nn.Module, name: str) -> str:
    """What a parameter is called in every block."""
    path, _, own = name.rpartition(".")
    return f"{owner(module, name)}: {re.sub('[0-9]+', '#', path)}.{own}"
