"""One merge, by us or by another library, in a process of its own: ``python -m benchmarks.speed.contenders NAME ...``.

All get the same experts and the same data, from one seed. What is timed is the merge alone; peak memory is what the
process had at most during it, beyond what it had before.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.lockstep import perturbed
from benchmarks.memory import Watch
from com_lightning.core.chain import merge_layers
from com_lightning.core.rule import Rule, Task
from com_lightning.core.sharing import average, named_tensors

SEED = 0


@dataclass
class Tower:
    """A CLIP vision tower, by default of the size of ViT-B/32, with random weights.

    Attributes:
        samples: per task.
    """

    tasks: int = 4
    samples: int = 256
    batch_size: int = 32
    blocks: int = 12
    width: int = 768
    image: int = 224
    patch: int = 32

    def made(self) -> tuple[nn.Module, list[nn.Module], list[tuple[Tensor, ...]]]:
        """Base, experts, and the batches of each task."""
        torch.manual_seed(SEED)
        config = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(self.width // 64, 1),
            image_size=self.image,
            patch_size=self.patch,
        )
        base: nn.Module = CLIPVisionModel(config)
        base.eval()
        experts = [perturbed(base) for _ in range(self.tasks)]
        shape = (self.samples, 3, self.image, self.image)
        return base, experts, [torch.split(torch.randn(shape), self.batch_size) for _ in experts]


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Seconds, and bytes beyond what there was, of what is done within."""
    watch = Watch()
    start = time.perf_counter()
    yield
    found["seconds"] = time.perf_counter() - start
    found["peak"] = watch.anonymous


def ours(rule: Rule) -> Callable[[Tower, dict[str, float]], None]:
    """A merge by our rules, from experts in memory to merged weights in memory."""

    def merge(tower: Tower, found: dict[str, float]) -> None:
        _, experts, batches = tower.made()

        def call(module: nn.Module, batch: Any, index: int) -> None:
            module(batch)

        with watched(found):
            tasks = [Task(str(i), expert, own, call) for i, (expert, own) in enumerate(zip(experts, batches))]
            tensors = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
            merged = {name: average([each[name] for each in tensors]) for name in tensors[0]}
            records = merge_layers(tasks, merged, [1 / len(tasks)] * len(tasks), rule)
        found["layers"] = sum(bool(record.parameters) for record in records)

    return merge


def fusion_bench(tower: Tower, found: dict[str, float]) -> None:
    """RegMean++ of FusionBench, which merges the linear layers; its data pipeline is replaced by batches in memory."""
    from fusion_bench.method.regmean_plusplus.clip_regmean_plusplus import RegMeanAlgorithmForCLIPPlusPlus
    from fusion_bench.mixins.clip_classification import vision_backbone
    from fusion_bench.modelpool import BaseModelPool

    base, experts, batches = tower.made()

    class Theirs(RegMeanAlgorithmForCLIPPlusPlus):  # type: ignore[misc]
        def on_regmean_start(self) -> None:
            """No heads: nothing is classified."""

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
    with watched(found):
        algorithm.run(Pool())


CONTENDERS: dict[str, Callable[[Tower, dict[str, float]], None]] = {
    "one-sided": ours(Rule(target="merged")),
    "two-sided": ours(Rule()),
    "default": ours(Rule(residual=True)),
    "FusionBench RegMean++": fusion_bench,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", choices=CONTENDERS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    for field, value in asdict(Tower()).items():
        parser.add_argument(f"--{field}", type=int, default=value)
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    found: dict[str, float] = {}
    CONTENDERS[options.pop("name")](Tower(**options), found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
