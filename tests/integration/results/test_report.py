"""The report of a merge: what it holds, and what is shown of it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from com_lightning import (
    Average,
    ChainOfMergesCallback,
    MergeDataModule,
    MergeReport,
    MergingMethod,
    TaskLoaders,
)
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.results.html import html_report
from com_lightning.results.model_size import size_rows, size_sentence
from com_lightning.results.tables import table
from tests.helpers import Classifier, make_data, make_experts, perturb
from tests.helpers.folders import WithBuffers, merge

Result = tuple[ChainOfMergesCallback, Path]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A merge and the folder it left; not to be changed."""
    folder = tmp_path_factory.mktemp("results") / "merged"
    return merge(folder), folder


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_json_holds_the_whole_report(result: Result) -> None:
    callback, folder = result
    report = callback.report
    content = strict_json((folder / "report.json").read_text())
    expected = {**asdict(report), "parameters": {name: str(what) for name, what in report.parameters.items()}}
    assert {name: content[name] for name in expected} == json.loads(json.dumps(expected))
    assert content["metric"] == content["monitor"] == "val_acc"
    assert content["mode"] == "max"
    assert content["metrics"] == report.metrics
    assert set(content["metrics"]) == {"expert", "average", "merged"}
    assert content["normalized"]["merged"]["b"]["val_acc"] == report.normalized("merged", "b", "val_acc")
    assert content["mean_normalized"]["expert"] == 1.0
    assert content["samples"] == {"a": 24, "b": 24}
    assert content["share_of_experts"] == report.size.share
    merged = {id(tensor): tensor for module in callback.modules.values() for _, tensor, _ in named_tensors(module)}
    assert report.size.merged.values == sum(tensor.numel() for tensor in merged.values())
    assert report.size.merged.bytes == 4 * report.size.merged.values
    assert torch.__version__.startswith(content["versions"]["torch"])
    layers = ["body.0", "body.1", "body.3", "head of a", "head of b"]
    assert [layer["name"] for layer in content["layers"]] == layers


def test_the_markdown_holds_the_tables(result: Result) -> None:
    report, text = result[0].report, (result[1] / "report.md").read_text()
    assert report.task_table() in text
    assert report.layer_table() in text
    assert table(size_rows(report.size)) in text
    assert size_sentence(report.size) in text
    for task in "ab":
        row = next(line for line in text.splitlines() if line.startswith(f"| {task} "))
        for kind in ("expert", "average", "merged"):
            assert f"{report.metrics[kind][task]['val_acc']:.4f}" in row
    assert "`val_acc`" in text
    assert "target=expert" in text
    assert f"seed {report.seed}" in text


