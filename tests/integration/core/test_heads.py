"""``refit_heads`` and ``Refitted`` in a trainer: private layers come closer to what the experts give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
    assert "(head.weight, head.bias, 2 of them solved for the merged model" in str(report)
    assert [layer.name for layer in report.layers][-2:] == ["head of a", "head of b"]
    again = Classifier.load_from_checkpoint(tmp_path / "merged" / "b.ckpt", weights_only=True)
    torch.testing.assert_close(again.head.weight, refitted.modules["b"].get_parameter("head.weight"))


def test_a_refitted_chain_is_the_chain_with_the_option() -> None:
    one, two = merge(ChainOfMerges(refit_heads=True)), merge(Refitted(ChainOfMerges(), normalize=True))
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
        (Refitted(ChainOfMerges(refit_heads=True)), "method: it solves private layers already"),
        (Refitted(Refitted(TIES())), "method: it solves private layers already"),
        (Combined(Refitted(TIES()), Average()), "matrices: Refitted merges the model as a whole"),
    ],
)
def test_wrong_settings_are_told(method: MergingMethod, told: str) -> None:
    with pytest.raises(MergeError, match=told):
        merge(method)
