"""Weights that go into functions without a module of their own being called."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.naive import naive_chain
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from tests.helpers import relative
from tests.helpers.chains import only
from tests.helpers.functions import Before, Function, data, experts_of, merge, solved, tokens

# A function, and what must come out: the same weight as a module's, after putting it into that module's form.
FORMS: dict[str, tuple[Function, dict[str, Sequence[int]], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda x, w: F.linear(x, w), {"w": (4, 6)}, lambda w: w),
    "matmul": (lambda x, w: x @ w, {"w": (6, 4)}, lambda w: w.T),
    "matmul, transposed": (lambda x, w: x @ w.T, {"w": (4, 6)}, lambda w: w),
    "matmul, weight first": (lambda x, w: (w @ x.mT).mT, {"w": (4, 6)}, lambda w: w),
    "mm": (lambda x, w: x.flatten(0, 1).mm(w), {"w": (6, 4)}, lambda w: w.T),
    "einsum": (lambda x, w: torch.einsum("blf,of->blo", x, w), {"w": (4, 6)}, lambda w: w),
    "einsum, ellipsis": (
        lambda x, w: torch.einsum("...f,fhd->...hd", x, w),
        {"w": (6, 2, 2)},
        lambda w: w.flatten(1).T,
    ),
    "conv1d": (lambda x, w: F.conv1d(x.mT, w).mT, {"w": (4, 6, 1)}, lambda w: w[..., 0]),
    "a slice": (lambda x, w: F.linear(x, w[2:6]), {"w": (6, 6)}, lambda w: w[2:6]),
    "views": (lambda x, w: F.conv1d(x.mT, w.squeeze(1).unsqueeze(-1)).mT, {"w": (4, 1, 6)}, lambda w: w[:, 0]),
    "a copy": (lambda x, w: x @ w.T.contiguous(), {"w": (4, 6)}, lambda w: w),
    "cast": (lambda x, w: F.linear(x.double(), w.double()).float(), {"w": (4, 6)}, lambda w: w),
}


@pytest.mark.parametrize("case", FORMS)
def test_a_function_is_merged_as_the_module_that_it_is(case: str) -> None:
    function, shapes, form = FORMS[case]
    experts = experts_of(lambda: Before(function, **shapes))
    modules = []
    for expert in experts:
        module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4, bias=False))
        module[0].load_state_dict(expert.get_submodule("layer").state_dict())
        module[2].load_state_dict({"weight": form(expert.get_parameter("w").detach())})
        modules.append(module)
    merged, records = merge(experts, data(3, 5, 6))
    expected, _ = merge(modules, data(3, 5, 6))
    assert not any(record.note for record in records)
    assert relative(form(merged["w"]), expected["2.weight"]) < 1e-4
    plain = average([expert.get_parameter("w") for expert in experts])
    assert relative(form(merged["w"]), form(plain)) > 1e-2
    untouched = merged["w"] - plain
    assert solved(records)["w"] == form(plain).numel()
    assert int((untouched != 0).sum()) <= form(plain).numel()


def test_a_linear_function_with_bias_is_the_module() -> None:
    experts = experts_of(lambda: Before(lambda x, w, b: F.linear(x, w, b), w=(4, 6), b=(4,)))
    added = experts_of(lambda: Before(lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.T), w=(4, 6), b=(4,)))
    modules = []
    for expert in experts:
        module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        module[0].load_state_dict(expert.get_submodule("layer").state_dict())
        module[2].load_state_dict({"weight": expert.get_parameter("w"), "bias": expert.get_parameter("b")})
        modules.append(module)
    expected = merge(modules, data(3, 5, 6))[0]
    for kind in (experts, added):
        merged = merge(kind, data(3, 5, 6))[0]
        assert relative(merged["w"], expected["2.weight"]) < 1e-4
        assert relative(merged["b"], expected["2.bias"]) < 1e-4


def test_norms_as_functions() -> None:
    experts = experts_of(lambda: Before(lambda x, w, b: F.layer_norm(x, (6,), w, b), w=(6,), b=(6,)))
    modules = []
    for expert in experts:
        module = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.LayerNorm(6))
        module[0].load_state_dict(expert.get_submodule("layer").state_dict())
        module[2].load_state_dict({"weight": expert.get_parameter("w"), "bias": expert.get_parameter("b")})
        modules.append(module)
    merged, expected = merge(experts, data(3, 5, 6))[0], merge(modules, data(3, 5, 6))[0]
    assert relative(merged["w"], expected["2.weight"]) < 1e-4
    assert relative(merged["b"], expected["2.bias"]) < 1e-4


def inputs_of(experts: Sequence[nn.Module], merged: dict[str, Tensor], batches: list[list[Tensor]]) -> Any:
    """Per task what goes into the function, in the merged model and in the expert."""
    pairs = []
    for expert, part in zip(experts, batches):
        ours = copy_module(expert, {id(t): merged[n] for n, t, _ in named_tensors(expert)})
        x = torch.cat(part)
        streams = [m.get_submodule("layer")(x).relu().detach().double() for m in (ours, expert)]
        pairs.append(tuple(streams))
    return pairs


SUMS: dict[str, tuple[Function, Sequence[int], Callable[[Tensor], Tensor]]] = {
    "positions": (lambda x, p: x + p, (5, 6), lambda gap: gap.mean(0)),
    "a bias": (lambda x, p: p + x, (6,), lambda gap: gap.mean((0, 1))),
    "in place": (lambda x, p: x.add_(p), (1, 5, 6), lambda gap: gap.mean(0, keepdim=True)),
    "a longer table": (lambda x, p: x + p[2:7], (9, 6), lambda gap: F.pad(gap.mean(0), (0, 0, 2, 2))),
    "looked up": (lambda x, p: x + p[torch.tensor([3, 1, 3, 0, 2])], (4, 6), None),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", SUMS)
def test_a_sum_takes_up_the_mean_of_what_is_missing(case: str) -> None:
    function, shape, fold = SUMS[case]
    experts, batches = experts_of(lambda: Before(function, p=shape)), data(4, 5, 6)
    merged, records = merge(experts, batches, rule=ChainOptions(ridge=0.0))
    expected = torch.zeros(*shape, dtype=torch.float64)
    for number, (expert, (ours, theirs)) in enumerate(zip(experts, inputs_of(experts, merged, batches))):
        gap = theirs - ours
        assert records[-1].distance[f"task{number}"] == pytest.approx(float(gap.norm() / theirs.norm()), rel=1e-4)
        cosine = float(F.cosine_similarity(ours, theirs, dim=-1).mean())
        assert records[-1].cosine[f"task{number}"] == pytest.approx(cosine, rel=1e-4)
        if case == "looked up":
            mean = gap.mean(0)
            shift = torch.stack([mean[3], mean[1], mean[4], (mean[0] + mean[2]) / 2])
        else:
            shift = fold(gap)
        expected += 0.5 * (expert.get_parameter("p").double() + shift)
    assert relative(merged["p"], expected) < 1e-4
    assert records[-1].layer_type == "sum"
    assert records[-1].groups_without_data == (24 if case == "a longer table" else 0)


def test_a_product_is_a_regression_per_element() -> None:
    experts, batches = experts_of(lambda: Before(lambda x, p: p[:, None] * x.mT, p=(6,))), data(4, 5, 6)
    merged, records = merge(experts, batches, rule=ChainOptions(ridge=0.0))
    above = below = torch.zeros(6, dtype=torch.float64)
    for expert, (ours, theirs) in zip(experts, inputs_of(experts, merged, batches)):
        above = above + (ours * theirs).sum((0, 1)) * expert.get_parameter("p").double()
        below = below + ours.square().sum((0, 1))
    assert relative(merged["p"], above / below) < 1e-4
    assert records[-1].layer_type == "product"


def test_stacked_weights_are_merged_one_by_one() -> None:
    def stacked(x: Tensor, w: Tensor) -> Tensor:
        for number in range(3):
            x = F.linear(x, w[number]).relu()
        return x

    experts = experts_of(lambda: Before(stacked, w=(4, 6, 6)))
    merged, records = merge(experts, data(3, 5, 6))
    modules = []
    for expert in experts:
        layers = [nn.Linear(6, 6), *(nn.Linear(6, 6, bias=False) for _ in range(3))]
        module = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))
        module[0].load_state_dict(expert.get_submodule("layer").state_dict())
        for number in range(3):
            module[2 * number + 2].load_state_dict({"weight": expert.get_parameter("w")[number]})
        modules.append(module)
    expected = merge(modules, data(3, 5, 6))[0]
    for number in range(3):
        assert relative(merged["w"][number], expected[f"{2 * number + 2}.weight"]) < 1e-4
    assert torch.equal(merged["w"][3], average([expert.get_parameter("w") for expert in experts])[3])
    assert [record.name for record in records] == ["layer", "w[0]", "w[1]", "w[2]"]


def route(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows sorted by which of the last four features is the largest, and where each group ends."""
    x = x.flatten(0, -2)
    choice = x[:, :4].argmax(-1).clamp_max(2)  # nothing is sent to the last one
    counts = torch.bincount(choice, minlength=4)
    return F.pad(x, (0, 2))[choice.argsort(stable=True)], counts.cumsum(0).to(torch.int32)


