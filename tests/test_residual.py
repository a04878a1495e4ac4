"""Layers that write to a residual stream are found, and repair what the stream has lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from com_lightning import ChainOfMerges, RegMean, RegMeanPlusPlus
from com_lightning.core import additions
from com_lightning.core.additions import find_writers
from com_lightning.core.chain import merge_layers
from com_lightning.core.corrections import Source
from com_lightning.core.layers import layer_type
from com_lightning.core.layers.contraction import Contraction
from com_lightning.core.peers import Peers
from com_lightning.core.rule import LayerRecord, NonFiniteError, Rule, Task
from com_lightning.core.run import Run, Solved
from com_lightning.journal import FileJournal
from tests.helpers import NAMES_OF_5, built, perturb, relative
from tests.test_chain import MODELS, case, merge, points, spread, tensors, worst
from tests.zoo import averages, make_experts, run

CORRECTED = Rule(residual=True)


def found(experts: list[nn.Module], batches: list[list[Any]], call: Any = None) -> dict[str, list[Source]]:
    call = call or (lambda module, batch, index: module(batch))
    return find_writers([Task("a", experts[0], batches[0], call)], averages(experts), Run())


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


class Block(nn.Module):
    """A stream, and a layer that writes to it in some way."""

    def __init__(self, way: Callable[[Any, Tensor, Tensor], Tensor] | None = None, ends: bool = True) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 3) if ends else nn.Identity()
        self.dropout, self.depth = nn.Dropout(0.5), StochasticDepth(0.5, "row")
        self.scale = nn.Parameter(torch.ones(5))
        self.way = way or (lambda self, stream, output: stream + output)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.first(x)
        return self.last(self.way(self, stream, self.second(stream.relu())))  # type: ignore[no-any-return]


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


def test_discovery_is_one_forward_that_leaves_nothing_behind() -> None:
    experts, calls = built(Block), []

    def call(module: nn.Module, batch: Tensor, index: int) -> None:
        calls.append(index)
        module(batch)
        raise ValueError("at the end")

    tasks = [Task("a", experts[0], []), Task("b", experts[1], [points(0), points(1)], call)]
    merged = averages(experts)
    before = copy.deepcopy(merged)
    assert told(find_writers(tasks, merged, Run())) == {"second": ["output of first"]}  # what it has found till then
    assert calls == [0]
    assert not torch.overrides._get_current_function_mode_stack()  # type: ignore[no-untyped-call]
    assert not any(m._forward_pre_hooks or m._forward_hooks for e in experts for m in e.modules())
    assert all(torch.equal(merged[name], value) for name, value in before.items())
    with pytest.raises(ValueError, match="at the end"):
        merge(experts, [[points(0)], [points(10)]], CORRECTED, call=call)


def test_processes_take_what_the_first_with_a_batch_has_found() -> None:
    class Two(Peers):
        def exchange(self, value: Any) -> list[Any]:
            return [value, {"a": [Source("input", "b")]}]

    tasks = [Task("a", built(Block)[0], [])]
    assert find_writers(tasks, averages(built(Block)), Run(peers=Two())) == {"a": [Source("input", "b")]}


@pytest.mark.parametrize("normalize", [True, False])
def test_the_solution_is_least_squares_on_the_corrected_target(normalize: bool) -> None:
    experts = [expert.double() for expert in built(Block)]
    batches = [[points(task).double(), points(task + 1).double()] for task in (0, 10)]
    merged, records = merge(experts, batches, Rule(normalize=normalize, ridge=0.0, residual=True))
    inputs, targets = [], []
    for expert, part in zip(experts, batches):
        x = torch.cat(part)
        assert isinstance(expert, Block)
        stream = F.linear(x, merged["first.weight"], merged["first.bias"])
        theirs = expert.first(x)
        rows = torch.cat([stream.relu(), torch.ones(len(x), 1)], 1)
        largest = torch.maximum(rows.norm(dim=1), (theirs.relu().square().sum(1) + 1).sqrt())
        root = 1 / largest[:, None] if normalize else 1.0
        inputs.append(rows * root)
        targets.append((expert.second(theirs.relu()) + theirs - stream) * root)
    solution = torch.linalg.lstsq(torch.cat(inputs), torch.cat(targets)).solution
    assert relative(merged["second.weight"], solution[:5].T) < 1e-8
    assert relative(merged["second.bias"], solution[5]) < 1e-8
    by_name = {record.name: record for record in records}
    assert {name: r.corrected_for for name, r in by_name.items() if r.corrected_for} == {"second": ["output of first"]}
    assert by_name["second"].uncorrected == 0


def _in_parallel(norm: nn.Module, first: nn.Module, second: nn.Module) -> nn.Module:
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm, self.a, self.b = copy.deepcopy(first), norm, first, second

        def forward(self, x: Tensor) -> Tensor:
            stream = self.stem(x)
            hidden = self.norm(stream).tanh()
            return self.a(hidden) + self.b(hidden) + stream  # type: ignore[no-any-return]

    return Parallel()


# Modules that end with a sum, their inputs, and the last layer that writes to it.
STREAMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "linear": (lambda: Block(ends=False), (24, 5), "second"),
    "parallel": (lambda: _in_parallel(nn.LayerNorm(5), nn.Linear(5, 5), nn.Linear(5, 5)), (24, 5), "b"),
    "convolutions": (
        lambda: _in_parallel(nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1, groups=2)),
        (6, 4, 5, 5),
        "b",
    ),
    "norms": (lambda: _in_parallel(nn.LayerNorm(5), nn.Linear(5, 5), nn.LayerNorm(5)), (24, 5), "b"),
    "positions first": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, norm_first=True)),
        (5, 3, 8),
        "1.linear2",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_the_stream_is_as_close_to_the_experts_as_its_last_writer_can_bring_it(name: str) -> None:
    make, shape, writer = STREAMS[name]
    experts = [expert.double() for expert in built(make)]
    batches = [[spread(task + batch, *shape).double() for batch in range(2)] for task in (0, 10)]
    slopes, errors = [], []
    for residual in (True, False):
        merged, records = merge(experts, batches, Rule(normalize=False, ridge=1e-12, residual=residual))
        assert [bool(record.corrected_for) for record in records if record.name == writer] == [residual]
        assert not any(record.uncorrected for record in records)
        error = torch.zeros((), dtype=torch.float64)
        ours = copy.deepcopy(experts[0])
        ours.load_state_dict(merged)
        for expert, part in zip(experts, batches):
            error = error + sum(((ours(x) - expert(x).detach()).square().sum() for x in part), error * 0)
        error.backward()  # type: ignore[no-untyped-call]
        slopes.append(max(float(p.grad.abs().amax()) for p in ours.get_submodule(writer).parameters()))  # type: ignore[union-attr]
        errors.append(error.item())
    assert slopes[0] < 1e-5 * slopes[1]
    if name != "convolutions":  # each writer does its best, which need not be the best for all of them together
        assert errors[0] < 0.95 * errors[1]


@pytest.mark.parametrize("name", STREAMS)
def test_batches_come_in_any_size(name: str) -> None:
    make, shape, _ = STREAMS[name]
    dim = int(name == "positions first")
    experts = [expert.double() for expert in built(make)]
    batches = [[spread(task + batch, *shape).double() for batch in range(2)] for task in (0, 10)]
    reference, _ = merge(experts, batches, CORRECTED)
    single = [list(torch.split(torch.cat(part, dim), 1, dim)) for part in batches]
    assert worst(merge(experts, single, CORRECTED)[0], reference) < 1e-8
    assert worst(merge(experts, batches, Rule())[0], reference) > 1e-3


@pytest.mark.parametrize("name", ["attention", "vit", "bert", "gpt2"])
def test_identical_experts_are_given_back_exactly(name: str) -> None:
    experts, batches = case(name)
    merged, records = merge([experts[0], copy.deepcopy(experts[0])], batches, CORRECTED)
    assert any(record.corrected_for for record in records)
    assert worst(merged, tensors(experts[0])) == 0


def test_running_statistics_do_not_stand_in_the_way() -> None:
    """The target of batch normalisation is in terms of the average of running statistics, which then change."""
    experts, batches = make_experts("resnet18")
    values = averages(experts)
    tasks = [Task(str(n), e, b, run) for n, (e, b) in enumerate(zip(experts, batches))]
    records = merge_layers(tasks, values, [0.5, 0.5], CORRECTED)
    plain = merge_layers(tasks, averages(experts), [0.5, 0.5], Rule())
    corrected = [(one, other) for one, other in zip(records, plain) if one.corrected_for]
    assert len(corrected) == 8
    assert {one.kind for one, _ in corrected} == {"batch normalisation"}
    assert not any(one.uncorrected for one, _ in corrected)
    twins = [Task(str(n), experts[0], batches[0], run) for n in range(2)]
    same = averages([experts[0], experts[0]])
    merge_layers(twins, same, [0.5, 0.5], CORRECTED)
    assert worst(same, tensors(experts[0])) < 1e-5


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(5, 3), (2, 4, 5)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, groups=2), (3, 4, 7, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3, 2, groups=2), (3, 4, 7)),
    "without a batch dimension": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "layer norm": (lambda: nn.LayerNorm(5), (2, 4, 5)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 7, 4)),
    "batch norm": (lambda: nn.BatchNorm2d(4), (3, 4, 7, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_added_to_the_output_is_in_line_with_the_rows(name: str) -> None:
    make, shape = LAYERS[name]
    module, x = perturb(make(), 0.5, seed=1).eval().double(), spread(0, *shape).double()
    kind = layer_type(module)
    assert kind is not None
    assert kind.corrects
    weight, output = kind.to_matrix(module, module), module(x).detach()
    _check_offset(kind, module, x, weight, output)


def test_the_same_of_a_contraction() -> None:
    x, module = spread(0, 3, 2, 4, 5).double(), nn.Module()
    module.weight = nn.Parameter(torch.randn(4, 5, 2, 7, dtype=torch.float64))
    kind = Contraction.parse("nghf,hfgo->ohng", x, module.weight, weight_first=False)
    assert kind is not None
    output = torch.einsum("nghf,hfgo->ohng", x, module.weight.detach().movedim(0, 0))
    _check_offset(kind, module, x, kind.to_matrix(module, module), output)


def _check_offset(kind: Any, module: nn.Module, x: Tensor, weight: Tensor, output: Tensor) -> None:
    rows = torch.cat([part.reshape(-1, *part.shape[-2:]) for part, _ in kind.rows(module, (x,), {})])
    if kind.has_bias(module):
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    expected = torch.einsum("ngk,gok->ngo", rows, weight)
    offset = kind.offset(module, (x,), {}, weight, output)
    assert relative(offset, expected) < 1e-8
    assert relative(kind.offset(module, (x,), {}, weight, output.reshape(1, *output.shape)), expected) < 1e-8
    assert kind.offset(module, (x,), {}, weight, output[..., :-1]) is None


def test_a_stream_that_has_changed_is_not_corrected_for() -> None:
    """Which is found out call by call: the batch that discovery ran on was as it should be."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            stream = self.first(x)
            hidden = stream.relu()
            if len(x) < 24:
                stream.mul_(2)
            return stream + self.second(hidden)  # type: ignore[no-any-return]

    experts, batches = built(Moody), [[points(0), points(1)[:3]], [points(10)]]
    [first, second] = merge(experts, batches, CORRECTED)[1]
    assert (first.corrected_for, first.uncorrected) == ([], 0)
    assert (second.corrected_for, second.uncorrected) == (["output of first"], 1)
    assert second.unpaired == 0


