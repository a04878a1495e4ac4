"""Settings that do not fit the experts; what is shared and what is private."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from com_lightning import ChainOfMerges, MergeDataModule, MergeError
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.experts.load import load_expert
from com_lightning.experts.parameters import sort_parameters
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer
from tests.helpers.sources import TASKS, TiedClassifier, merge, only, problems, state_of, unread_data

# Settings that do not fit


@pytest.mark.parametrize(
    ("experts", "tasks", "told"),
    [
        (("a", "b", "c"), ("a", "b"), "experts: no data for c; data.tasks has a, b"),
        (("a", "b"), ("a", "b", "c"), "data.tasks: no expert for c; experts has a, b"),
        (("a", "../x"), ("a", "../x"), "experts: '../x' cannot name a file"),
        (("a", "x/y"), ("a", "x/y"), "experts: 'x/y' cannot name a file"),
        (("a", ".."), ("a", ".."), "experts: '..' cannot name a file"),
        (("a", ""), ("a", ""), "experts: '' cannot name a file"),
        (("a", "x\\y"), ("a", "x\\y"), "experts: 'x\\y' cannot name a file"),
    ],
)
def test_task_names(experts: tuple[str, ...], tasks: tuple[str, ...], told: str) -> None:
    sources = dict(zip(experts, make_experts([3] * len(experts))))
    assert only(problems(sources, {task: unread_data() for task in tasks})).startswith(told)


def test_no_experts() -> None:
    assert any("; experts has none" in p for p in problems({}))


@pytest.mark.parametrize(
    ("importance", "told"),
    [
        ({"a": 1.0}, "importance: no weight for b"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "importance: c is no task"),
        ({"a": -1.0, "b": 2.0}, "importance: weights must be finite, not negative"),
        ({"a": float("nan"), "b": 1.0}, "importance: weights must be finite"),
        ({"a": 0.0, "b": 0.0}, "importance: weights must be finite, not negative, and not all 0"),
    ],
)
def test_bad_importance(importance: dict[str, float], told: str, pair: dict[str, Classifier]) -> None:
    assert only(problems(pair, method=ChainOfMerges(importance=importance))).startswith(told)


def test_an_empty_loader(pair: dict[str, Classifier]) -> None:
    assert only(problems(pair, {"a": unread_data(), "b": unread_data(0)})) == "task 'b': its val loader is empty"


def test_a_pattern_that_matches_nothing(pair: dict[str, Classifier]) -> None:
    problem = only(problems(pair, private=["head", "haed"]))
    assert "'haed' matches no parameter" in problem
    assert "body.0.weight" in problem


def test_a_shared_shape_that_differs() -> None:
    """With explicit patterns nothing else may differ; both shapes are shown."""
    found = problems(dict(zip(TASKS, make_experts((3, 5)))), private=["head.bias"])
    assert "head.weight: model (3, 8); a (3, 8); b (5, 8)" in only(found)


def test_a_shared_parameter_that_one_lacks(pair: dict[str, Classifier]) -> None:
    pair["b"].head = nn.Linear(8, 3, bias=False)
    assert "head.bias: model (3,); a (3,); b lacks it" in only(problems(pair, private=["body.1"]))


def test_nothing_in_common() -> None:
    experts = {"a": Classifier(3, 8), "b": Classifier(4, 9)}
    assert "no layer can be merged" in only(problems(experts))


def test_tied_in_one_only() -> None:
    tied, untied = TiedClassifier(), TiedClassifier(tied=False)
    untied.body.load_state_dict(tied.body.state_dict())
    problem = only(problems({"a": tied, "b": untied}, model=TiedClassifier()))
    assert "head.weight is tied to another parameter in 'a' or 'b', not in both" in problem


def test_an_existing_output_folder(pair: dict[str, Classifier], tmp_path: Path) -> None:
    problem = only(problems(pair, output_dir=str(tmp_path)))
    assert problem.startswith(f"output_dir: {tmp_path} exists already")
    assert "overwrite" in problem


def test_a_model_that_does_not_fit_the_first_task() -> None:
    """Only the first: the model becomes that task's merged model."""
    sources = dict(zip(TASKS, make_experts((3, 5))))
    problem = only(problems(sources, model=Classifier(5)))
    assert "task 'a'" in problem
    assert "head.weight is (5, 8), in its expert (3, 8)" in problem
    merge(sources, MergeDataModule({"a": make_data(0), "b": make_data(1, 5)}, num_samples=8), Classifier(3))


