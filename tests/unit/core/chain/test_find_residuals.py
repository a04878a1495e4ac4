"""Layers that write to a residual stream are found by one forward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.chain.find_residuals import find_residuals
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.residual_stream import Source
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import Task
from tests.helpers import NAMES_OF_5, built
from tests.helpers.chains import Block, merge, points, spread
from tests.helpers.zoo import averages, make_experts, run


def found(experts: list[nn.Module], batches: list[list[Any]], call: Any = None) -> dict[str, list[Source]]:
    call = call or (lambda module, batch, index: module(batch))
    return find_residuals([Task("a", experts[0], batches[0], call)], averages(experts), Context())


def told(writers: dict[str, list[Source]]) -> dict[str, list[str]]:
    return {name: list(map(str, sources)) for name, sources in writers.items()}


def blocks(prefix: str, pairs: Mapping[str, str | list[str]], count: int = 2) -> dict[str, list[str]]:
    """Writers of each of several blocks -> names of their sources, all within the block."""
    result = {}
    for number in range(count):
        for writer, sources in pairs.items():
            start = f"{prefix}{number}."
            listed = [sources] if isinstance(sources, str) else sources
            result[start + writer] = [" of ".join((s.split()[0], start + s.split()[1])) for s in listed]
    return result


PRE_NORM = {"self_attn.out_proj": "input layer_norm1", "mlp.fc2": "input layer_norm2"}
WRITERS: dict[str, dict[str, list[str]]] = {
    "BERT": blocks(
        "bert.encoder.layer.",
        {"attention.output.dense": "input attention.self.query", "output.dense": "input intermediate.dense"},
    ),
    "ViT": blocks("vit.layers.", {"attention.o_proj": "input layernorm_before", "mlp.fc2": "input layernorm_after"})
    if NAMES_OF_5
    else blocks(
        "vit.encoder.layer.",
        {"attention.output.dense": "input layernorm_before", "output.dense": "input layernorm_after"},
    ),
    "Llama": blocks(
        "model.layers.",
        {"self_attn.o_proj": "input input_layernorm", "mlp.down_proj": "input post_attention_layernorm"},
    ),
    # A linear layer that is a function, with its bias within: nothing is added to that.
    "GPT-2": blocks("transformer.h.", {"attn.c_proj.weight": "input ln_1", "mlp.c_proj.weight": "input ln_2"}),
    "CLIP": {
        **blocks("text_model.encoder.layers.", PRE_NORM),
        **blocks("vision_model.encoder.layers.", PRE_NORM),
    },
    "T5": {
        **blocks(
            "encoder.block.",
            {
                "layer.0.SelfAttention.o": "input layer.0.layer_norm",
                "layer.1.DenseReluDense.wo": "input layer.1.layer_norm",
            },
        ),
        **blocks(
            "decoder.block.",
            {
                "layer.0.SelfAttention.o": "input layer.0.layer_norm",
                "layer.1.EncDecAttention.o": "input layer.1.layer_norm",
                "layer.2.DenseReluDense.wo": "input layer.2.layer_norm",
            },
        ),
    },
    # Both halves of a block in parallel: the second makes up for the first as well, not the other way round.
    "GPT-NeoX": blocks(
        "gpt_neox.layers.",
        {
            "attention.dense": "input input_layernorm",
            "mlp.dense_4h_to_h": ["output attention.dense", "input input_layernorm"],
        },
    ),
    "vit_b_16": blocks(
        "encoder.layers.encoder_layer_", {"self_attention.out_proj": "input ln_1", "mlp.3": "input ln_2"}
    ),
    # What attention in windows gives is rolled and cut before it is added.
    "swin_t": {
        **blocks("features.1.", {"mlp.3": "input norm2"}),
        **blocks("features.3.", {"mlp.3": "input norm2"}),
    },
    "resnet18": {
        name: sources
        for stage in "1234"
        for name, sources in (
            (f"layer{stage}.0.downsample.1", [f"output of layer{stage}.0.bn2"]),
            (f"layer{stage}.1.bn2", [f"input of layer{stage}.1.conv1"]),
        )
    },
    "convnext_tiny": {},  # a layer scale stands in between
    "densenet121": {},
}


@pytest.mark.parametrize("name", WRITERS)
def test_writers_are_found_in_known_architectures(name: str) -> None:
    experts, batches = make_experts(name)
    assert told(found(experts, batches, run)) == WRITERS[name]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_writers_of_the_transformer_layers_of_torch(norm_first: bool, batch_first: bool) -> None:
    def make() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)
        return nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))

    experts, batches = built(make), [[spread(task, 5, 3, 8)] for task in (0, 10)]
    writers = found(experts, batches)
    if norm_first:
        assert told(writers) == blocks("1.layers.", {"self_attn.out_proj": "input norm1", "linear2": "input norm2"})
    else:
        expected = blocks("1.layers.", {"self_attn.out_proj": "input self_attn.q_proj", "linear2": "input linear1"})
        if not batch_first:  # attention gets a transpose of what its output is added to
            expected["1.layers.0.self_attn.out_proj"] = ["output of 0"]
            expected["1.layers.1.self_attn.out_proj"] = ["output of 1.layers.0.norm2"]
        assert told(writers) == expected
    swapped = {name for name, sources in writers.items() if sources[0].swapped}
    assert swapped == (set() if batch_first else {f"1.layers.{n}.self_attn.out_proj" for n in range(2)})


WAYS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Tensor], bool]] = {
    "plain": (lambda self, stream, output: stream + output, True),
    "the other way round": (lambda self, stream, output: torch.add(output, stream), True),
    "in place": (lambda self, stream, output: output.add_(stream), True),
    "into the stream": (lambda self, stream, output: stream.__iadd__(output), True),
    "dropout": (lambda self, stream, output: stream + self.dropout(output), True),
    "stochastic depth": (lambda self, stream, output: self.depth(output) + stream, True),
    "scaled by one": (lambda self, stream, output: stream + 1.0 * output, True),
    "reshaped": (lambda self, stream, output: stream.view(2, -1, 5) + output.reshape(2, -1, 5), True),
    "a bias on top": (lambda self, stream, output: stream + output + 1, True),
    "tuples": (lambda self, stream, output: (stream, output)[0] + (output,)[0], True),
    "scaled": (lambda self, stream, output: stream + 2.0 * output, False),
    "weighted": (lambda self, stream, output: torch.add(stream, output, alpha=2), False),
    "layer scale": (lambda self, stream, output: stream + self.scale * output, False),
    "an activation": (lambda self, stream, output: stream + output.relu(), False),
    "an activation in place": (lambda self, stream, output: stream + output.relu_(), False),
    "subtracted": (lambda self, stream, output: stream - output, False),
    "a changed stream": (lambda self, stream, output: stream.mul_(2) + output, False),
    "twice": (lambda self, stream, output: output + output, False),
    "broadcast": (lambda self, stream, output: stream[:1] + output, False),
    "features the other way": (lambda self, stream, output: (stream[:5].T + output[:5].T).T, False),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_counts_as_an_addition(way: str) -> None:
    add, counts = WAYS[way]
    writers = found(built(lambda: Block(add)), [[points(0)]])
    assert told(writers) == ({"second": ["output of first"]} if counts else {})


def test_the_search_is_one_forward_that_leaves_nothing_behind() -> None:
    experts, calls = built(Block), []

    def call(module: nn.Module, batch: Tensor, index: int) -> None:
        calls.append(index)
        module(batch)

    tasks = [Task("a", experts[0], []), Task("b", experts[1], [points(0), points(1)], call)]
    merged = averages(experts)
    before, run = copy.deepcopy(merged), Context()
    assert told(find_residuals(tasks, merged, run)) == {"second": ["output of first"]}
    assert calls == [0]
    assert not run.warnings
    assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert not any(m._forward_pre_hooks or m._forward_hooks for e in experts for m in e.modules())
    assert all(torch.equal(merged[name], value) for name, value in before.items())


def _fails(module: nn.Module, batch: Tensor, index: int) -> None:
    module(batch)
    raise ValueError("at the end")


def test_a_search_that_fails_says_so_and_the_merge_raises_its_own_error() -> None:
    experts, run = built(Block), Context()
    tasks = [Task(name, expert, [points(0)], _fails) for name, expert in zip("ab", experts)]
    with pytest.warns(UserWarning, match="residual: .* not repaired .*task 'a': ValueError: at the end"):
        assert find_residuals(tasks, averages(experts), run) == {}
    assert len(run.warnings) == 1  # for the report
    assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    with (
        pytest.raises(ValueError, match="at the end") as raised,
        pytest.warns(UserWarning, match="residual: "),
    ):
        merge(experts, [[points(0)], [points(10)]], ChainOptions(residual=True), call=_fails)
    assert "task 'task0', batch 0" in raised.value.__notes__[0]


def test_a_batch_that_fails_is_made_up_for_by_that_of_another_task() -> None:
    experts, run = built(Block), Context()
    tasks = [Task("a", experts[0], [points(0)], _fails), Task("b", experts[1], [points(1)])]
    assert told(find_residuals(tasks, averages(experts), run)) == {"second": ["output of first"]}
    assert not run.warnings


def test_processes_take_the_first_result_and_know_of_a_failure_elsewhere() -> None:
    class Two(Peers):
        def __init__(self, other: Any) -> None:
            self.other = other

        def exchange(self, value: Any) -> list[Any]:
            return [value, self.other]

    tasks, merged = [Task("a", built(Block)[0], [])], averages(built(Block))
    sources = {"a": [Source("input", "b")]}
    assert find_residuals(tasks, merged, Context(peers=Two((sources, "")))) == sources
    run = Context(peers=Two((None, "task 'a': ValueError: there")))
    with pytest.warns(UserWarning, match="residual: "):
        assert find_residuals(tasks, merged, run) == {}
    assert "there" in run.warnings[0]
