"""``refit_heads`` and ``Refitted`` in a trainer: private layers come closer to what the experts give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from com_lightning import (
    TIES,
    TSVM,
    Average,
    ChainOfMerges,
    ChainOfMergesCallback,
    Combined,
    Fisher,
    MergeDataModule,
    MergeError,
    MergingMethod,
    Refitted,
    RegMean,
    RegMeanPlusPlus,
    TaskArithmetic,
)
from tests.helpers import Classifier, built, make_data, quiet_trainer


def make_classifiers() -> dict[str, Classifier]:
    return dict(zip("ab", built(Classifier, 2, 0.4)))  # type: ignore[arg-type]


def make_base() -> Classifier:
    (base,) = built(Classifier, 1, 0.0)
    assert isinstance(base, Classifier)
    return base


def merge(method: MergingMethod, output_dir: Path | None = None) -> ChainOfMergesCallback:
    data = MergeDataModule({task: make_data(seed) for seed, task in enumerate("ab")}, num_samples=60, batch_size=20)
    callback = ChainOfMergesCallback(
        make_classifiers(),
        method,
        private=["head"],
        output_dir=str(output_dir) if output_dir else None,
        base=make_base() if "base" in method.needs else None,
        baselines=False,
    )
    quiet_trainer(callbacks=[callback]).validate(Classifier(), datamodule=data, verbose=False)
    return callback


METHODS: list[Callable[[bool], MergingMethod]] = [
    lambda on: ChainOfMerges(refit_heads=on),
    lambda on: ChainOfMerges(refit_heads=on, private_biases=True),
    lambda on: ChainOfMerges(refit_heads=on, sensitivity="numbers"),
    lambda on: ChainOfMerges("merged", refit_heads=on),
    lambda on: Refitted(RegMean()) if on else RegMean(),
    lambda on: Refitted(RegMeanPlusPlus()) if on else RegMeanPlusPlus(),
    lambda on: Refitted(Average()) if on else Average(),
    lambda on: Refitted(TIES(0.5)) if on else TIES(0.5),
    lambda on: Refitted(Fisher()) if on else Fisher(),
    lambda on: Refitted(Combined(TSVM(), TaskArithmetic())) if on else Combined(TSVM(), TaskArithmetic()),
]


@pytest.mark.parametrize("method", METHODS)
def test_heads_come_closer_to_what_the_experts_give(method: Callable[[bool], MergingMethod], tmp_path: Path) -> None:
    plain, refitted = merge(method(False)), merge(method(True), tmp_path / "merged")
    for seed, task in enumerate("ab"):
        x = make_data(seed).val_dataloader().dataset.tensors[0]
        old, new, expert = (modules[task] for modules in (plain.modules, refitted.modules, make_classifiers()))
        torch.testing.assert_close(old.get_parameter("body.3.weight"), new.get_parameter("body.3.weight"))
        with torch.no_grad():
            errors = [(module(x) - expert(x)).square().mean() for module in (new, old)]
        assert errors[0] < 0.9 * errors[1]
    report = refitted.report
    assert report is not None
    assert str(report.parameters["head.weight"]) == "private, solved for the merged model"
    assert "Private layers of all tasks: head.weight, head.bias solved for the merged model's features." in str(report)
    assert [layer.name for layer in report.layers][-2:] == ["head of a", "head of b"]
    again = Classifier.load_from_checkpoint(tmp_path / "merged" / "b.ckpt", weights_only=True)
    torch.testing.assert_close(again.head.weight, refitted.modules["b"].get_parameter("head.weight"))


@pytest.mark.parametrize("normalize", [False, True])
def test_a_refitted_chain_is_the_chain_with_the_option(normalize: bool) -> None:
    plain = ChainOfMerges(normalize=normalize, refit_heads=False)
    one, two = merge(ChainOfMerges(normalize=normalize)), merge(Refitted(plain, normalize=normalize))
    for task, module in one.modules.items():
        torch.testing.assert_close(module.state_dict(), two.modules[task].state_dict())


def test_what_a_rule_without_layers_does_is_told_as_without() -> None:
    report = merge(Refitted(Average())).report
    assert report is not None
    assert str(report.parameters["body.0.weight"]) == "averaged"
    assert str(report.parameters["head.weight"]) == "private, solved for the merged model"


@pytest.mark.parametrize(
    ("method", "told"),
    [
        (Refitted(TIES(0)), "method: density: must be above 0"),
        (Refitted(TIES(), ridge=-1), "ridge: must be 0 or more, and finite, got -1"),
        (Refitted(ChainOfMerges()), "method: ChainOfMerges solves private layers by itself; use it without Refitted"),
        (Refitted(Refitted(TIES())), "method: Refitted solves private layers by itself"),
        (Combined(Refitted(TIES()), Average()), "matrices: Refitted merges the model as a whole"),
    ],
)
def test_wrong_settings_are_told(method: MergingMethod, told: str) -> None:
    with pytest.raises(MergeError, match=told):
        merge(method)


class Odd(Classifier):
    """A head with parameters that no layer with a closed form has, that no forward uses, or that one task lacks."""

    def __init__(self, classes: int = 3, width: int = 8, has_skip: bool = False) -> None:
        super().__init__(classes, width)
        self.skip = nn.Linear(width, classes) if has_skip else None
        self.power = nn.Parameter(torch.ones(1))
        self.spare = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        skipped = 0.0 if self.skip is None else self.skip(features)
        return (self.head(features) + skipped).sigmoid() ** self.power  # type: ignore[no-any-return]


class Repeats(Classifier):
    """Calls its head again on what the head has given, as a language model does that generates."""

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(x)
        logits = self.head(features)
        for _ in range(2):
            logits = self.head(features + logits.argmax(1, keepdim=True))
        return logits  # type: ignore[no-any-return]


def lines(modules: dict[str, Classifier], private: list[str] | None, method: MergingMethod) -> tuple[list[str], str]:
    """What the report says of private layers, and all of it."""
    data = MergeDataModule({task: make_data(seed) for seed, task in enumerate("ab")}, num_samples=40)
    callback = ChainOfMergesCallback(modules, method, private=private, baselines=False)
    quiet_trainer(callbacks=[callback]).validate(copy.deepcopy(modules["a"]), datamodule=data, verbose=False)
    assert callback.report is not None
    return callback.report.private, str(callback.report)


def test_what_stays_as_it_was_is_told_with_the_reason() -> None:
    torch.manual_seed(0)
    one, two = Odd(has_skip=True), Odd()
    two.body.load_state_dict(one.body.state_dict())
    two.power.data.add_(0.5)
    private, text = lines({"a": one, "b": two}, ["head", "power", "spare", "skip"], ChainOfMerges())
    of_a, of_b = private
    rest = "spare.weight, spare.bias left as in the expert (no calibration forward uses it)"
    assert of_a.startswith("a: head.weight, head.bias, skip.weight, skip.bias solved for the merged model's features; ")
    assert of_b.startswith("b: head.weight, head.bias solved for the merged model's features; ")
    for line in private:
        assert "power left as in the expert (goes into pow, where it has no closed form)" in line
        assert rest in line
        assert f"Private layers of {line}." in text


def test_what_all_experts_have_alike_does_not_become_one_for_each_task() -> None:
    """A frozen projection, or heads made from texts: solving them for each task would multiply them."""
    torch.manual_seed(0)
    one, two = Odd(has_skip=True), Odd(has_skip=True)
    for name in ("body", "skip"):
        getattr(two, name).load_state_dict(getattr(one, name).state_dict())
    two.head.bias.data.copy_(one.head.bias)  # the layer as a whole differs
    private, _ = lines({"a": one, "b": two}, ["head", "skip", "power", "spare"], ChainOfMerges())
    for line in private:
        assert "head.weight, head.bias solved for the merged model's features" in line
        assert "power, skip.weight, skip.bias left as in the expert (the same in all experts)" in line


def test_a_model_without_private_layers_is_told_to_have_none() -> None:
    private, text = lines(make_classifiers(), [], ChainOfMerges())
    assert private == ["all tasks: none"]
    assert "Private layers of all tasks: none." in text
    for rule in (ChainOfMerges(refit_heads=False), RegMean(), Average()):
        assert lines(make_classifiers(), ["head"], rule)[0] == []


def test_a_task_without_private_layers_is_told_to_have_none() -> None:
    torch.manual_seed(0)
    one, two = Odd(has_skip=True), Odd()
    two.load_state_dict({n: t for n, t in one.state_dict().items() if "skip" not in n})
    private, _ = lines({"a": one, "b": two}, None, Refitted(RegMean()))
    assert private == ["a: skip.weight, skip.bias solved for the merged model's features", "b: none"]


def test_a_head_that_generates_is_solved_from_its_first_call_and_told_of() -> None:
    modules = dict(zip("ab", built(Repeats, 2, 0.4)))
    private, text = lines(modules, ["head"], ChainOfMerges())  # type: ignore[arg-type]
    assert private == ["all tasks: head.weight, head.bias solved for the merged model's features"]
    assert "head of a: called more than once in a forward (head of a 3 times)" in text
