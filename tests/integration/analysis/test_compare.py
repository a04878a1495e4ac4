"""Several rules on the same experts: what is compared, on which samples, and what is left of it if it is killed."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import com_lightning.analysis.compare
import com_lightning.execution
from com_lightning import (
    DARE,
    DELLA,
    TIES,
    Average,
    ChainOfMerges,
    Combined,
    MergeDataModule,
    MergeTrainer,
    MergingMethod,
    Refitted,
    RegMean,
    RegMeanPlusPlus,
    TaskArithmetic,
)
from com_lightning.analysis.comparison import Comparison, Outcome
from com_lightning.analysis.comparison_html import comparison_fragment
from com_lightning.cli import main
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.drift import measure_drift
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.modules import average, named_tensors
from tests.helpers import Classifier, make_data, make_experts
from tests.helpers.commands import base_file, expert_files

ROOT = Path(__file__).parents[3]
TASKS = [f"--data.tasks.{task}=tests.helpers.PointsData" for task in "ab"]
COMMON = [
    "--model=tests.helpers.Classifier",
    "--data=com_lightning.MergeDataModule",
    "--data.num_samples=12",
    *TASKS,
    "--data.tasks.b.seed=1",
    "--data.tasks.b.classes=4",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.accelerator=cpu",
]
GRID = "[{class_path: TaskArithmetic, init_args: {scale: 0.2}}, {class_path: TaskArithmetic, init_args: {scale: 0.5}},\
 RegMean, ChainOfMerges]"
RULES = [TaskArithmetic(0.2), TaskArithmetic(0.5), RegMean(), ChainOfMerges()]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [*expert_files(tmp_path), base_file(tmp_path)]


def compare(folder: Path, methods: Sequence[MergingMethod] | None = RULES, **kwargs: Any) -> Comparison:
    """From Python, with experts on disk beside the result."""
    trainer = MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = kwargs.pop("data", None) or MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, num_samples=12)
    experts = {task: str(folder.parent / f"{task}.ckpt") for task in "ab"}
    settings = {"base": str(folder.parent / "base.ckpt"), "output_dir": str(folder), **kwargs}
    return trainer.compare(Classifier(), data, experts, None if methods is None else [*methods], **settings)


def untimed(comparison: Comparison) -> dict[str, Any]:
    found = json.loads(comparison.to_json())
    for entry in [*found["methods"], *found["outcomes"]]:
        del entry["seconds"], entry["peak_memory"]
    return found  # type: ignore[no-any-return]


# -- on the command line -----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:only the first task")
def test_a_comparison(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    main(["compare", *COMMON, *files, f"--methods={GRID}", "--seeds=[0,1]", f"--output_dir={folder}"])
    found = json.loads((folder / "report.json").read_text())
    means = [method["mean_normalized"] for method in found["methods"]]
    assert means == sorted(means, reverse=True)
    labels = {method["label"].partition("(")[0] for method in found["methods"]}
    assert labels == {"Average", "TaskArithmetic", "RegMean", "ChainOfMerges"}
    seeds = {method["label"]: method["seeds"] for method in found["methods"]}
    assert (seeds["ChainOfMerges()"], seeds["Average()"]) == ([0, 1], [None])
    table = (folder / "report.md").read_text()
    assert table.split("\n\n", 1)[1].rstrip() in capsys.readouterr().out
    order = [
        line.split("|")[1].split("(")[0].strip() for line in table.splitlines() if "GiB" not in line and "%" in line
    ]
    assert order[: len(means)] == [method["label"].partition("(")[0] for method in found["methods"]]
    assert "nothing was calibrated or chosen on" in table
    pictures = {path.name for path in folder.glob("*.png")}
    expected = {"methods.png", "tasks.png", "drift.png"} if importlib.util.find_spec("matplotlib") else set()
    assert pictures == expected
    assert not (tmp_path / ".out.partial").exists()
    main(["compare", f"--config={folder / 'config.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert [method["mean"] for method in again["methods"]] == [method["mean"] for method in found["methods"]]


def test_the_configuration_of_a_merge_will_do(files: list[str], tmp_path: Path) -> None:
    config = tmp_path / "merge.yaml"
    config.write_text("method: {class_path: com_lightning.ChainOfMerges, init_args: {ridge: 0.5}}\nprivate: [head]\n")
    rest = [f"--output_dir={tmp_path / 'out'}", "--methods=[TIES, {class_path: com_lightning.RegMean}]"]
    main(["compare", *COMMON, *files, f"--config={config}", *rest])
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {method["label"] for method in found["methods"]} == {
        "Average()",
        "ChainOfMerges(ridge=0.5)",
        "TIES()",
        "RegMean()",
    }


def test_all_problems_at_once(files: list[str], tmp_path: Path) -> None:
    tmp_path.joinpath("out").mkdir()
    arguments = [*COMMON, *files, "--experts.a=nowhere.ckpt", f"--output_dir={tmp_path / 'out'}", "--seeds=[1,1]"]
    with pytest.raises(SystemExit) as caught:
        main(
            [
                "compare",
                *arguments,
                "--methods=[{class_path: TIES, init_args: {density: 0}}, {class_path: SLERP, init_args: {t: 2}}]",
            ]
        )
    for part in (
        "nowhere.ckpt): no such file",
        "TIES(density=0.0): density",
        "SLERP(t=2.0): t:",
        "seeds: ",
        "exists already",
    ):
        assert part in str(caught.value)
    with pytest.raises(SystemExit, match="is listed twice"):
        main(["compare", *COMMON, *files, "--methods=[TIES, TIES]"])
    with pytest.raises(SystemExit, match="data: must be a com_lightning"):
        main(["compare", COMMON[0], *files, f"--output_dir={tmp_path / 'new'}"])


def test_a_dry_run_merges_nothing(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *COMMON, *files, f"--methods={GRID}", f"--output_dir={tmp_path / 'out'}", "--dry_run"])
    out = capsys.readouterr().out
    assert "- TaskArithmetic(scale=0.2)\n- TaskArithmetic(scale=0.5)\n" in out
    assert "Selection of settings: 24 samples" in out
    assert not (tmp_path / "out").exists()


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ChainOfMerges", "RegMean", "TIES"])
def test_one_seed_is_a_merge_with_that_rule(kind: str, files: list[str], tmp_path: Path) -> None:
    main(["compare", *COMMON, *files, f"--methods=[WUDI, {kind}]", f"--output_dir={tmp_path / 'out'}"])
    main(["merge", *COMMON, *files, f"--method={kind}", f"--output_dir={tmp_path / 'merged'}"])
    # Merged last, so that whatever came before it would show.
    (found,) = [o for o in json.loads((tmp_path / "out" / "report.json").read_text())["outcomes"] if o["name"] == kind]
    merged = json.loads((tmp_path / "merged" / "report.json").read_text())["metrics"]["merged"]
    if kind != "TIES":  # what a rule that reads no data is worth, is told on the samples that the others left
        assert found["metrics"] == {"report": merged}
    assert found["method"]["class"] == kind


def test_seeds_are_those_of_the_calibration_sample(files: list[str], tmp_path: Path) -> None:
    both = compare(tmp_path / "both", [ChainOfMerges()], seeds=[0, 1])
    losses = [[o.metrics["report"][t]["val_loss"] for t in "ab"] for o in both.outcomes if o.name == "ChainOfMerges"]
    assert losses[0] != losses[1]
    (row,) = [row for row in both.rows if row.label == "ChainOfMerges()"]
    assert row.absolute["a"] == pytest.approx(sum(o.metrics["report"]["a"]["val_acc"] for o in row.outcomes) / 2)
    one = compare(tmp_path / "one", [ChainOfMerges()], seeds=[1])
    assert one.rows[0].spread is None
    assert [o.seed for o in one.outcomes] == [None, 1]


def test_rules_that_draw_at_random_draw_anew_for_each_seed(files: list[str], tmp_path: Path) -> None:
    listed = [DARE(seed=5), Combined(DELLA(), Average()), TIES()]
    comparison = compare(tmp_path / "out", listed, seeds=[0, 2])
    found = {row.label.partition("(")[0]: row.outcomes for row in comparison.rows}
    assert [(one.seed, one.method["seed"]) for one in found["DARE"]] == [(0, 5), (2, 7)]
    assert [one.method["matrices"]["seed"] for one in found["Combined"]] == [0, 2]
    losses = [[one.metrics["report"][task]["val_loss"] for task in "ab"] for one in found["DARE"]]
    assert losses[0] != losses[1]
    assert [one.seed for one in found["TIES"]] == [None]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_comparison_goes_on_where_it_was(
    after: int, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Exception):
        pass

    done: list[str] = []
    execute = com_lightning.execution.execute

    def counted(plan: Any, *args: Any) -> Any:
        if len(done) == after and limited:
            raise Interrupted
        done.append(type(plan.method).__name__)
        return execute(plan, *args)

    monkeypatch.setattr(com_lightning.analysis.compare, "execute", counted)
    limited = True
    with pytest.raises(Interrupted):
        compare(tmp_path / "out", seeds=[0, 1])
    assert not (tmp_path / "out").exists()
    limited = False
    resumed = compare(tmp_path / "out", seeds=[0, 1])
    assert len(done) == 1 + 2 + 2 + 2  # the average, a grid, two seeds of two rules: none of them twice
    whole = compare(tmp_path / "whole", seeds=[0, 1])
    assert untimed(resumed) == untimed(whole)
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == json.loads(resumed.to_json())


@pytest.mark.parametrize("change", [{"seeds": [3]}, {"private": ["head", "body.0"]}, {"resume": False}])
def test_what_belongs_to_another_comparison_is_not_taken(
    change: dict[str, Any], files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:  # all is merged, nothing written
        patch.setattr(com_lightning.analysis.compare, "save_pictures", full)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            compare(tmp_path / "out", [RegMean()])
    assert len(list((tmp_path / ".out.partial" / "journal").iterdir())) == 3  # the experts, the average, regmean
    found = compare(tmp_path / "out", [RegMean()], **change)
    assert untimed(found) == untimed(compare(tmp_path / "other", [RegMean()], **change))
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == ["out"]


def test_experts_are_as_they_were(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}
    init = com_lightning.analysis.compare.Compare.__init__

    def spying(self: Any, plan: Any, *args: Any) -> None:
        kept.update(plan=plan, before={t: copy.deepcopy(e.state_dict()) for t, e in plan.experts.items()})
        init(self, plan, *args)

    monkeypatch.setattr(com_lightning.analysis.compare.Compare, "__init__", spying)
    compare(tmp_path / "out")
    for task, before in kept["before"].items():
        now = kept["plan"].experts[task].state_dict()
        assert all(torch.equal(now[name], value) for name, value in before.items())


# -- what is told ------------------------------------------------------------------------------------------------------


def outcome(name: str, label: str, report: float, selection: float | None = None, metric: str = "acc") -> Outcome:
    metrics = {"report": {"a": {metric: report}}}
    if selection is not None:
        metrics["selection"] = {"a": {metric: selection}}
    return Outcome(name, label, {}, None, metrics)


def found(outcomes: list[Outcome], metric: str = "acc", expert: float = 0.5) -> Comparison:
    experts = {split: {"a": {metric: expert}} for split in ("report", "selection")}
    return Comparison(["a"], metric, experts=experts, outcomes=outcomes)


def test_settings_are_chosen_on_the_selection_split() -> None:
    grid = [outcome("m", "m(1)", 0.9, 0.1), outcome("m", "m(2)", 0.2, 0.8)]
    comparison = found([*grid, outcome("n", "n", 0.3)])
    assert [row.label for row in comparison.rows] == ["n", "m(2)"]
    assert comparison.rows[1].tried == 2
    lines = comparison.settings_table().splitlines()
    assert "m(2)" in lines[2]
    assert "yes" in lines[2]
    assert "yes" not in lines[3]


def test_a_setting_at_the_edge_of_its_grid_is_told() -> None:
    def grid(best: float) -> Comparison:
        outcomes = [outcome("m", f"m({scale})", 0.1, 0.5 - abs(scale - best)) for scale in (0.1, 0.2, 0.3)]
        for one, scale in zip(outcomes, (0.1, 0.2, 0.3)):
            one.method = {"class": "M", "scale": scale, "density": 0.5}
        return found(outcomes)

    assert not grid(0.2).edges()
    assert grid(0.1).edges() == ["m(0.1): no scale beyond the smallest of the grid was tried"]
    assert "Warning: m(0.3): no scale beyond the largest" in str(grid(0.3))


@pytest.mark.parametrize("expert", [0.5, -0.5, 0.0])
def test_errors_are_sorted_the_other_way_round(expert: float) -> None:
    """Also where a ratio to the expert's says nothing."""
    for metric, best in {"val_loss": "low", "acc": "high"}.items():
        values = {"low": 0.1, "middle": 0.2, "high": 0.3, "none": float("nan")}
        comparison = found([outcome(n, n, v, metric=metric) for n, v in values.items()], metric, expert)
        labels = [row.label for row in comparison.rows]
        assert labels[0] == best
        assert labels[-1] == "none"
        assert ("lower is better" in str(comparison)) == (best == "low")
        shares = [row.mean_normalized for row in comparison.rows if row.label != "none"]
        if expert > 0:  # the share of the expert is the higher the better
            assert None not in shares
            assert shares == sorted(shares, reverse=True)  # type: ignore[type-var]
            assert ("expert / mean" in str(comparison)) == (best == "low")
        seeds = [Outcome("m", "m", {}, n, {"report": {"a": {metric: 0.1 * n}}}) for n in (1, 2)]
        assert (found(seeds, metric, expert).rows[0].spread or 0) > 0.05


