"""A merge against its floor: what no chain can do without, each part done alone and as plainly as it can be.

The floor is the forwards of the merged model and, if the rule is two-sided, of the experts; one matrix product for the
Gram matrix of each distinct input, in float32; and for each distinct input one Cholesky factorisation, and the division
of what belongs to each layer by it, in float64. Products that make the drift of a two-sided rule are not in it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from benchmarks.lockstep import Setting
from benchmarks.speed.timing import Timed, in_turn, ratios, spread
from com_lightning.core.chain import merge_layers
from com_lightning.core.rule import Rule

RULES = {"one-sided": Rule(target="merged"), "two-sided": Rule(), "default": Rule(residual=True)}
"""The default is two-sided and corrected for what residual streams lack."""


def inputs(setting: Setting) -> Iterator[tuple[int, int, list[int]]]:
    """The distinct inputs of a vision transformer's layers: numbers per row, rows per sample, outputs of each layer."""
    width, patches = setting.width, (setting.image // setting.patch) ** 2
    yield 3 * setting.patch**2 + 1, patches, [width]
    for _ in range(setting.blocks):
        yield width + 1, patches + 1, [width] * 3  # query, key and value
        yield width + 1, patches + 1, [width]
        yield width + 1, patches + 1, [4 * width]
        yield 4 * width + 1, patches + 1, [width]
    yield width + 1, 1, [width]  # the pooler


def products(setting: Setting) -> float:
    """Seconds of the products that make the Gram matrices."""
    seconds = 0.0
    for numbers, rows, _ in inputs(setting):
        batch, gram = torch.randn(setting.batch_size * rows, numbers), torch.zeros(numbers, numbers)
        start = time.perf_counter()
        for _ in range(sum(len(task.batches) for task in setting.tasks)):
            gram.addmm_(batch.T, batch)
        seconds += time.perf_counter() - start
    return seconds


def solves(setting: Setting) -> float:
    """Seconds of factorisations and solves."""
    seconds = 0.0
    for numbers, _, outputs in inputs(setting):
        gram = torch.eye(numbers, dtype=torch.float64) + 0.5 / numbers
        rights = [torch.ones(numbers, columns, dtype=torch.float64) for columns in outputs]
        start = time.perf_counter()
        lower = torch.linalg.cholesky(gram)
        for right in rights:
            torch.cholesky_solve(right, lower)
        seconds += time.perf_counter() - start
    return seconds


def run(setting: Setting, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Rows of the table -> columns -> a value for each repeat."""

    def merge(rule: Rule) -> float:
        setting.rule = rule
        return setting.merge(merge_layers)[0].seconds

    def forwards(streams: tuple[str, ...]) -> Timed:
        return lambda: setting.floor(streams)

    def merged_by(rule: Rule) -> Timed:
        return lambda: merge(rule)

    things: dict[str, Timed] = {
        "forwards, merged": forwards(("merged",)),
        "forwards, experts": forwards(("expert",)),
        "Gram products": lambda: products(setting),
        "solves": lambda: solves(setting),
        **{name: merged_by(rule) for name, rule in RULES.items()},
    }
    found = in_turn(things, repeats, "floor")
    result = {}
    for name, rule in RULES.items():
        parts = ["forwards, merged", "Gram products", "solves"]
        parts += ["forwards, experts"] if len(rule.streams) == 2 else []
        floor = [sum(values) for values in zip(*(found[part] for part in parts))]
        result[name] = {"merge, s": found[name], "floor, s": floor, "merge / floor": ratios(found[name], floor)}
        result[name] |= {f"{part}, s": found[part] for part in parts}
    return result


def rows(found: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Of a table."""
    shown = ["merge, s", "floor, s", "merge / floor"]
    parts = ["forwards, merged, s", "forwards, experts, s", "Gram products, s", "solves, s"]
    return [
        ["rule", *shown, *parts],
        *(
            [name, *(spread(columns[key]) if key in columns else "–" for key in [*shown, *parts])]
            for name, columns in found.items()
        ),
    ]