has_grouped = pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch 2.10 brings it")


def grouped(x: Tensor, w: Tensor) -> Tensor:
    rows, ends = route(x)
    return F.grouped_mm(rows, w.mT, offs=ends)


def looped(x: Tensor, w: Tensor) -> Tensor:
    rows, ends = route(x)
    parts = rows.tensor_split(ends[:-1].long().cpu())
    return torch.cat([F.linear(part, w[n]) for n, part in enumerate(parts) if len(part)])


@has_grouped
def test_experts_in_one_tensor_are_regressions_of_their_own_and_the_idle_ones_averaged() -> None:
    experts, batches = experts_of(lambda: Before(grouped, w=(4, 8, 8))), data(16, 5, 6)
    rule = ChainOptions(target="merged", normalize=False, ridge=1e-9)
    merged, records = merge(experts, batches, rule=rule)
    start = average([expert.get_parameter("w") for expert in experts])
    right, left = (torch.zeros(4, 8, 8, dtype=torch.float64) for _ in range(2))
    for expert, (ours, _) in zip(experts, inputs_of(experts, merged, batches)):
        rows, ends = route(ours)
        for number, part in enumerate(rows.tensor_split(ends[:-1].long())):
            gram = part.T @ part / len(rows)
            right[number] += expert.get_parameter("w")[number].detach().double() @ gram
            left[number] += gram
    for number in range(3):  # two features are always zero
        expected = right[number][:, :6] @ left[number][:6, :6].inverse()
        assert relative(merged["w"][number][:, :6], expected) < 1e-4
        assert relative(merged["w"][number], start[number]) > 0.05
    assert torch.equal(merged["w"][3], start[3])
    assert (records[-1].groups, records[-1].groups_without_data) == (4, 1)


