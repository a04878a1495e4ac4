"""Layers that write to a residual stream repair what the stream has lost."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from com_lightning import ChainOfMerges, RegMean, RegMeanPlusPlus
from com_lightning.core.chain import chain
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers import layer_type_of
from com_lightning.core.layers.einsum import Contraction
from com_lightning.core.sweep.context import Context, Solved
from com_lightning.core.sweep.task import LayerRecord, NonFiniteError, Task
from com_lightning.results.journal import FileJournal
from tests.helpers import built, perturb, relative
from tests.helpers.chains import MODELS, Block, case, merge, points, spread, tensors, worst
from tests.helpers.zoo import averages, make_experts, run

CORRECTED = ChainOptions(residual=True)


@pytest.mark.parametrize("normalize", [True, False])
def test_the_solution_is_least_squares_on_the_corrected_target(normalize: bool) -> None:
    experts = [expert.double() for expert in built(Block)]
    batches = [[points(task).double(), points(task + 1).double()] for task in (0, 10)]
    merged, records = merge(experts, batches, ChainOptions(normalize=normalize, ridge=0.0, residual=True))
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
        merged, records = merge(experts, batches, ChainOptions(normalize=False, ridge=1e-12, residual=residual))
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
    assert worst(merge(experts, batches, ChainOptions())[0], reference) > 1e-3


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
    plain = merge_layers(tasks, averages(experts), [0.5, 0.5], ChainOptions())
    corrected = [(one, other) for one, other in zip(records, plain) if one.corrected_for]
    assert len(corrected) == 8
    assert {one.layer_type for one, _ in corrected} == {"batch normalisation"}
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
    layer_type = layer_type_of(module)
    assert layer_type is not None
    assert layer_type.can_repair_stream
    weight, output = layer_type.to_matrix(module, module), module(x).detach()
    _check_offset(layer_type, module, x, weight, output)


def test_the_same_of_a_contraction() -> None:
    x, module = spread(0, 3, 2, 4, 5).double(), nn.Module()
    module.weight = nn.Parameter(torch.randn(4, 5, 2, 7, dtype=torch.float64))
    layer_type = Contraction.parse("nghf,hfgo->ohng", x, module.weight, weight_first=False)
    assert layer_type is not None
    output = torch.einsum("nghf,hfgo->ohng", x, module.weight.detach().movedim(0, 0))
    _check_offset(layer_type, module, x, layer_type.to_matrix(module, module), output)


def _check_offset(layer_type: Any, module: nn.Module, x: Tensor, weight: Tensor, output: Tensor) -> None:
    rows = torch.cat([part.reshape(-1, *part.shape[-2:]) for part, _ in layer_type.rows(module, (x,), {})])
    if layer_type.has_bias(module):
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    expected = torch.einsum("ngk,gok->ngo", rows, weight)
    offset = layer_type.offset(module, (x,), {}, weight, output)
    assert relative(offset, expected) < 1e-8
    assert relative(layer_type.offset(module, (x,), {}, weight, output.reshape(1, *output.shape)), expected) < 1e-8
    assert layer_type.offset(module, (x,), {}, weight, output[..., :-1]) is None


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

    merged, records = merge(experts, padded, CORRECTED, call=call, mask=lambda batch: mask)
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
    message = "are finite, but the residual stream that its output is added to is not: task 'task1', batch 1"
    with pytest.raises(NonFiniteError, match=message):
        merge(experts, batches, CORRECTED)
    values, done = averages(experts), Context(on_bad_batch="skip")
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
        records = merge_layers(tasks, values, [0.5, 0.5], CORRECTED, Context(journal=journal))
        for record in records:
            record.seconds = record.solving = 0.0
        return values, records

    with pytest.raises(Interrupted):
        do("unfinished", solved)
    (ours, records), (theirs, expected) = do("unfinished"), do("whole")
    assert records == expected
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_which_rules_do_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ChainOfMerges().options == ChainOptions(normalize=False, residual=True, refit_heads=True)
    assert ChainOfMerges(normalize=True, residual=False, refit_heads=False).options == ChainOptions()
    assert not RegMean().options.residual
    assert not RegMeanPlusPlus().options.residual
    experts, batches = case("attention")
    plain = [merge(experts, batches, rule)[0] for rule in (ChainOptions(), ChainOptions(target="merged"))]
    monkeypatch.setattr(chain, "find_residuals", None)  # with nothing to correct, nothing is looked for
    again = [
        merge(experts, batches, rule)[0] for rule in (ChainOptions(), ChainOptions(target="merged", residual=True))
    ]
    for one, other in zip(plain, again):
        assert all(torch.equal(one[name], value) for name, value in other.items())
    with pytest.raises(TypeError):
        merge(experts, batches, CORRECTED)