def test_every_parameter_is_accounted_for() -> None:
    torch.manual_seed(0)
    base = WithBuffers(3)
    experts: dict[str, Any] = {"a": WithBuffers(3), "b": WithBuffers(4, extra=True)}
    for number, expert in enumerate(experts.values()):
        shared = {n: t for n, t in base.state_dict().items() if not n.startswith("head")}
        expert.load_state_dict(shared, strict=False)
        perturb(expert, 0.2, seed=number)
    report = merge(experts=experts, model=WithBuffers(3)).report
    names = {name for expert in experts.values() for name, _, _ in named_tensors(expert)}
    assert set(report.parameters) == names
    solved = {f"body.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")}
    private = {f"{head}.{kind}" for head in ("head", "extra") for kind in ("weight", "bias")}
    buffers = {f"body.5.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    for name, what in report.parameters.items():
        kind = what.status
        if name in private:
            is_used = name.startswith("head")
            assert kind == ("private, solved for the merged model" if is_used else "private"), name
        elif name in buffers:
            assert kind == ("buffer" if name.endswith("num_batches_tracked") else "re-estimated"), name
        elif name in solved:
            assert kind == "solved", name
        else:
            assert kind in ("solved", "solved in part", "averaged"), name  # a channel may be zero behind a ReLU
            assert kind == "solved" or what.detail, name
    assert str(report.parameters["scale"]).startswith("averaged: ")
    assert sum(report.sizes.values()) == (
        sum(t.numel() for e in experts.values() for n, t, _ in named_tensors(e) if n in private)
        + sum(t.numel() for n, t, _ in named_tensors(experts["a"]) if n not in private)
    )
    assert "scale" in report.to_markdown()


@pytest.mark.parametrize("method", [Average(), Average(importance={"a": 3.0, "b": 1.0})])
def test_a_method_without_data(method: MergingMethod, tmp_path: Path) -> None:
    class Counted(TaskLoaders):
        def train_dataloader(self) -> Any:
            raise AssertionError("no calibration data are needed")

    data = {"a": make_data(0), "b": make_data(1, 4)}
    tasks = MergeDataModule({name: Counted(val=task.val_dataloader()) for name, task in data.items()})
    callback = merge(tmp_path / "out", method=method, tasks=tasks)
    report = callback.report
    assert report.layers == []
    assert report.samples == {}
    assert set(map(str, report.parameters.values())) == {"averaged", "private"}
    assert report.method["class"] == "Average"
    assert "Average: no calibration data; " in report.summary()
    experts = make_experts((3, 4))
    weights = method.weights(["a", "b"])
    expected = sum(w * e.body.state_dict()["0.weight"] for w, e in zip(weights, experts))
    torch.testing.assert_close(callback.modules["b"].state_dict()["body.0.weight"], expected)
    strict_json((tmp_path / "out" / "report.json").read_text())


def example(**kwargs: Any) -> MergeReport:
    values: dict[str, Any] = {
        "tasks": ["a", "b"],
        "monitor": "acc",
        "metrics": {
            "expert": {"a": {"acc": 0.8, "loss": 0.5}, "b": {"acc": 0.5, "loss": 0.25}},
            "merged": {"a": {"acc": 0.6, "loss": 1.0}, "b": {"acc": 0.5, "loss": 0.5}},
        },
    }
    return MergeReport(**{**values, **kwargs})


def test_normalized_metrics() -> None:
    report = example()
    assert report.normalized("merged", "a") == pytest.approx(0.75)
    assert report.normalized("merged", "a", "loss") == pytest.approx(0.5)  # less is worse, for every metric
    assert report.normalized("expert", "a") == 1.0
    assert report.mean_normalized("merged") == pytest.approx(0.875)


@pytest.mark.parametrize(
    ("kind", "task", "metric"),
    [("average", "a", None), ("merged", "c", None), ("merged", "a", "f1"), ("merged", "zero", None)],
)
def test_normalized_metrics_that_do_not_exist(kind: str, task: str, metric: str | None) -> None:
    report = example()
    report.metrics["expert"]["zero"] = {"acc": 0.0}
    report.metrics["merged"]["zero"] = {"acc": 0.5}
    assert report.normalized(kind, task, metric) is None
    assert example(tasks=["a", "b", "c"]).mean_normalized("merged") is None
    assert example(tasks=[]).mean_normalized("merged") is None


@pytest.mark.parametrize("monitor", ["ppl", "val_loss", "score"])
def test_what_is_worse_than_the_expert_is_below_100_per_cent(monitor: str) -> None:
    values = {"expert": 10.0, "average": 20.0, "merged": 12.5}
    report = MergeReport(tasks=["a"], metrics={model: {"a": {monitor: value}} for model, value in values.items()})
    report.choose_monitor(monitor, "min")
    assert report.normalized("merged", "a") == pytest.approx(0.8)
    assert report.mean_normalized("average") == pytest.approx(0.5)
    for text in (str(report), report.to_markdown().replace("`", ""), re.sub("<[^>]*>", " ", html_report(report))):
        assert f"{monitor}" in text
        assert "lower is better" in text
        for words in ("expert / merged", "80.0 %", "50.0 %"):
            assert words in text
        assert "merged / expert" not in text
        assert "125" not in text
    report.choose_monitor(monitor, "max")
    assert "lower is better" not in str(report)
    assert "merged / expert" in str(report)


@pytest.mark.parametrize(("merged", "expert"), [(0.0, 0.1), (0.1, 0.0), (0.0, 0.0), (-0.1, 0.2), (0.1, -0.2)])
def test_a_loss_that_is_not_above_zero_has_no_ratio(merged: float, expert: float) -> None:
    report = MergeReport(tasks=["a"], metrics={"expert": {"a": {"loss": expert}}, "merged": {"a": {"loss": merged}}})
    report.choose_monitor()
    assert report.normalized("merged", "a") is None
    assert strict_json(report.to_json())["mean_normalized"]["merged"] is None


def test_a_merge_without_baselines_shows_its_own_metrics(tmp_path: Path) -> None:
    report = merge(tmp_path / "out", baselines=False).report
    assert set(report.metrics) == {"merged"}
    assert report.monitor == "val_acc"
    assert report.normalized("merged", "a") is None
    assert f"{report.metrics['merged']['a']['val_acc']:.4f}" in report.task_table()
    assert "expert" not in report.task_table()
    assert strict_json(report.to_json())["mean_normalized"] == {"merged": None}


def test_numbers_that_json_lacks_become_null() -> None:
    report = example(seconds=math.inf)
    report.metrics["merged"]["a"]["acc"] = math.nan
    report.metrics["expert"]["b"]["acc"] = -math.inf
    content = strict_json(report.to_json())
    assert content["metrics"]["merged"]["a"] == {"acc": None, "loss": 1.0}
    assert content["metrics"]["expert"]["b"]["acc"] is None
    assert content["normalized"]["merged"]["a"]["acc"] is None
    assert content["seconds"] is None
    assert "nan" in report.task_table()  # and people are told


@pytest.mark.parametrize(
    ("names", "expected"), [(["val_loss", "acc", "f1"], "acc"), (["val_loss", "loss"], "val_loss"), ([], None)]
)
def test_the_metric_that_is_shown(names: list[str], expected: str | None) -> None:
    report = MergeReport(metrics={"merged": {"a": dict.fromkeys(names, 0.5)}})
    report.choose_monitor()
    assert report.monitor == expected
    report.choose_monitor("f2")
    assert report.monitor == expected
    assert "'f2' was not logged" in report.warnings[0]


def test_the_old_name_of_the_monitor_is_deprecated() -> None:
    with pytest.warns(FutureWarning, match="now MergeReport.monitor"):
        assert example().metric == "acc"


def test_the_metric_can_be_chosen() -> None:
    report = merge(monitor="val_loss").report
    assert report.monitor == "val_loss"
    assert f"{report.metrics['merged']['a']['val_loss']:.4f}" in report.task_table()


def test_the_columns_of_a_table_are_aligned() -> None:
    rows = [["task", "value", "note"], ["a", "0.5", ""], ["long name", "-", "text"], ["b", "1e+05", ""]]
    lines = table(rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(i for i, c in enumerate(line) if c == "|") for line in lines}) == 1
    assert lines[1].replace("-", "") == "| : | : | : |"
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in (lines[0], *lines[2:])] == rows
    assert lines[2].startswith("| a  ")
    assert lines[2].split("|")[2].endswith(" 0.5 ")


def test_a_table_without_rows() -> None:
    assert table([["task", "value"]]) == "| task | value |\n| :--- | :---- |"


def test_reports_of_nothing_can_be_shown() -> None:
    assert strict_json(MergeReport().to_json())["tasks"] == []
    assert MergeReport().to_markdown().startswith("# Merge of 0 experts")
    assert str(MergeReport()) == "Nothing has been merged yet."


def test_metrics_of_a_task_with_nan(tmp_path: Path) -> None:
    """A metric that is NaN does not stand in the way of the result."""

    class Undefined(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("undefined", (self(batch[0]) * math.nan).sum())

    experts: dict[str, Any] = {"a": Undefined(), "b": Undefined()}
    experts["b"].load_state_dict(experts["a"].state_dict())
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=8)
    merge(tmp_path / "out", experts, Undefined(), tasks)
    content = strict_json((tmp_path / "out" / "report.json").read_text())
    assert content["metrics"]["merged"]["a"] == {"undefined": None}