def test_what_is_solved_of_a_stack_is_counted() -> None:
    experts = experts_of(lambda: Before(looped, w=(4, 8, 8)))
    merged, records = merge(experts, data(16, 5, 6))
    assert torch.equal(merged["w"][3], average([expert.get_parameter("w") for expert in experts])[3])
    assert sum(record.parameters.get("w", 0) for record in records) == 3 * 8 * 8


def test_a_batched_product_has_a_group_per_weight() -> None:
    def heads(x: Tensor, w: Tensor) -> Tensor:
        return torch.bmm(x.view(*x.shape[:2], 2, 3).flatten(0, 1).transpose(0, 1), w)

    experts = experts_of(lambda: Before(heads, w=(2, 3, 4)))
    merged, records = merge(experts, data(4, 5, 6))
    assert (records[-1].layer_type, records[-1].groups, records[-1].note) == ("contraction", 2, None)
    assert relative(merged["w"], average([expert.get_parameter("w") for expert in experts])) > 1e-2


def test_what_has_no_closed_form_is_averaged_and_told() -> None:
    experts = experts_of(lambda: Before(lambda x, p: x * p.exp(), p=(6,)))
    merged, records = merge(experts, data(4, 5, 6))
    assert torch.equal(merged["p"], average([expert.get_parameter("p") for expert in experts]))
    assert [(r.name, r.note) for r in records if r.note] == [("p", "goes into exp, where it has no closed form")]


def test_a_parameter_that_was_computed_with_is_not_solved_later() -> None:
    def late(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x * w.exp().mean(), w)

    experts = experts_of(lambda: Before(late, w=(4, 6)))
    merged, records = merge(experts, data(4, 5, 6))
    assert torch.equal(merged["w"], average([expert.get_parameter("w") for expert in experts]))
    assert "exp" in str(records[-1].note)


def test_a_weight_that_is_changed_on_the_way_is_not_mistaken_for_the_parameter() -> None:
    def zeroed(x: Tensor, w: Tensor) -> Tensor:
        changed = w.clone()
        changed[:2] = 0
        return F.linear(x, changed)

    experts = experts_of(lambda: Before(zeroed, w=(4, 6)))
    merged, _ = merge(experts, data(4, 5, 6))
    assert torch.equal(merged["w"], average([expert.get_parameter("w") for expert in experts]))


def test_masked_scores_do_not_count() -> None:
    def scores(x: Tensor, p: Tensor) -> Tensor:
        hidden = torch.ones(5, 5).triu(1).bool()
        return ((x @ x.mT).masked_fill(hidden, -torch.inf) + p).softmax(-1) @ x

    experts, batches = experts_of(lambda: Before(scores, p=(5, 5))), data(4, 5, 6)
    merged, records = merge(experts, batches)
    assert bool(torch.isfinite(merged["p"]).all())
    assert records[-1].groups_without_data == 10  # above the diagonal nothing is learned


