"""Another rule as the chain's anchor: by configuration, in a comparison, in the report, and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from com_lightning import Average, ChainOfMerges, ChainOfMergesCallback, MergeDataModule
from com_lightning.cli import main
from tests.helpers import Classifier, make_data, make_experts
from tests.helpers.commands import DATA, MODEL, QUIET, base_file, expert_files

CHAIN = ["--method=ChainOfMerges", "--method.normalize=false", "--method.refit_heads=false"]


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [*MODEL, *DATA, *QUIET, *expert_files(tmp_path)]


def report(folder: Path) -> dict[str, object]:
    return json.loads((folder / "report.json").read_text())  # type: ignore[no-any-return]


def test_a_rule_is_chosen_on_the_command_line(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged"
    arguments = ["--method.anchor=TaskArithmetic", "--method.anchor.scale=0.7", f"--output_dir={out}"]
    main(["merge", *files, *CHAIN, *arguments, base_file(tmp_path)])
    method = report(out)["method"]
    assert isinstance(method, dict)
    assert method["anchor"] == {"class": "TaskArithmetic", "importance": None, "scale": 0.7}
    main(["merge", f"--config={out / 'config.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    assert report(tmp_path / "again")["method"] == method


def test_the_base_is_an_anchor_too(files: list[str], tmp_path: Path) -> None:
    main(["merge", *files, *CHAIN, "--method.anchor=base", base_file(tmp_path), f"--output_dir={tmp_path / 'merged'}"])
    assert report(tmp_path / "merged")["method"]["anchor"] == "base"  # type: ignore[index]


def test_without_a_base_nothing_starts(files: list[str], tmp_path: Path) -> None:
    for anchor in ("TSVM", "base"):
        arguments = ["--seed_everything=5", f"--method.anchor={anchor}", f"--output_dir={tmp_path / 'merged'}"]
        with pytest.raises(SystemExit, match="base: "):
            main(["merge", *files, *CHAIN, *arguments])
    with pytest.raises(SystemExit, match="anchor: RegMean merges layer by layer itself"):
        main(["merge", *files, *CHAIN, "--method.anchor=RegMean", f"--output_dir={tmp_path / 'merged'}"])


def test_anchors_are_compared(files: list[str], tmp_path: Path) -> None:
    anchored = "{class_path: ChainOfMerges, init_args: {anchor: {class_path: TSVM}}}"
    rules = f"[{anchored}, RegMean, TaskArithmetic]"
    main(["compare", *files, f"--methods={rules}", base_file(tmp_path), f"--output_dir={tmp_path / 'out'}"])
    methods = report(tmp_path / "out")["methods"]
    assert isinstance(methods, list)
    assert "ChainOfMerges(anchor=TSVM())" in {method["label"] for method in methods}


def test_what_is_held_besides_is_estimated() -> None:
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    tasks.setup("validate")
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), ChainOfMerges())
    plan = merger.plan(Classifier(), tasks, becomes_first=False, writes=False)
    plain = plan.memory()
    assert replace(plan, method=ChainOfMerges(anchor="base")).memory() == plain
    anchored = replace(plan, method=ChainOfMerges(anchor=Average())).memory()
    assert anchored == {**plain, "merged model": 2 * plain["merged model"]}
    similar = replace(plan, method=ChainOfMerges(importance="similarity")).memory()
    assert similar["largest layer"] > plain["largest layer"]
