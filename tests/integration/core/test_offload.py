"""A memory budget of known architectures, of the callback, and in a dry run."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError, merge
from com_lightning.cli import main
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import Task
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer
from tests.helpers.commands import DATA, MODEL, QUIET, expert_files
from tests.helpers.pagers import recorded_pagers
from tests.helpers.zoo import averages, run
from tests.helpers.zoo import make_experts as zoo_experts


@pytest.mark.parametrize("name", ["BERT", "Mixtral", "U-Net"])
def test_a_budget_changes_no_bit_of_known_architectures(name: str) -> None:
    results = []
    for budget in (None, 0):
        experts, batches = zoo_experts(name)
        merged = averages(experts)
        tasks = [Task(f"task{n}", e, b, run) for n, (e, b) in enumerate(zip(experts, batches))]
        records = merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(), Context(memory_budget=budget))
        results.append((merged, [replace(record, seconds=0.0, solving=0.0) for record in records]))
    (one, records), (other, more) = results
    assert records == more
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_the_callback_takes_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    pagers = recorded_pagers(monkeypatch)
    reports = []
    for budget in (None, "auto", 1e-6):
        data = MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, num_samples=40)
        experts = dict(zip("ab", make_experts()))
        merger = ChainOfMergesCallback(experts, baselines=False, memory_budget=budget)
        quiet_trainer(callbacks=[merger]).validate(make_experts()[0], datamodule=data, verbose=False)
        reports.append(merger.report.metrics)
    assert reports[0] == reports[1] == reports[2]
    assert [pager.budget for pager in pagers] == [1073] * 3  # shared layers, then each task's head
    assert pagers[0].written > 0


def test_without_a_budget_paused_forwards_take_what_is_free(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], saved: list[str]
) -> None:
    """The estimate comes from a few samples, and is about what all of them hold."""
    pagers = recorded_pagers(monkeypatch)
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, num_samples=40)
    experts = dict(zip("ab", make_experts()))
    free = [2**40]
    monkeypatch.setattr("com_lightning.execution.free_memory", lambda device: free[0])
    monkeypatch.setattr("com_lightning.memory_estimate.free_memory", lambda device: free[0])
    plenty = merge(Classifier(3), experts, data, trainer=quiet_trainer(), memory_budget=None)
    held = max(pager.peak for pager in pagers) if pagers else 0
    assert not held, "nothing is counted without a budget"
    result = merge(Classifier(3), experts, data, trainer=quiet_trainer())
    assert not any("paused forwards" in warning for warning in result.report.warnings)
    largest = 2**14
    free[0] = largest
    with pytest.warns(UserWarning, match=r"paused forwards would hold about .* GiB, and 0.00 GiB are free"):
        scarce = merge(Classifier(3), experts, data, trainer=quiet_trainer())
    assert scarce.report.metrics == plenty.report.metrics
    assert any("The result is the same" in warning for warning in scarce.report.warnings)
    assert max(pager.written for pager in pagers) > 0
    main(["merge", *MODEL, *DATA, *QUIET, *saved, "--dry_run"])
    assert "That is more than fits: " in capsys.readouterr().out


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan"), float("inf")])
def test_a_budget_that_is_none_is_a_problem(budget: float) -> None:
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, num_samples=40)
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), memory_budget=budget)
    with pytest.raises(MergeError, match="memory_budget: must be a number of GiB above 0"):
        quiet_trainer(callbacks=[merger]).validate(make_experts()[0], datamodule=data, verbose=False)


@pytest.fixture
def saved(tmp_path: Path) -> list[str]:
    return expert_files(tmp_path)


def test_dry_run_tells_what_a_budget_does(saved: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [*MODEL, *DATA, *QUIET, *saved, f"--output_dir={tmp_path / 'merged'}"]
    arguments = [*plain, "--memory_budget=1e-6"]
    main(["merge", *plain, "--dry_run"])
    out = capsys.readouterr().out
    assert "Paused forwards: about" in out
    assert "for 40 samples of each task" in out
    assert "memory_budget" not in out
    assert "gradients" not in out
    options = ["--method=ChainOfMerges", "--method.sensitivity=probabilities"]
    main(["merge", *plain, *options, "--dry_run"])
    more = capsys.readouterr().out
    assert "Before that, the gradients of one batch at a time: about" in more
    amounts = [float(re.search(r"Paused forwards: about ([\d.,]+) KiB", text)[1]) for text in (out, more)]  # type: ignore[index]
    assert amounts[1] == pytest.approx(amounts[0], rel=0.01)
    main(["merge", *arguments, "--dry_run"])
    told = "With memory_budget=1e-06, 1.0 KiB of it stays, the rest is paged to files in"
    assert told in capsys.readouterr().out
    assert not (tmp_path / "merged").exists()
    main(["merge", *arguments])
    assert (tmp_path / "merged" / "merged.safetensors").is_file()


def test_dry_run_gives_the_error_that_the_merge_would(
    saved: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Classifier, batch: Any, batch_idx: int) -> None:
        self(batch[0])
        raise LookupError("mine")

    monkeypatch.setattr(Classifier, "validation_step", fail)
    arguments = [*MODEL, *DATA, *QUIET, *saved, f"--output_dir={tmp_path / 'merged'}"]
    for more in ([], ["--dry_run"]):
        with pytest.raises(LookupError, match="mine"):
            main(["merge", *arguments, *more])
