"""What a suite measures, keeps and shows, on points in place of models."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import LightningModule
from torch.utils.data import TensorDataset

from benchmarks.suites import SUITES, ablation, make_suite
from benchmarks.suites.__main__ import expanded, main
from benchmarks.suites.images8 import ResNetClassifier
from benchmarks.suites.oracle import Joint
from benchmarks.suites.results import Entry, Results
from benchmarks.suites.rules import canonical, read_settings, settings_for
from benchmarks.suites.size import series
from benchmarks.suites.splits import SplitData
from benchmarks.suites.suite import Experts, Recipe, Suite
from benchmarks.suites.tables import show
from com_lightning import TIES, MergeError, Refitted


class Point(LightningModule):
    """One weight, which is best at one place on val and at another on test."""

    BEST: ClassVar[Mapping[str, float]] = {"val": 0.4, "test": 0.8}

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1000,), value))

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.measure("val", len(batch[0]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.measure("test", len(batch[0]))

    def measure(self, split: str, count: int) -> None:
        weight = self.weight.mean().item()
        Points.measured.append((split, round(weight, 2), count))
        self.log(f"{split}_acc", 1 / (1 + abs(weight - self.BEST[split])), batch_size=count)


class PointData(SplitData):
    def make_split(self, name: str) -> TensorDataset:
        return TensorDataset(torch.arange(1500.0))


class Points(Suite):
    """Two tasks whose experts are at 1, the base being at 0: task arithmetic is at twice its scale."""

    name = title = "points"
    tasks = ("a", "b")
    private = ()
    recipe = Recipe(1, 1, 1.0)
    measured: ClassVar[list[tuple[str, float, int]]] = []

    def base_module(self) -> LightningModule:
        return Point(0.0)

    def expert_module(self, task: str, base: LightningModule) -> LightningModule:
        return Point(1.0)

    def data(self, task: str) -> PointData:
        return PointData(100, 100)

    def load(self, seed: int) -> Experts:
        return Experts(Point(0.0), {task: Point(1.0) for task in self.tasks})


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, int]]:
    """What was measured on which split, batch by batch."""
    monkeypatch.setitem(SUITES, "points", f"{__name__}.Points")
    Points.measured.clear()
    return Points.measured


def _entries(file: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(entry["method"], entry["seed"]): entry for entry in json.loads(file.read_text())["entries"]}


def _counted(measured: list[tuple[str, float, int]]) -> dict[tuple[str, float], int]:
    """(split, weight) -> samples."""
    counts: dict[tuple[str, float], int] = {}
    for split, weight, count in measured:
        counts[split, weight] = counts.get((split, weight), 0) + count
    return counts


GRID = "task_arithmetic(scale=[0.1,0.2,0.4])"
LISTED = "task_arithmetic(scale=[0.1, 0.2, 0.4])"


def test_a_setting_is_chosen_on_val(points: list[tuple[str, float, int]], tmp_path: Path) -> None:
    main(["points", "--seeds", "0", "--output", str(tmp_path / "out"), "--methods", GRID])
    entry = _entries(tmp_path / "out.json")[LISTED, 0]
    assert (entry["chosen"], entry["settings"]["scale"]) == ("task_arithmetic(scale=0.2)", 0.2)
    assert entry["values"]["a"] == pytest.approx(1 / 1.4)  # on test 0.4 would have been better
    own = 1 / 1.6  # the expert's
    expected = {"0.1": 1 / 1.2, "0.2": 1.0, "0.4": 1 / 1.4}
    assert entry["tried"] == pytest.approx({f"task_arithmetic(scale={s})": v / own for s, v in expected.items()})
    # Nothing but the experts and what was chosen has been measured on test; on val, all settings, 1,000 samples each.
    assert {weight for split, weight, _ in points if split == "test"} == {1.0, 0.4}
    assert _counted(points)["val", 0.8] == 100 + 2 * 1000  # a batch is validated by the merge itself
    table = (tmp_path / "out.md").read_text()
    assert "| task_arithmetic(scale=val) " in table
    assert "`scale=0.2` (160.0)" in table
    assert shlex.quote(LISTED) in table


def test_a_name_that_has_come_to_stand_for_other_settings_is_measured_again(
    points: list[tuple[str, float, int]], tmp_path: Path
) -> None:
    command = ["points", "--seeds", "0", "--output", str(tmp_path / "out"), "--methods", "task_arithmetic"]
    main(command)
    first = _entries(tmp_path / "out.json")["task_arithmetic", 0]
    points.clear()
    main(command)
    assert not points  # known
    content = json.loads((tmp_path / "out.json").read_text())
    for entry in content["entries"]:
        if entry["method"] == "task_arithmetic":
            entry["settings"]["scale"], entry["values"] = 0.1, {"a": 0.0, "b": 0.0}
    (tmp_path / "out.json").write_text(json.dumps(content))
    main(command)
    assert _entries(tmp_path / "out.json")["task_arithmetic", 0]["values"] == first["values"]


def test_an_interrupted_choice_goes_on(
    points: list[tuple[str, float, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["points", "--seeds", "0", "--output", str(tmp_path / "out"), "--methods", GRID]
    measure, before = Point.measure, list[Any]()

    def interrupted(self: Point, split: str, count: int) -> None:
        if round(self.weight.mean().item(), 2) == 0.8:
            raise RuntimeError("no more")
        measure(self, split, count)

    with monkeypatch.context() as patch:
        patch.setattr(Point, "measure", interrupted)
        with pytest.raises(RuntimeError, match="no more"):
            main(command)
    before += points
    main(command)
    assert _counted(points[len(before) :]) == {("val", 0.8): 2100, ("val", 0.4): 100, ("test", 0.4): 3000}


def test_val_shows_every_setting(points: list[tuple[str, float, int]], tmp_path: Path) -> None:
    main(["points", "--seeds", "0", "--split", "val", "--output", str(tmp_path / "out"), "--methods", GRID])
    methods = [method for method, _ in _entries(tmp_path / "out.json")]
    assert methods == ["expert", *(f"task_arithmetic(scale={scale})" for scale in (0.1, 0.2, 0.4))]
    assert {split for split, _, _ in points} == {"val"}


def test_what_draws_at_random_draws_anew_for_each_seed(points: list[tuple[str, float, int]], tmp_path: Path) -> None:
    methods = ["dare(seed=5)", "task_arithmetic"]
    main(["points", "--seeds", "0", "1", "--output", str(tmp_path / "out"), "--methods", *methods])
    entries = _entries(tmp_path / "out.json")
    one, other = (entries["dare(seed=5)", seed] for seed in (0, 1))
    assert (one["settings"]["seed"], other["settings"]["seed"]) == (5, 6)
    assert one["values"] != other["values"]
    assert entries["task_arithmetic", 0]["values"] == entries["task_arithmetic", 1]["values"]


def test_too_few_samples_are_told(points: list[tuple[str, float, int]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2000 samples of a are asked for, and val has 1500"):
        main(["points", "--samples", "2000", "--output", str(tmp_path / "out"), "--methods", "average"])


def _results(tmp_path: Path, scores: Mapping[tuple[str, int, int], float]) -> Results:
    """``(method, seed, samples)`` -> accuracy in both tasks."""
    suite = make_suite("points")
    results, trained = Results(suite, tmp_path / "out"), suite.folder(0).parent.name
    for seed in {seed for _, seed, _ in scores}:
        results.add(Entry("expert", seed, 0, "", trained, dict.fromkeys("ab", 1.0)))
    for (method, seed, samples), score in scores.items():
        source = "val" if samples else ""
        results.add(Entry(method, seed, samples, source, trained, dict.fromkeys("ab", score)))
    return results


def _methods(table: str) -> list[list[str]]:
    """The first column of each table."""
    parts = [part.splitlines()[2:] for part in table.split("\n\n") if part.startswith("|")]
    return [[line.split("|")[1].strip() for line in lines] for lines in parts]


@pytest.mark.usefixtures("points")
def test_the_best_comes_first(tmp_path: Path) -> None:
    scores = {"ties": (0.2, 0.2), "chain": (0.7, 0.5), "average": (0.3, 0.1), "regmean": (0.1, 0.9)}
    each = {(name, seed, 0): score for name, both in scores.items() for seed, score in enumerate(both)}
    each["dare", 0, 0] = each["dare", 1, 0] = float("nan")
    results = _results(tmp_path, each)
    order = ["chain", "regmean", "ties", "average", "dare"]
    table = show(results, results.entries()[0].trained)
    assert _methods(table) == [order, ["experts", *order]]
    assert "60.0 |   14.1 |     2 |" in table  # the mean of 70 and 50, and what is between them
    assert not (tmp_path / "out-samples.png").exists()


@pytest.mark.usefixtures("points")
def test_numbers_of_samples_have_a_table(tmp_path: Path) -> None:
    scores = {("chain", seed, n): 0.5 + seed / 10 + n / 1000 for seed in (0, 1) for n in (64, 256)}
    results = _results(tmp_path, {**scores, ("regmean", 0, 256): 0.9, ("average", 0, 0): 0.1})
    table = show(results, results.entries()[0].trained)
    assert _methods(table) == [["regmean", "chain", "average"], ["chain"], ["experts", "regmean", "chain", "average"]]
    assert "| method |         64 |        256 |" in table
    assert "| chain  | 61.4 ± 7.1 | 80.6 ± 7.1 |" in table
    assert (tmp_path / "out-samples.png").stat().st_size > 1000
    commands = [line for line in table.splitlines() if line.startswith("`python")]
    assert ["--samples 64 256 " in command for command in commands] == [True, False]
    assert sum("average" in command for command in commands) == 1


@pytest.mark.usefixtures("points")
def test_old_names_of_options_are_understood_and_removed_options_left_out(tmp_path: Path) -> None:
    old = ("chain(private_biases=True, balance=worst)", "chain(perturbed_copies=1)")
    results = _results(tmp_path, {(name, 0, 256): 0.5 for name in old})
    table = show(results, results.entries()[0].trained)
    assert "| chain(private_biases=True, balance=True) " in table
    assert "perturbed_copies" not in table


@pytest.mark.usefixtures("points")
def test_an_ablation_has_a_column_for_each_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {("average", 0, 0): 0.2, ("chain", 0, 256): 0.5, ("chain", 1, 256): 0.7, ("chain", 0, 64): 0.1}
    results = _results(tmp_path, {**scores, ("joint training", 0, 0): 0.9, ("ties", 0, 0): 0.3})
    results.path.with_suffix(".json").rename(tmp_path / "points.json")
    monkeypatch.setattr(ablation, "SUITES", {"points": "", "other": ""})
    monkeypatch.setattr(ablation, "make_suite", lambda name: make_suite("points"))
    table = ablation.ablation(tmp_path)
    assert _methods(table) == [["average", "chain (the default)", "joint training"]]
    assert "| 60.0 ± 14.1 (2) |     - |" in table
    assert (tmp_path / "ablation.md").read_text() == table
    assert (tmp_path / "ablation.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("ties(scale=[1, 2], density=0.2)", "ties(scale=[1, 2])"),
        ("refitted(ridge=0.5, method=ties(density=0.3, scale=1))", "refitted(method=ties(density=0.3), ridge=0.5)"),
        ("combined(rest=average, matrices=tsvm)", "combined(matrices=tsvm, rest=average)"),
        ("joint training", "joint training"),
    ],
)
def test_a_method_has_one_name(listed: str, expected: str) -> None:
    assert canonical(listed) == expected
    assert canonical(expected) == expected


def test_rules_within_rules_have_settings() -> None:
    (setting,) = read_settings("refitted(method=ties(density=0.3))")
    assert isinstance(setting.method, Refitted)
    assert isinstance(setting.method.method, TIES)
    assert setting.method.method.density == 0.3
    with pytest.raises(MergeError, match="did you mean ties"):
        read_settings("refitted(method=tees(density=0.3))")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("heads", [{"refit_private": True}, {"refit_heads": False}, {}])
def test_an_old_row_has_the_name_that_means_its_settings_today(normalize: bool, heads: Mapping[str, bool]) -> None:
    """Whatever the defaults are today, the name makes a rule with the settings of the measurement."""
    stored = {"class": "ChainOfMerges", "normalize": normalize, **heads, "balance": "worst"}
    entry = Entry.read({**asdict(Entry("chain(balance=worst)", 0, 256, "val", "", {})), "settings": stored})
    (setting,) = read_settings(entry.method)
    assert setting.label == entry.method
    options = setting.method.options
    assert options is not None
    assert (options.normalize, options.refit_heads) == (normalize, any(heads.values()))
    assert options.balance


@pytest.mark.usefixtures("points")
def test_results_of_other_experts_are_kept_apart(tmp_path: Path) -> None:
    results = _results(tmp_path, {("chain", 0, 256): 0.5, ("chain", 1, 256): 0.5, ("ties", 0, 0): 0.4})
    trained = results.entries()[0].trained
    results.add(Entry("expert", 0, 0, "", trained, dict.fromkeys("ab", 0.8), "anew"))
    results.add(Entry("chain", 0, 256, "val", trained, dict.fromkeys("ab", 0.6), "anew"))
    (new,) = results.rows(trained)
    assert new.label == "chain"
    assert new.scores == pytest.approx([0.75])  # not with what seed 1 had earlier
    (old,) = results.rows(trained, earlier=True)
    assert (old.label, old.scores) == ("ties", [0.4])  # compared with its own expert
    table = show(results, trained)
    above, _, below = table.partition("Measured earlier, with experts of another run")
    assert "| ties " in below
    assert "| ties " not in above
    results.add(Entry("ties", 0, 0, "", trained, dict.fromkeys("ab", 0.2), "anew"))
    assert not results.rows(trained, earlier=True)
    old_experts = [entry.seed for entry in results.entries() if entry.method == "expert" and not entry.experts]
    assert old_experts == [1]  # nothing is compared with the other one any more


@pytest.mark.usefixtures("points")
def test_tables_need_no_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = _results(tmp_path, {("ties", 0, 0): 0.4})
    monkeypatch.setattr(Points, "load", lambda *_: pytest.fail("experts are not needed"))
    main(["points", "--tables", "--output", str(results.path)])
    assert "| ties " in results.path.with_suffix(".md").read_text()


def test_accuracy_is_shown_against_size(points: list[tuple[str, float, int]], tmp_path: Path) -> None:
    suite, results = make_suite("points"), Results(make_suite("points"), tmp_path / "out")
    trained = suite.folder(0).parent.name
    results.add(Entry("expert", 0, 0, "", trained, dict.fromkeys("ab", 1.0)))
    for name, own, value in (("chain", 0, 0.5), ("chain(task_rank=8)", 40, 0.9), ("chain(task_rank=1)", 5, 0.7)):
        size = {"model": 1000, "shared": 1000, "per_task": own}
        results.add(Entry(name, 0, 256, "val", trained, dict.fromkeys("ab", value), size=size))
    found = series(results.rows(trained))
    assert {name: [row.mean for row in rows] for name, rows in found.items()} == {"chain": [0.5, 0.7, 0.9]}
    table = show(results, trained)
    (line,) = (line for line in table.splitlines() if line.startswith("| chain, rank 8 "))
    assert [cell.strip() for cell in line.split("|")][2:5] == ["4.00", "54.0", "90.0"]
    assert (tmp_path / "out-size.png").stat().st_size > 1000


def test_a_row_knows_its_size(points: list[tuple[str, float, int]], tmp_path: Path) -> None:
    main(["points", "--seeds", "0", "--output", str(tmp_path / "out"), "--methods", "average"])
    assert _entries(tmp_path / "out.json")["average", 0]["size"] == {"model": 1000, "shared": 1000, "per_task": 0}


def test_joint_training_normalises_the_images_of_all_tasks_as_one_batch() -> None:
    torch.manual_seed(0)
    modules = {task: ResNetClassifier(10) for task in "ab"}
    joint = Joint(modules, ("head",), learning_rate=1e-3, weight_decay=0.0, warmup=0.2).train()
    convolution: Any = modules["a"].net[0]
    norm: Any = modules["a"].net[1]
    norm.momentum = 1.0  # the statistics of the last batch
    batch = {task: (torch.randn(4, 1, 28, 28) + shift, torch.arange(4)) for task, shift in (("a", -2.0), ("b", 3.0))}
    loss: Any = joint.training_step(batch, 0)
    images = torch.cat([part[0] for part in batch.values()])
    torch.testing.assert_close(norm.running_mean, convolution(images).mean((0, 2, 3)))
    loss.backward()
    for module in modules.values():
        assert module.head.weight.grad is not None


@pytest.mark.parametrize("name", ["images8", "lm4"])
def test_a_set_stands_for_its_methods(name: str) -> None:
    """Where nothing is private, there are no heads to refit."""
    methods = expanded(make_suite(name), ["ablation", "average", "refitted(method=tsvm)"])
    assert methods is not None
    assert len(set(methods)) == len(methods)
    assert methods[-1] == "refitted(method=tsvm)"  # asked for by its name
    assert any("refit" in method for method in methods[:-1]) == (name == "images8")
    assert settings_for(make_suite(name), methods)


def test_a_rule_within_a_rule_is_named_alone() -> None:
    anchored, average = (read_settings(f"chain(anchor={name})")[0] for name in ("tsvm", "average"))
    assert repr(anchored.method) == "ChainOfMerges(anchor=TSVM())"
    assert anchored.label == "chain(anchor=tsvm)"
    assert average.method.describe()["anchor"] == "average"
