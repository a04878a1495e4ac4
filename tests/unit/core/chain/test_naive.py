"""The lockstep against the naive chain, which runs the merged model again for every layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from benchmarks.naive import naive_chain
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors
from tests.helpers import NAMES_OF_5, built, relative
from tests.helpers.chains import only

IMPORTANCE = (0.4, 0.6)
RULES = {
    "chain": ChainOptions(),
    "one-sided": ChainOptions(target="merged"),
    "layer by layer": ChainOptions(inputs="expert"),
}
Run = Callable[[Sequence[Task], Mapping[str, Tensor], Sequence[float], ChainOptions], list[LayerRecord]]


def vit(blocks: int = 2) -> nn.Module:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=blocks,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
    )
    module: nn.Module = ViTModel(config)
    return module


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    module: nn.Module = BertModel(config)
    return module


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def image_tasks(make: Callable[[], nn.Module]) -> list[Task]:
    """Two experts, two batches of images each."""
    torch.manual_seed(1)
    tasks = [Task(str(n), expert, [torch.randn(4, 3, 8, 8) for _ in range(2)]) for n, expert in enumerate(built(make))]
    for task in tasks:  # so that normalising does something
        for module in task.expert.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return tasks


def text_tasks() -> list[Task]:
    """Two experts, two padded batches of token ids each."""
    torch.manual_seed(1)
    batches = []
    for lengths in ([7, 4, 2], [5, 7, 3], [6, 6, 1], [2, 7, 7]):
        mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
        batches.append({"input_ids": torch.randint(1, 20, mask.shape) * mask, "attention_mask": mask})

    def call(module: nn.Module, batch: Any, index: int) -> object:
        return module(**batch)

    def keep(batch: Any) -> Tensor:
        mask: Tensor = batch["attention_mask"].bool()
        return mask

    experts = built(bert)
    return [Task(str(n), expert, batches[2 * n : 2 * n + 2], call, only(keep)) for n, expert in enumerate(experts)]


def averaged(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """The average of the experts, as ``merge_layers`` takes it."""
    tensors = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in tasks]
    return {name: average([each[name] for each in tensors], IMPORTANCE) for name in tensors[0]}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(
    "make_tasks",
    [lambda: image_tasks(vit), text_tasks, lambda: image_tasks(cnn)],
    ids=["vit", "bert", "cnn"],
)
def test_the_lockstep_merges_as_the_naive_chain(make_tasks: Callable[[], list[Task]], rule: ChainOptions) -> None:
    tasks = make_tasks()
    start, merged, expected = averaged(tasks), averaged(tasks), averaged(tasks)
    records = merge_layers(tasks, merged, IMPORTANCE, rule)
    reference = naive_chain(tasks, expected, IMPORTANCE, rule)
    assert [(r.name, r.parameters, r.note) for r in records] == [(r.name, r.parameters, r.note) for r in reference]
    solved = {name for record in records for name in record.parameters}
    assert len(records) > 4
    # Both would agree on weights that nothing was written to.
    assert max(relative(merged[name], start[name]) for name in solved) > 1e-2
    for name in expected:
        assert relative(merged[name], expected[name]) <= 1e-5, name


class Tally(Counter[str]):
    """Counts for all copies of a hook: forwards own copies of what hooks refer to."""

    def __deepcopy__(self, memo: Any) -> Tally:
        return self


def counted(blocks: int, run: Run) -> tuple[Counter[str], Counter[str], int]:
    """Merge a ViT: starts of forwards, blocks entered (both by stream) and number of layers merged."""
    tasks = image_tasks(lambda: vit(blocks))
    merged = averaged(tasks)
    ours = {tensor.data_ptr() for tensor in merged.values()}
    starts, entered = Tally(), Tally()

    def count(counter: Tally) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            counter["merged" if next(module.parameters()).data_ptr() in ours else "expert"] += 1

        return hook

    for task in tasks:  # hooks go along into the copies that the forwards run
        task.expert.register_forward_pre_hook(count(starts))
        for block in task.expert.get_submodule("layers" if NAMES_OF_5 else "encoder.layer").children():
            block.register_forward_pre_hook(count(entered))
    records = run(tasks, merged, IMPORTANCE, ChainOptions())
    return starts, entered, sum(bool(record.parameters) for record in records)


@pytest.mark.parametrize("blocks", [2, 6, 12])
def test_the_lockstep_runs_each_forward_once_whatever_the_depth(blocks: int) -> None:
    starts, entered, layers = counted(blocks, merge_layers)
    assert layers == 8 * blocks + 4  # patch embedding, positions, last normalisation and pooler
    assert starts == {"merged": 4, "expert": 4}  # 2 tasks with 2 batches each
    assert entered == {"merged": 4 * blocks, "expert": 4 * blocks}


@pytest.mark.parametrize("blocks", [2, 4])
def test_the_naive_chain_runs_the_merged_model_for_every_layer(blocks: int) -> None:
    starts, entered, layers = counted(blocks, naive_chain)
    assert starts == {"merged": 4 * (layers + 1), "expert": 4}  # the last time to find that nothing is left
    # The eight layers of each block are reached through the blocks before it, the last two through all.
    passed = sum(8 * block for block in range(1, blocks + 1)) + 3 * blocks
    assert entered == {"merged": 4 * passed, "expert": 4 * blocks}