def test_padding_does_not_count() -> None:
    experts = built(MODELS["attention"][0])
    clean = [[spread(task, 4, 6, 12)] for task in (0, 10)]
    mask = torch.cat([torch.ones(4, 6), torch.zeros(4, 3)], 1).bool()
    padded = [[torch.cat([part[0], torch.full((4, 3, 12), 7.0)], 1)] for part in clean]

    def call(module: nn.Module, batch: Tensor, index: int) -> None:
        module(batch, src_key_padding_mask=None if batch.shape[1] == 6 else ~mask)

    merged, records = merge(experts, padded, CORRECTED, call=call, keep=lambda batch: mask)
    assert any(record.corrected_for for record in records)
    assert worst(merged, merge(experts, clean, CORRECTED, call=call)[0]) < 1e-4


def test_a_stream_that_is_not_finite_makes_a_bad_batch() -> None:
    class Overflowing(nn.Module):
        """Its stream may overflow where no layer's input does."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x * 1e15) + self.second(x.sin())  # type: ignore[no-any-return]

    experts, batches = built(Overflowing), [[points(0), points(1)], [points(10), points(11)]]
    for expert in experts:
        expert.get_parameter("first.weight").data.mul_(1e10)
    batches[1][1] = batches[1][1] * 1e15
    message = r"inputs of layer 'second' are finite, but what its output is added to is not: task 'task1', batch 1"
    with pytest.raises(NonFiniteError, match=message):
        merge(experts, batches, CORRECTED)
    values, done = averages(experts), Run(on_bad_batch="skip")
    tasks = [Task(str(n), expert, batches[n]) for n, expert in enumerate(experts)]
    merge_layers(tasks, values, [0.5, 0.5], CORRECTED, done)
    assert [(skipped.task, skipped.batch, skipped.layer) for skipped in done.skipped] == [("1", 1, "second")]
    assert all(bool(value.isfinite().all()) for value in values.values())


@pytest.mark.parametrize("solved", [2, 5])
def test_an_interrupted_merge_goes_on_as_it_would_have(solved: int, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def do(name: str, layers: int = -1) -> tuple[dict[str, Tensor], list[LayerRecord]]:
        class Stopping(FileJournal):
            def add(self, layer: str, entry: Solved) -> None:
                super().add(layer, entry)
                done.append(layer)
                if len(done) == layers:
                    raise Interrupted

        done: list[str] = []
        journal = Stopping(tmp_path / name)
        journal.bind({"a": "1"})
        experts, batches = case("attention")
        values = averages(experts)
        tasks = [Task(str(n), expert, batches[n]) for n, expert in enumerate(experts)]
        records = merge_layers(tasks, values, [0.5, 0.5], CORRECTED, Run(journal=journal))
        for record in records:
            record.seconds = record.solving = 0.0
        return values, records

    with pytest.raises(Interrupted):
        do("unfinished", solved)
    (ours, records), (theirs, expected) = do("unfinished"), do("whole")
    assert records == expected
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_which_rules_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ChainOfMerges().rule == Rule(residual=True)
    assert ChainOfMerges(residual=False).rule == Rule()
    assert not RegMean().rule.residual
    assert not RegMeanPlusPlus().rule.residual
    experts, batches = case("attention")
    plain = [merge(experts, batches, rule)[0] for rule in (Rule(), Rule(target="merged"))]
    monkeypatch.setattr(additions, "find_writers", None)  # with nothing to correct, nothing is looked for
    again = [merge(experts, batches, rule)[0] for rule in (Rule(), Rule(target="merged", residual=True))]
    for one, other in zip(plain, again):
        assert all(torch.equal(one[name], value) for name, value in other.items())
    with pytest.raises(TypeError):
        merge(experts, batches, CORRECTED)