def test_rules_that_solve_heads_beside_others_are_told(files: list[str], tmp_path: Path) -> None:
    unlike = compare(tmp_path / "unlike", [RegMean(), ChainOfMerges()]).warnings
    assert any("ChainOfMerges()" in warning and "like with like" in warning for warning in unlike)
    alike = compare(tmp_path / "alike", [Refitted(Average()), ChainOfMerges()]).warnings
    assert not any("like with like" in warning for warning in alike)


def test_a_metric_that_is_not_logged_is_told(files: list[str], tmp_path: Path) -> None:
    told = compare(tmp_path / "out", [Average()], monitor="f1")
    assert told.monitor == "val_acc"
    assert any("'f1' was not logged" in warning for warning in told.warnings)


def test_what_was_odd_about_one_merge(files: list[str], tmp_path: Path) -> None:
    comparison = found([Outcome("m", "m", {}, 3, {"report": {"a": {"acc": 0.4}}}, warnings=["strange"])])
    assert "m, seed 3: strange" in comparison.to_markdown()


# -- accuracy against size ---------------------------------------------------------------------------------------------


def test_settings_that_change_the_size_are_rows_of_their_own(files: list[str], tmp_path: Path) -> None:
    rules = [ChainOfMerges(task_rank=rank, ridge=ridge) for rank in (1, 2) for ridge in (0.01, 0.1)]
    told = compare(tmp_path / "out", [*rules, RegMean()])
    tried = {row.outcomes[0].name: row.tried for row in told.rows}
    assert tried == {"Average": 1, "RegMean": 1, "ChainOfMerges, task_rank=1": 2, "ChainOfMerges, task_rank=2": 2}
    size = {row.outcomes[0].name: row.size or 0 for row in told.rows}
    # Corrections of rank 1 are a row and a column: of 6 to 8, and of 8 to 8 features, for two tasks in 4 bytes each.
    assert size["ChainOfMerges, task_rank=2"] - size["ChainOfMerges, task_rank=1"] == 2 * 4 * (14 + 16)
    assert size["Average"] == size["RegMean"] < size["ChainOfMerges, task_rank=1"]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    for method in found["methods"]:
        assert method["share_of_experts"] == method["bytes"] / found["outcomes"][0]["size"][1]
    shares = {f"{100 * method['share_of_experts']:.1f} %" for method in found["methods"]}
    assert len(shares) == 3
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "of the experts" in text
        assert all(share in text for share in shares)
    assert ('alt="accuracy against size"' in text) == bool(importlib.util.find_spec("matplotlib"))