def test_attention_biases_given_as_a_mask_are_added_to_the_scores() -> None:
    def masked(x: Tensor, p: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=p)

    def added(x: Tensor, p: Tensor) -> Tensor:
        return (x @ x.mT * 6**-0.5 + p).softmax(-1) @ x

    results = [merge(experts_of(lambda f=f: Before(f, p=(5, 5))), data(4, 5, 6)) for f in (masked, added)]  # type: ignore[misc]
    assert relative(results[0][0]["p"], results[1][0]["p"]) < 1e-5
    assert [record.layer_type for record in results[0][1]] == ["linear", "sum"]


class TiedHead(nn.Module):
    """The head is the table, by a function, with a bias of its own; ``early`` uses it before the table is looked up."""

    def __init__(self, early: bool = False) -> None:
        super().__init__()
        self.embed, self.body, self.early = nn.Embedding(12, 6), nn.Linear(6, 6), early
        self.bias = nn.Parameter(torch.randn(12))

    def forward(self, ids: Tensor) -> Tensor:
        if self.early:
            scores = F.linear(F.one_hot(ids % 6, 6).float(), self.embed.weight)
            return self.body(self.embed(scores.argmax(-1)))  # type: ignore[no-any-return]
        return F.linear(self.body(self.embed(ids)), self.embed.weight, self.bias)


def test_the_bias_of_a_tied_head_makes_up_for_the_weight() -> None:
    experts, batches = experts_of(TiedHead), tokens()
    merged, records = merge(experts, batches, rule=ChainOptions(ridge=0.0))
    assert [record.name for record in records] == ["embed", "body", "bias"]
    gaps = torch.zeros(12)
    for expert, part in zip(experts, batches):
        ours = copy_module(expert, {id(t): merged[n] for n, t, _ in named_tensors(expert)})
        with torch.no_grad():
            gaps += torch.stack([expert(ids) - ours(ids) for ids in part]).mean((0, 1, 2))
    assert float(gaps.abs().max()) < 1e-4  # the merged outputs have the experts' mean


def test_a_table_that_is_a_weight_first_is_merged_as_a_weight() -> None:
    _, records = merge(experts_of(lambda: TiedHead(early=True)), tokens())
    assert [(r.name, r.layer_type) for r in records if r.parameters] == [("embed.weight", "linear"), ("body", "linear")]


def test_padding_does_not_count_in_sums_and_products() -> None:
    def both(x: Tensor, p: Tensor, s: Tensor) -> Tensor:
        return (x + p[: x.shape[1]]) * s

    def keep(batch: Tensor) -> Tensor:
        return ~batch.isnan().any(-1)

    def call(module: nn.Module, batch: Tensor, index: int) -> object:
        return module(batch.nan_to_num(7.0))

    experts, batches = experts_of(lambda: Before(both, p=(5, 6), s=(6,))), data(4, 4, 6)
    padded = [[F.pad(x, (0, 0, 0, 1), value=torch.nan) for x in part] for part in batches]
    expected = merge(experts, batches)[0]
    merged = merge(experts, padded, call=call, masks=only(keep))[0]
    for name in expected:
        assert relative(merged[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("rule", [ChainOptions(), ChainOptions(target="merged"), ChainOptions(inputs="expert")])
@pytest.mark.parametrize("function", [looped, pytest.param(grouped, marks=has_grouped)])
def test_functions_pause_in_lockstep_as_in_the_naive_chain(function: Function, rule: ChainOptions) -> None:
    def whole(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return function(x + p, w)

    experts = experts_of(lambda: Before(whole, p=(5, 6), w=(4, 8, 8)))
    merged, records = merge(experts, data(4, 5, 6), rule=rule)
    expected, reference = merge(experts, data(4, 5, 6), naive_chain, rule)
    assert [(r.name, r.parameters) for r in records] == [(r.name, r.parameters) for r in reference]
    for name in expected:
        assert relative(merged[name], expected[name]) < 1e-5, name


@pytest.mark.parametrize("case", FORMS)
def test_identical_experts_come_back(case: str) -> None:
    function, shapes, _ = FORMS[case]
    expert = experts_of(lambda: Before(function, **shapes))[0]
    merged, _ = merge([expert, copy.deepcopy(expert)], data(3, 5, 6))
    assert relative(merged["w"], expert.get_parameter("w")) < 1e-6
