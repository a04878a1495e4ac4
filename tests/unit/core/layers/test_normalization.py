"""Batch normalisation: running statistics are re-estimated on the merged model's inputs, and change nothing it does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers import layer_type_of
from com_lightning.core.layers.base import Arguments, LayerCall, RowMask
from com_lightning.core.layers.candidates import candidates
from com_lightning.core.layers.normalization import BatchNorm, PerChannel
from com_lightning.core.solve.statistics import InputSums
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors
from tests.helpers import built, relative
from tests.helpers.zoo import averages, make_experts, run, with_values
from tests.helpers.zoo import merge as merge_zoo

Batches = list[list[Tensor]]
RULES = {
    "two-sided": ChainOptions(),
    "one-sided": ChainOptions(target="merged"),
    "each layer on its own": ChainOptions(inputs="expert", target="merged"),
}


def batch(seed: int, *shape: int) -> Tensor:
    """Noise; every ten seeds are a task, with a mean and a scale of its own for each feature."""
    task = torch.Generator().manual_seed(1000 + seed // 10)
    mean, scale = torch.randn(shape[1:], generator=task), 0.2 + torch.rand(shape[1:], generator=task)
    return mean + scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batches(*shape: int, tasks: int = 2) -> Batches:
    return [[batch(10 * task + number, *shape) for number in range(2)] for task in range(tasks)]


def trained(expert: nn.Module, call: Callable[[], object]) -> nn.Module:
    """Running statistics are those of the inputs that each layer has in a forward, in eval mode."""

    def measure(layer: Any, args: tuple[Tensor]) -> None:
        values = args[0].movedim(1, -1).flatten(0, -2)
        layer.running_mean.copy_(values.mean(0))
        layer.running_var.copy_(values.var(0, correction=0))

    with torch.no_grad():
        layers = [layer for layer in expert.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        hooks = [layer.register_forward_pre_hook(measure) for layer in layers]
        call()
    for hook in hooks:
        hook.remove()
    return expert


def all_trained(experts: list[nn.Module], batches: Batches) -> list[nn.Module]:
    return [trained(expert, partial(expert, torch.cat(part))) for expert, part in zip(experts, batches)]


def mlp(norm: Callable[[], nn.Module] = lambda: nn.BatchNorm1d(6)) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), norm(), nn.ReLU(), nn.Linear(6, 3))


def merge(
    experts: list[nn.Module], batches: Batches, rule: ChainOptions, importance: list[float] | None = None, **kwargs: Any
) -> tuple[nn.Module, list[LayerRecord]]:
    importance = importance or [1 / len(experts)] * len(experts)
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
    merged = {n: average([s[n] for s in states], importance) for n, t in states[0].items() if t.is_floating_point()}
    tasks = [Task(str(n), expert, part, **kwargs) for n, (expert, part) in enumerate(zip(experts, batches))]
    records = merge_layers(tasks, merged, importance, rule)
    module = copy.deepcopy(experts[0])
    with torch.no_grad():
        for name, tensor, _ in named_tensors(module):
            if name in merged:
                tensor.copy_(merged[name])
    return module, records


def buffer(module: nn.Module, name: str) -> Tensor:
    return module.get_buffer(name)


def test_running_statistics_are_those_of_the_merged_models_inputs() -> None:
    experts, batches = make_experts("resnet18")
    joined = [{name: torch.cat([b[name] for b in part]) for name in part[0]} for part in batches]
    for expert, whole in zip(experts, joined):
        trained(expert, partial(run, expert, whole))
    result, averaged = merge_zoo(experts, batches), averages(experts)
    model = with_values(experts[0], result.values)
    inputs: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        return lambda layer, args: inputs.__setitem__(name, args[0].movedim(1, -1).flatten(0, -2))

    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(look(name))
    with torch.no_grad():
        run(model, {name: torch.cat([part[name] for part in joined]) for name in joined[0]})
    assert len(inputs) == 21

    def errors(values: dict[str, Tensor]) -> list[float]:
        means = [relative(values[f"{name}.running_mean"], x.mean(0)) for name, x in inputs.items()]
        return means + [relative(values[f"{name}.running_var"], x.var(0, correction=0)) for name, x in inputs.items()]

    assert max(errors(result.values)) < 1e-4
    assert max(errors(averaged)) > 0.1


def test_both_tasks_variances_and_the_distance_of_their_means_are_in_the_variance() -> None:
    importance, batches = [0.3, 0.7], make_batches(400, 6)
    experts = all_trained(built(lambda: nn.Sequential(nn.BatchNorm1d(6)), scale=0.0), batches)
    module, records = merge(experts, batches, ChainOptions(), importance)
    means, variances = ([buffer(expert, f"0.running_{kind}") for expert in experts] for kind in ("mean", "var"))
    mean = sum(a * m for a, m in zip(importance, means))
    assert isinstance(mean, Tensor)
    expected = sum(a * (v + (m - mean) ** 2) for a, m, v in zip(importance, means, variances))
    assert isinstance(expected, Tensor)
    assert relative(buffer(module, "0.running_mean"), mean) < 1e-5
    assert relative(buffer(module, "0.running_var"), expected) < 1e-5
    assert records[0].buffers == ["0.running_mean", "0.running_var"]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_re_estimating_leaves_what_the_layer_does(rule: ChainOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = make_batches(40, 5)
    experts = all_trained(built(mlp), batches)
    module, _ = merge(experts, batches, rule)
    monkeypatch.setattr(BatchNorm, "finish", lambda self, module, weight, *_: self.from_matrix(module, weight))
    averaged, _ = merge(experts, batches, rule)
    assert relative(buffer(module, "1.running_var"), buffer(averaged, "1.running_var")) > 1e-2
    for x in (x for part in batches for x in part):
        assert relative(module(x), averaged(x)) < 1e-5


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("affine", [True, False])
def test_identical_experts_are_given_back(rule: ChainOptions, affine: bool) -> None:
    batches = make_batches(40, 5)
    expert = all_trained(built(lambda: mlp(lambda: nn.BatchNorm1d(6, affine=affine)), 1), batches)[0]
    module, _ = merge([expert, copy.deepcopy(expert)], batches, rule)
    one_sided = rule == RULES["one-sided"]  # takes the calibration data's moments, as it has nothing to compare with
    if not (one_sided and not affine):
        assert relative(module(batches[0][0]), expert(batches[0][0])) < 1e-5
    for name in ("1.running_mean", "1.running_var"):
        assert (relative(buffer(module, name), buffer(expert, name)) < 1e-5) != one_sided


def test_one_sided_statistics_are_those_of_the_calibration_data() -> None:
    batches = make_batches(40, 5)
    module, _ = merge(all_trained(built(mlp), batches), batches, ChainOptions(target="merged"))
    inputs = module.get_submodule("0")(torch.cat([x for part in batches for x in part]))
    assert relative(buffer(module, "1.running_mean"), inputs.mean(0)) < 1e-5
    assert relative(buffer(module, "1.running_var"), inputs.var(0)) < 2e-2


def test_without_scale_and_offset_the_running_statistics_are_re_estimated() -> None:
    batches = make_batches(40, 5)
    experts = all_trained(built(lambda: mlp(lambda: nn.BatchNorm1d(6, affine=False))), batches)
    module, records = merge(experts, batches, ChainOptions())
    assert [record.name for record in records] == ["0", "1", "3"]
    assert records[1].parameters == {}
    assert records[1].buffers == ["1.running_mean", "1.running_var"]
    inputs = module.get_submodule("0")(torch.cat([x for part in batches for x in part]))
    assert relative(buffer(module, "1.running_mean"), inputs.mean(0)) < 1e-4


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 5, 6)], ids=["channels second", "as wide as it has channels"])
def test_padding_is_left_out_of_the_moments(shape: tuple[int, ...]) -> None:
    layer, channels = nn.BatchNorm1d(shape[1]).eval(), shape[1]
    layer_type, x, entry = layer_type_of(layer), batch(0, *shape), InputSums(True, True, True)
    assert isinstance(layer_type, BatchNorm)
    keep = torch.rand(shape[0], shape[2], generator=torch.Generator().manual_seed(0)) > 0.5
    call = LayerCall(Arguments((x,)), Arguments((x + 1,)), layer_type.to_matrix(layer, layer), RowMask([(keep, None)]))
    layer_type.gather(layer, entry, call)
    rows = x.movedim(1, -1)[keep]
    assert rows.shape == (int(keep.sum()), channels)
    assert entry.moments.count == entry.expert_moments.count == len(rows)
    torch.testing.assert_close(entry.moments.mean, rows.double().mean(0))
    torch.testing.assert_close(entry.moments.variance, rows.double().var(0))
    torch.testing.assert_close(entry.expert_moments.mean, rows.double().mean(0) + 1, atol=1e-6, rtol=1e-6)


def test_a_channel_without_variance_gives_something_finite() -> None:
    batches = make_batches(40, 5)
    experts = all_trained(built(mlp), batches)
    with torch.no_grad():
        experts[0].get_parameter("0.weight")[0] = 0.0  # dead in one expert, on the data and in its running statistics
        experts[1].get_parameter("0.weight")[1] = 0.0  # dead on the data alone
        buffer(experts[0], "1.running_var")[0] = 0.0
    for rule in RULES.values():
        module, _ = merge(experts, batches, rule)
        assert all(bool(tensor.isfinite().all()) for _, tensor, _ in named_tensors(module))
        inputs = module.get_submodule("0")(torch.cat([x for part in batches for x in part]))
        assert bool((buffer(module, "1.running_var") < 10 * inputs.var(0) + 10).all())


def test_forwards_of_different_sizes_have_no_counterpart_and_do_not_count() -> None:
    layer = nn.BatchNorm1d(6).eval()
    layer_type, entry = BatchNorm(), InputSums(True, True, True)
    x = batch(0, 8, 6)
    call = LayerCall(Arguments((x,)), Arguments((x[:3],)), layer_type.to_matrix(layer, layer))
    assert not layer_type.gather(layer, entry, call)
    assert entry.moments.count == entry.expert_moments.count == 0
    weight = layer_type.to_matrix(layer, layer)
    written = layer_type.finish(layer, weight, [layer], [entry.to_means(weight)], [1.0])
    assert isinstance(written, dict)
    assert torch.equal(written["running_mean"].float(), layer.get_buffer("running_mean"))


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.SyncBatchNorm(6),
        lambda: nn.BatchNorm1d(6, momentum=None),
        lambda: nn.BatchNorm1d(6).to(torch.float64),
    ],
    ids=["sync", "cumulative", "double"],
)
def test_variants(norm: Callable[[], nn.Module]) -> None:
    batches = make_batches(40, 5)
    dtype = next(norm().parameters()).dtype
    batches = [[x.to(dtype) for x in part] for part in batches]
    experts = all_trained([expert.to(dtype) for expert in built(lambda: mlp(norm))], batches)
    module, records = merge(experts, batches, ChainOptions())
    assert [bool(record.buffers) for record in records] == [False, True, False]
    with torch.no_grad():
        inputs = module.get_submodule("0")(torch.cat([x for part in batches for x in part]))
    assert relative(buffer(module, "1.running_mean"), inputs.mean(0)) < 1e-4


def test_half_precision_is_made_up_for() -> None:
    layer = nn.BatchNorm1d(6).eval().to(torch.bfloat16)
    x = batch(0, 40, 6)
    layer_type, entry = BatchNorm(), InputSums(True, True, True)
    weight = layer_type.to_matrix(layer, layer)
    layer_type.gather(layer, entry, LayerCall(Arguments((x + 1,)), Arguments((3 * x,)), weight))
    written = layer_type.finish(layer, weight, [layer], [entry.to_means(weight)], [1.0])
    assert isinstance(written, dict)
    stored = {name: value.to(torch.bfloat16).double() for name, value in written.items()}
    assert all(torch.equal(stored[name], written[name]) for name in ("running_mean", "running_var"))
    new = nn.functional.batch_norm(x.double(), written["running_mean"], written["running_var"], eps=layer.eps)
    old = nn.functional.batch_norm(x.double(), torch.zeros(6).double(), torch.ones(6).double(), eps=layer.eps)
    torch.testing.assert_close(new * written["weight"] + written["bias"], old)


def test_batch_statistics_in_eval_mode_are_a_scale_and_an_offset() -> None:
    batches = make_batches(40, 5)
    experts = built(lambda: mlp(lambda: nn.BatchNorm1d(6, track_running_stats=False)))
    assert type(layer_type_of(experts[0].get_submodule("1"))) is PerChannel
    _, records = merge(experts, batches, ChainOptions())
    assert records[1].parameters == {"1.weight": 6, "1.bias": 6}
    assert records[1].buffers == []
    module, _ = merge([experts[0], copy.deepcopy(experts[0])], batches, ChainOptions())
    assert relative(module(batches[0][0]), experts[0](batches[0][0])) < 1e-5


def test_private_running_statistics_leave_the_layer_averaged() -> None:
    names = {name for name, _, _ in named_tensors(mlp())}
    assert set(candidates(mlp(), names)) == {"0", "1", "3"}
    assert set(candidates(mlp(), names - {"1.running_mean"})) == {"0", "3"}


def test_lazy_layers() -> None:
    lazy = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyConv1d(2, 3))
    assert [layer_type_of(layer) for layer in lazy] == [None] * 4  # no shape yet
    batches = make_batches(40, 5)
    loaded = nn.Sequential(nn.LazyLinear(6), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(6, 3))
    loaded.load_state_dict(mlp().state_dict())
    experts = [loaded.eval(), *built(mlp, 1)]
    _, records = merge(experts, batches, ChainOptions())
    assert [bool(record.parameters) for record in records] == [True] * 3