def test_the_page_has_means_before_tasks() -> None:
    comparison = found([outcome("m", "m", 0.9), outcome("n", "n", 0.8)])
    heads, cells = (
        re.findall(f"<{tag}(?: [^>]*)?>(.*?)</{tag}>", comparison_fragment(comparison)) for tag in ("th", "td")
    )
    means = ["method", "mean / expert", "mean"]
    assert heads[: 3 + len(comparison.tasks)] == [*means, *comparison.tasks]
    assert sorted(heads) == sorted(comparison.table_rows()[0])
    for row in comparison.table_rows()[1:]:
        start = cells.index(row[0])
        assert sorted(cells[start : start + len(row)]) == sorted(row)


def test_models_of_one_size_need_no_column_and_no_picture() -> None:
    comparison = found([outcome("m", "m", 0.9), outcome("n", "n", 0.8)])
    assert not comparison.sizes_differ
    assert "of the experts" not in comparison.table()


@pytest.mark.parametrize("metric", ["acc", "val_loss"])
def test_the_picture_has_a_point_for_each_rule_and_a_line_for_each_with_several_sizes(metric: str) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from com_lightning.analysis.size_plot import draw_sizes

    outcomes = [outcome(name, name, 0.1 * n, metric=metric) for n, name in enumerate("abcdx", 1)]
    for one, (rule, size, rank) in zip(
        outcomes, (("r", 30, 2), ("r", 10, 0), ("r", 20, 1), ("s", 10, 0), ("t", 10, 0))
    ):
        one.rule, one.size, one.size_settings = rule, (size * 10**6, 80 * 10**6), {"task_rank": rank}
    axes = figures.Figure().subplots()
    draw_sizes(axes, found(outcomes, metric))
    lines = [line.get_xydata().tolist() for line in axes.lines]
    curve = [[10, 40], [20, 60], [30, 20]] if metric == "acc" else [[10, 250], [20, 167], [30, 500]]
    assert curve in [[[round(a), round(b)] for a, b in line] for line in lines]
    assert sum(len(line) == 1 for line in lines) == 2
    texts = [text.get_text() for text in axes.texts]
    assert sorted(texts) == ["d", "rank 1", "rank 2", "shared alone", "x"]
    heights = [text.xyann[1] for text in axes.texts if text.get_text() in "dx"]
    assert abs(heights[0] - heights[1]) >= 0.03 * (axes.get_ylim()[1] - axes.get_ylim()[0])


