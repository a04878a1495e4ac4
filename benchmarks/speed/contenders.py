"""One merge by this or another library, or one part of the floor, in its own process.

All merges get the same experts and the same data, from one seed. Only the merge is timed. Peak memory is the most that
the process holds during the merge, beyond what it held before.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.memory import Watch
from benchmarks.speed import floor
from benchmarks.speed.tower import Tower
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import average, named_tensors


@contextmanager
def watched(measured: dict[str, float]) -> Iterator[None]:
    """Measure the seconds of a block, and the bytes that it needs beyond what the process held before."""
    watch = Watch()
    start = time.perf_counter()
    yield
    measured["seconds"] = time.perf_counter() - start
    measured["peak"] = watch.anonymous
    watch.over.set()


def ours(rule: ChainOptions, budget: float | None = None) -> Callable[[Tower, dict[str, float]], None]:
    """A merge by this library, from experts in memory to merged weights in memory.

    Args:
        rule: options of the chain.
        budget: GiB that paused forwards may hold.

    Returns:
        A function that merges, and writes seconds, peak memory and the number of layers into its second argument.
    """
    run = Context(memory_budget=None if budget is None else int(budget * 2**30))

    def merge(tower: Tower, measured: dict[str, float]) -> None:
        _, experts, batches = tower.made()

        def call(module: nn.Module, batch: Any, index: int) -> None:
            module(batch)

        with watched(measured):
            tasks = [Task(str(i), expert, data, call) for i, (expert, data) in enumerate(zip(experts, batches))]
            tensors = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
            merged = {name: average([each[name] for each in tensors]) for name in tensors[0]}
            records = merge_layers(tasks, merged, [1 / len(tasks)] * len(tasks), rule, run)
        measured["layers"] = sum(bool(record.parameters) for record in records)

    return merge


def fusion_bench(tower: Tower, measured: dict[str, float]) -> None:
    """RegMean++ of FusionBench, which merges the linear layers; its data pipeline is replaced by batches in memory."""
    from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
    from fusion_bench.mixins.clip_classification import vision_backbone
    from fusion_bench.modelpool import BaseModelPool

    base, experts, batches = tower.made()

    class Theirs(RegMeanAlgorithmForCLIPPlusPlus):  # type: ignore[misc]
        def on_regmean_start(self) -> None:
            """Load no heads, because nothing is classified."""

        def get_input_for_first_layer(self, model: nn.Module, train_dataset: Any) -> list[Tensor]:
            backbone = vision_backbone(model)
            return [backbone.pre_layrnorm(backbone.embeddings(images)) for images in train_dataset]

    class Pool(BaseModelPool):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def named_models(self) -> Any:
            return ((str(number), expert) for number, expert in enumerate(experts))

        def load_pretrained_model(self) -> nn.Module:
            return base

        def load_train_dataset(self, name: str) -> tuple[Tensor, ...]:
            return batches[int(name)]

    algorithm = Theirs(
        num_regmean_examples=tower.samples,
        exclude_param_names_regex=[],
        reduce_non_diagonal_ratio=0.95,
        weight_transpose=True,
        dataloader_kwargs={"batch_size": tower.batch_size, "num_workers": 0},
    )
    with watched(measured):
        algorithm.run(Pool())


def part_of_the_floor(name: str) -> Callable[[Tower, dict[str, float]], None]:
    """One of :data:`~benchmarks.speed.floor.PARTS`."""

    def timed(tower: Tower, measured: dict[str, float]) -> None:
        measured["seconds"] = floor.PARTS[name](tower)

    return timed


RULES = {"one-sided": ChainOptions(target="merged"), "default": ChainOptions(residual=True)}
"""The default is two-sided, and repairs residual streams."""
BUDGET = 0.25
OURS = {
    **{name: ours(rule) for name, rule in RULES.items()},
    f"one-sided, memory_budget={BUDGET}": ours(RULES["one-sided"], BUDGET),
}
THEIRS = "FusionBench RegMean++"
CONTENDERS: dict[str, Callable[[Tower, dict[str, float]], None]] = {
    **{name: part_of_the_floor(name) for name in floor.PARTS},
    **OURS,
    THEIRS: fusion_bench,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for field, value in asdict(Tower()).items():
        parser.add_argument(f"--{field}", type=int, default=value)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    measured: dict[str, float] = {}
    CONTENDERS[options.pop("name")](Tower(**options), measured)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