def test_all_problems_are_told_at_once(pair: dict[str, Classifier], tmp_path: Path) -> None:
    found = problems(
        {"a": tmp_path / "none.ckpt", "b": {"x": torch.zeros(1)}, "c": pair["a"], "x/y": pair["b"]},
        {"a": unread_data(), "b": unread_data(0), "c": unread_data(), "x/y": unread_data(), "d": unread_data()},
        method=ChainOfMerges(importance={"a": 1.0}, ridge=-1.0),
        private=["nothing"],
        output_dir=str(tmp_path),
    )
    expected = [
        "output_dir:",
        "data.tasks: no expert for d",
        "experts: 'x/y' cannot name",
        "importance: no weight for b",
        "ridge:",
        "task 'b': its val loader is empty",
        "none.ckpt): no such file",
        "expert 'b': missing keys",
        "expert 'b': keys that",
        "private: 'nothing' matches no parameter",
    ]
    assert len(found) == len(expected), found
    for told in expected:
        assert any(told in problem for problem in found), told
    assert str(MergeError(found)).startswith("10 problems:\n  1. ")


# Shared and private


def test_heads_of_different_sizes_are_private() -> None:
    small, large = make_experts((3, 4))
    parameters = sort_parameters(Classifier(3), {"a": small, "b": large}, None)
    heads = ["head.weight", "head.bias"]
    assert parameters.private == {"a": heads, "b": heads}
    assert parameters.shared == [name for name, _, _ in named_tensors(small) if name not in heads]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["head"], {"head.weight", "head.bias"}),
        (["body.[13].*", "head.*"], {f"{m}.{p}" for m in ("head", "body.1", "body.3") for p in ("weight", "bias")}),
        ([], set()),
    ],
)
def test_explicit_patterns(patterns: list[str], expected: set[str], pair: dict[str, Classifier]) -> None:
    callback = merge(pair, private=patterns, method=ChainOfMerges(refit_heads=False))
    account = callback.report.parameters
    assert {name for name, what in account.items() if what.status.startswith("private")} == expected
    for task, expert in pair.items():
        for name, tensor in state_of(callback.modules[task]).items():
            assert torch.equal(tensor, state_of(expert)[name]) == (name in expected), name


def test_unrelated_experts_are_warned_of() -> None:
    torch.manual_seed(0)
    experts = {"a": Classifier(), "b": Classifier()}
    with pytest.warns(UserWarning, match="the two experts 'a', 'b' seem not to share a base"):
        callback = merge(experts, private=[])
    [warning] = callback.report.warnings
    assert "cosine" in warning  # says how it is judged
    assert "Warning" in str(callback.report)


def test_heads_of_equal_shape_are_asked_about() -> None:
    experts = dict(zip(TASKS, make_experts((3, 3))))
    assert "heads included" in " ".join(sort_parameters(Classifier(), experts, None).warnings)
    for private in ([], ["head"]):
        assert not sort_parameters(Classifier(), experts, private).warnings


def test_the_odd_one_out_is_warned_of() -> None:
    torch.manual_seed(7)
    siblings = make_experts((3, 3, 3))
    experts = {**dict(zip("abc", siblings)), "odd": perturb(Classifier(), 1.0, seed=5)}
    warned = sort_parameters(Classifier(), experts, []).warnings  # type: ignore[arg-type]
    assert len(warned) == 1
    assert "'odd'" in warned[0]


@pytest.mark.parametrize("scale", [0.0, 0.1, 0.3])
def test_siblings_are_not_warned_of(scale: float) -> None:
    experts = dict(zip("abc", make_experts((3, 3, 4), scale)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert sort_parameters(Classifier(), experts, None).warnings == []


def test_a_file_in_half_precision_is_loaded_in_the_modules(tmp_path: Path) -> None:
    path = tmp_path / "half.pt"
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in Classifier().state_dict().items()}, path)
    assert load_expert("a", path, Classifier()).head.weight.dtype == torch.float32  # type: ignore[union-attr]


class Edited(Classifier):
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["head.bias"] += 100


def test_what_a_hook_makes_of_a_checkpoint_is_kept(tmp_path: Path) -> None:
    module, trainer = Edited(), quiet_trainer()
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert float(load_expert("a", tmp_path / "a.ckpt", Edited()).get_parameter("head.bias").min()) > 50


def test_half_of_a_tied_pair_cannot_be_private() -> None:
    tied = {task: TiedClassifier() for task in TASKS}
    assert "one tensor" in only(problems(dict(tied), model=TiedClassifier(), private=["head.weight"])[:1])