# -- the covariate shift -----------------------------------------------------------------------------------------------


def test_the_shift_of_the_average() -> None:
    """That of a chain whose ridge keeps the average, and none in the first layer, which sees the data themselves."""
    experts = [expert.eval().requires_grad_(False) for expert in make_experts((3, 3))]
    batches = [torch.randn(20, 6, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    tasks = [Task(name, expert, [batch]) for name, expert, batch in zip("ab", experts, batches)]
    states = [{n: t for n, t, _ in named_tensors(expert)} for expert in experts]
    merged = {n: torch.nn.Parameter(average([s[n] for s in states])) for n in states[0] if n.startswith("body")}
    before = {name: value.detach().clone() for name, value in merged.items()}
    shifts = {record.name: record.distance for record in measure_drift(tasks, merged, Context())}
    assert all(torch.equal(merged[name], value) for name, value in before.items())
    records = merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(ridge=1e9))
    for record in records:
        assert shifts[record.name] == pytest.approx(record.distance, rel=1e-3, abs=1e-6)
    assert len(shifts) == len(records)
    assert max(shifts["body.0"].values()) < 1e-6 < min(shifts["body.3"].values())


def test_a_chain_shifts_less_than_the_average(files: list[str], tmp_path: Path) -> None:
    comparison = compare(tmp_path / "out", [ChainOfMerges(), RegMeanPlusPlus(), RegMean()])
    (chain,) = [o for o in comparison.outcomes if o.drift]
    assert chain.label == "ChainOfMerges()"
    assert [name for name, _ in chain.drift] == [name for name, _ in comparison.average_drift]
    last, plain = chain.drift[-1][1], comparison.average_drift[-1][1]
    assert all(last[task] < plain[task] for task in "ab")
    assert compare(tmp_path / "other", [RegMean()]).average_drift == []
