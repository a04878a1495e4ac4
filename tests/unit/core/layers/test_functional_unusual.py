"""Parameters that go into functions in unusual ways."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.naive import naive_chain
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from com_lightning.core.tensors.tracked import Part, Tracked, WriteCount, tracked_in
from tests.helpers import relative
from tests.helpers.chains import only
from tests.helpers.functions import Before, Function, data, experts_of, merge, solved, tokens


def test_a_watched_tensor_is_a_parameter_and_tells_what_was_picked_of_it() -> None:
    whole, calls = torch.arange(12.0).view(3, 4), list[str]()

    def on_use(function: Any, args: Any, kwargs: Any) -> None:
        calls.append(f"{function.__name__} {[w.part.positions(whole).flatten().tolist() for w in tracked_in(args)]}")

    weight = Tracked.of(whole, Part("w"), on_use, WriteCount())
    assert isinstance(weight, nn.Parameter)
    rows, last = weight[1:].chunk(2)[1], weight.T[-1]
    assert calls == []  # nothing has been computed
    assert not isinstance(rows, nn.Parameter)
    picked = torch.stack([rows[0].to(torch.float64), torch.zeros(4, dtype=torch.float64)])
    assert type(picked) is Tensor
    _ = last + 1
    assert calls == ["stack [[8, 9, 10, 11]]", "add [[3, 7, 11]]"]
    assert isinstance(last, Tracked)
    part = last.part
    part.write(whole, torch.tensor([-1.0, -2.0, -3.0]))
    assert whole[:, 3].tolist() == [-1.0, -2.0, -3.0]
    assert part.extent(whole) == (3, 11)


def test_a_copy_is_renewed_once_its_parameter_is_solved() -> None:
    """Looked up before the pause, added after it: what is added must be the solved table, as in the naive chain."""

    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.last = nn.Linear(6, 6), nn.Linear(6, 3)
            self.table = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            looked_up = self.table[torch.tensor([3, 1, 0, 0, 2])].contiguous()
            return self.last((self.layer(x) + looked_up).relu())  # type: ignore[no-any-return]

    experts = experts_of(Late)
    merged, _ = merge(experts, data(4, 5, 6))
    expected, _ = merge(experts, data(4, 5, 6), naive_chain)
    assert relative(merged["last.weight"], expected["last.weight"]) < 1e-6


def improves(
    make: Callable[[], nn.Module], batches: list[list[Tensor]] | None = None
) -> tuple[float, list[LayerRecord]]:
    """Error of the merged model's outputs in units of the average's."""
    experts, batches = experts_of(make), batches or data(6, 5, 6)
    merged, records = merge(experts, batches)
    start = {n: average([dict(e.named_parameters())[n] for e in experts]) for n, _ in experts[0].named_parameters()}
    errors = []
    for values in (merged, start):
        gap = 0.0
        for expert, part in zip(experts, batches):
            ours = copy_module(expert, {id(t): values[n] for n, t, _ in named_tensors(expert)})
            with torch.no_grad():
                gap += sum(float((ours(x) - expert(x)).square().sum()) for x in part)
        errors.append(gap)
    return errors[0] / errors[1], records


def test_weights_that_are_picked_by_data_or_repeated_are_left_alone() -> None:
    """Of each copy a regression would be made, and the last one would win."""

    def repeated(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x, w.repeat(len(x), 1, 1))

    def expanded(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x, w.expand(len(x), -1, -1))

    def by_data(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x, w[x.sum((1, 2)).long() % 3])

    for function, shape in ((repeated, (1, 6, 4)), (expanded, (1, 6, 4)), (by_data, (3, 6, 4))):
        ratio, records = improves(lambda f=function, s=shape: Before(f, w=s))  # type: ignore[misc]
        assert ratio < 1
        assert "bmm" in str(records[-1].note)


def test_vectors_stacked_in_one_parameter_are_solved_one_by_one() -> None:
    def scaled(x: Tensor, s: Tensor) -> Tensor:
        x = (x * s[0]).tanh() * s[1]
        shift, scale = s[2:].chunk(2)
        return x * scale + shift

    experts, batches = experts_of(lambda: Before(scaled, s=(4, 6))), data(6, 5, 6)
    merged, records = merge(experts, batches)
    start = average([expert.get_parameter("s") for expert in experts])
    assert [(r.name, r.layer_type, r.parameters) for r in records[1:]] == [
        *((f"s[{n}]", "product", {"s": 6}) for n in (0, 1, 3)),
        ("s[2]", "sum", {"s": 6}),
    ]
    assert all(relative(merged["s"][n], start[n]) > 1e-3 for n in range(4))


def test_einsum_with_capitals_and_an_ellipsis() -> None:
    results = []
    for equation in ("...D,DE->...E", "blf,fo->blo"):
        experts = experts_of(lambda e=equation: Before(lambda x, w: torch.einsum(e, x, w), w=(6, 4)))  # type: ignore[misc]
        results.append(merge(experts, data(3, 5, 6))[0]["w"])
    assert relative(*results) < 1e-6


def test_looking_at_a_weight_does_not_keep_its_layer_from_being_solved() -> None:
    class Watchful(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            penalty = sum(p.square().sum() for p in self.parameters())
            assert not torch.isnan(torch.as_tensor(penalty)).any()
            for layer in self:
                x = layer(x)
            return x

    ratio, records = improves(lambda: Watchful(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)))
    assert not any(record.note for record in records)
    assert ratio < 0.9


def test_rms_norm_keeps_its_eps() -> None:
    functions = experts_of(lambda: Before(lambda x, w: F.rms_norm(0.01 * x, (6,), w, 1e-3), w=(6,)))
    modules = []
    for expert in functions:
        module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), Times(0.01), nn.RMSNorm(6, 1e-3))
        module[0].load_state_dict(expert.get_submodule("layer").state_dict())
        module[3].load_state_dict({"weight": expert.get_parameter("w")})
        modules.append(module)
    assert relative(merge(functions, data(3, 5, 6))[0]["w"], merge(modules, data(3, 5, 6))[0]["3.weight"]) < 1e-5


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda x, w: F.layer_norm(x, (6,), w), {"w": (6,)}),
        (lambda x, w: F.group_norm(x.mT, 2, w), {"w": (6,)}),
        (lambda x, s: x + x.mean() * s[0] + s[1], {"s": (2,)}),
        (lambda x, p: x + x[..., :0].sum() + (x[..., :0] + p).sum(), {"p": (0,)}),
        (lambda x, p, w: torch.addmm(p, x.flatten(0, 1), w), {"p": (30, 4), "w": (6, 4)}),
        (lambda x, s: x * s, {"s": ()}),
        (lambda x, w: x @ copy.deepcopy(nn.ParameterList([w]))[0].T, {"w": (4, 6)}),
        (lambda x, w: torch.vmap(lambda row: F.linear(row, w))(x), {"w": (4, 6)}),
    ],
    ids=["layer norm", "group norm", "scalar", "empty", "addmm of a matrix", "number", "copied", "vmap"],
)
def test_unusual_uses_do_no_harm(function: Function, shapes: dict[str, Sequence[int]]) -> None:
    ratio, _ = improves(lambda: Before(function, **shapes))
    assert ratio < 1.1


def test_a_parameter_that_is_not_contiguous() -> None:
    class Transposed(Before):
        def __init__(self) -> None:
            super().__init__(lambda x, w: x @ w.contiguous(), w=(6, 4))
            self.w = nn.Parameter(torch.randn(4, 6).t())

    ratio, records = improves(Transposed)
    assert solved(records)["w"] == 24
    assert ratio < 1


def test_two_tables_that_look_up_the_same_indices() -> None:
    class Tables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Embedding(12, 6), nn.Embedding(20, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.one(ids) + self.two(ids)  # type: ignore[no-any-return]

    merged, _ = merge(experts_of(Tables), tokens())
    assert merged["two.weight"].shape == (20, 6)


def test_a_copy_that_the_forward_has_changed_stays_as_it_is() -> None:
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.layer, self.last = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            changed = self.w.clone()
            changed[:3] = 0
            x = F.linear(self.layer(x).relu(), self.w)
            return self.last(F.linear(x, changed))  # type: ignore[no-any-return]

    experts = experts_of(Changing)
    merged, expected = merge(experts, data(4, 5, 6))[0], merge(experts, data(4, 5, 6), naive_chain)[0]
    for name in expected:
        assert relative(merged[name], expected[name]) < 1e-5, name


def test_a_matrix_of_the_whole_model_waits_for_the_layers_before_it() -> None:
    """Forwards that take ways of different length must all have come to it."""

    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Parameter(torch.randn(6, 4))
            self.first, self.extra = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).relu()
            if float(x.detach().mean()) > 1.0:
                x = self.extra(x).relu()
            return x @ self.proj

    batches = [[0.1 * torch.randn(4, 5, 6)], [10 * torch.randn(4, 5, 6)]]
    _, records = merge(experts_of(Projected), batches)
    assert [record.name for record in records] == ["first", "extra", "proj"]
    assert records[-1].rows == {"task0": 20, "task1": 20}


def test_masks_of_any_size_are_masks() -> None:
    def masked(value: float) -> Function:
        hidden = torch.ones(5, 5).triu(1).bool()
        return lambda x, p: ((x @ x.mT).masked_fill(hidden, value) + p).softmax(-1) @ x

    results = []
    for value in (-torch.inf, -1e9, -1e4):
        function = masked(value)
        results.append(merge(experts_of(lambda f=function: Before(f, p=(5, 5))), data(4, 5, 6)))  # type: ignore[misc]
    for merged, records in results:
        assert records[-1].groups_without_data == 10
        assert relative(merged["p"], results[0][0]["p"]) < 1e-3


def test_gradients_within_a_forward() -> None:
    def forces(x: Tensor, w: Tensor) -> Tensor:
        with torch.enable_grad():
            place = x.detach().requires_grad_()
            energy = F.linear(F.linear(place, w[0]).tanh(), w[1]).square().sum()
            return torch.autograd.grad(energy, place)[0]

    ratio, records = improves(lambda: Before(forces, w=(2, 6, 6)))
    assert [record.name for record in records] == ["layer", "w[0]", "w[1]"]
    assert ratio < 1.5  # a loss of outputs says little of gradients


def test_positions_in_sequence_first_order_leave_padding_out() -> None:
    def keep(batch: Tensor) -> Tensor:
        return ~batch.isnan().any(-1)

    def call(module: nn.Module, batch: Tensor, index: int) -> object:
        return module(batch.nan_to_num(7.0).transpose(0, 1))

    experts, batches = experts_of(lambda: Before(lambda x, p: x + p[: len(x), None], p=(5, 6))), data(3, 4, 6)
    padded = [[F.pad(x, (0, 0, 0, 1), value=torch.nan) for x in part] for part in batches]
    expected = merge(experts, batches, call=call, masks=only(keep))[0]
    merged = merge(experts, padded, call=call, masks=only(keep))[0]
    assert relative(merged["p"], expected["p"]) < 1e-5


@pytest.mark.parametrize("separate", [False, True])
def test_attention_as_a_function_is_the_module(separate: bool) -> None:
    """As in WavLM and in attention pooling of CLIP's ResNets."""

    def attend(x: Tensor, w: Tensor, b: Tensor, o: Tensor) -> Tensor:
        q, k, v = w.chunk(3)
        how: dict[str, Any] = {"use_separate_proj_weight": True} if separate else {}
        how.update({"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v} if separate else {})
        arguments = (None if separate else w, b, None, None, False, 0.0, o, None)
        return F.multi_head_attention_forward(x.mT.mT, x, x, 6, 2, *arguments, training=False, **how)[0]

    experts = experts_of(lambda: Before(attend, w=(18, 6), b=(18,), o=(6, 6)))
    modules = []
    for expert in experts:
        module = Attending()
        module.layer.load_state_dict(expert.get_submodule("layer").state_dict())
        state = {"in_proj_weight": expert.get_parameter("w"), "in_proj_bias": expert.get_parameter("b")}
        module.attention.load_state_dict({**state, "out_proj.weight": expert.get_parameter("o")}, strict=False)
        nn.init.zeros_(module.attention.out_proj.bias)
        module.attention.out_proj.bias = None  # type: ignore[assignment]
        modules.append(module)
    with torch.no_grad():
        x = torch.randn(3, 5, 6)
        assert relative(experts[0](x), modules[0](x)) < 1e-5
    merged, records = merge(experts, data(3, 5, 6))
    expected, _ = merge(modules, data(3, 5, 6))
    assert not any(record.note for record in records)
    assert relative(merged["w"], expected["attention.in_proj_weight"]) < 1e-4
    assert relative(merged["b"], expected["attention.in_proj_bias"]) < 1e-4
    assert relative(merged["o"], expected["attention.out_proj.weight"]) < 1e-4


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).relu()
        return self.attention.eval()(x, x, x)[0]  # type: ignore[no-any-return]
