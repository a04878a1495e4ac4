"""Importance by similarity in reports, comparisons and configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergeTrainer, Refitted, RegMeanPlusPlus
from com_lightning.methods import TIES, MergingMethod, RegMean
from com_lightning.results.importance_plot import importance_of, save_importance
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer
from tests.helpers.commands import expert_files

ROOT = Path(__file__).parents[3]
PNG = b"\x89PNG"


def merged(folder: Path, method: MergingMethod) -> Path:
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), method, output_dir=str(folder))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    quiet_trainer(callbacks=[merger]).validate(Classifier(), datamodule=tasks, verbose=False)
    return folder


@pytest.mark.parametrize(
    ("method", "pictures"),
    [
        (RegMeanPlusPlus(importance="similarity"), 2),  # it does not measure drift
        (Refitted(ChainOfMerges(importance="similarity", refit_heads=False)), 3),
    ],
)
def test_the_folder_shows_similarity_and_importance(method: MergingMethod, pictures: int, tmp_path: Path) -> None:
    folder = merged(tmp_path / "merged", method)
    assert (folder / "importance.png").read_bytes().startswith(PNG)
    assert (folder / "report.html").read_text().count("data:image/png;base64,") == pictures
    layers = json.loads((folder / "report.json").read_text())["layers"]
    measured = [layer for layer in layers if layer["similarity"]]
    assert [layer["name"] for layer in measured] == ["body.0", "body.3"]
    for layer in measured:
        total = sum(layer["similarity"].values())
        expected = {task: value / total for task, value in layer["similarity"].items()}
        assert layer["importance"] == pytest.approx(expected)
    assert "similarity" in (folder / "report.md").read_text()


def test_other_merges_have_no_such_picture(tmp_path: Path) -> None:
    folder = merged(tmp_path / "merged", ChainOfMerges(balance=True))
    assert not (folder / "importance.png").exists()
    assert not save_importance({"rule": importance_of([])}, tmp_path / "none.png")


def test_a_rule_that_cannot_compute_importance_says_so() -> None:
    for wrong in (RegMean, TIES):
        with pytest.raises(ValueError, match=r"importance: must be a dictionary .* or None, got 'similarity'"):
            wrong(importance="similarity")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"importance: must be a dictionary .* or 'similarity' or None, got 'cosine'"):
        ChainOfMerges(importance="cosine")  # type: ignore[arg-type]

    class Own(TIES):
        def __init__(self, importance: object) -> None:
            MergingMethod.__init__(self, importance)  # type: ignore[arg-type]

    (problem,) = MergingMethod.problems(Own("similarity"), ["a", "b"])
    assert problem == "importance: Own cannot compute it by similarity; give weights"


def test_similarity_survives_a_representation_and_a_description() -> None:
    method = ChainOfMerges(importance="similarity")
    assert repr(method) == "ChainOfMerges(importance='similarity')"
    assert method.describe()["importance"] == "similarity"
    assert method.weights(["a", "b"]) == [0.5, 0.5]
    assert not method.problems(["a", "b"])


def test_the_papers_configuration_turns_off_what_is_beyond_the_paper() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "paper.yaml").read_text())["method"]
    method = ChainOfMerges(**settings["init_args"])
    assert method.describe() | {"target": "merged", "importance": "similarity"} == method.describe()
    beyond = ("residual", "refit_heads", "private_biases", "task_rank", "balance", "sensitivity")
    assert not any(method.describe()[name] for name in beyond)
    assert method.options.streams == ("merged",)


def test_a_comparison_shows_the_rules_that_have_it(tmp_path: Path) -> None:
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=12)
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    rules: list[MergingMethod | str] = [
        ChainOfMerges(importance="similarity"),
        RegMeanPlusPlus(importance="similarity"),
        RegMean(),
    ]
    expert_files(tmp_path)
    experts = {task: str(tmp_path / f"{task}.ckpt") for task in "ab"}
    trainer.compare(Classifier(), data, experts, rules, output_dir=str(tmp_path / "out"))
    assert (tmp_path / "out" / "importance.png").read_bytes().startswith(PNG)
    outcomes = json.loads((tmp_path / "out" / "report.json").read_text())["outcomes"]
    counted = {outcome["name"]: [layer for layer, *_ in outcome["importance"]] for outcome in outcomes}
    assert counted == {
        "Average": [],
        "RegMean": [],
        "ChainOfMerges": ["body.0", "body.3"],
        "RegMeanPlusPlus": ["body.0", "body.3"],
    }
