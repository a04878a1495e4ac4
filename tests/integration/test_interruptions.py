"""What ends a merge after its last layer, while tasks are validated, loses nothing and is no success."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from com_lightning import Average, ChainOfMergesCallback, MergeDataModule
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer


class Stopping(Classifier):
    """Something happens in one of its validation batches."""

    event: Callable[[], object] | None = None
    at = count = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        kind = type(self)
        if type(self.trainer) is Trainer and kind.event is not None:  # calibration forwards see a view of it
            kind.count += 1
            if kind.count == kind.at:
                kind.event()
        super().validation_step(batch, batch_idx)


def merge(folder: Path, event: Callable[[], object] | None = None, at: int = 0, **options: Any) -> dict[str, Any]:
    Stopping.event, Stopping.at, Stopping.count = staticmethod(event) if event else None, at, 0
    experts = {}
    for name, expert in zip("ab", make_experts((3, 3))):
        experts[name] = Stopping()
        experts[name].load_state_dict(expert.state_dict())
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    merger = ChainOfMergesCallback(experts, private=[], output_dir=str(folder), **options)
    quiet_trainer(callbacks=[merger]).validate(Stopping(), datamodule=data, verbose=False)
    return json.loads((folder / "report.json").read_text())  # type: ignore[no-any-return]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt() -> None:
    raise KeyboardInterrupt


def fail() -> None:
    raise ValueError("no metric today")


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from the first one on


@pytest.mark.filterwarnings("ignore:the validation was interrupted")
@pytest.mark.parametrize(("event", "status"), [(terminate, 143), (interrupt, 1)])
@pytest.mark.parametrize("at", [2, 7])
def test_a_validation_that_is_interrupted(event: Callable[[], object], status: int, at: int, tmp_path: Path) -> None:
    """In Lightning's own pass or in that of single tasks: not a success, and the same command goes on."""
    expected = merge(tmp_path / "whole")
    folder = tmp_path / "merged"
    with pytest.raises(SystemExit) as caught:
        merge(folder, event, at)
    assert caught.value.code == status
    assert not folder.exists()
    report = merge(folder)
    assert report["resumed"] == len(report["layers"])
    assert report["metrics"] == expected["metrics"]
    one, two = load_file(tmp_path / "whole" / "merged.safetensors"), load_file(folder / "merged.safetensors")
    assert all(torch.equal(two[name], value) for name, value in one.items())
    assert not (tmp_path / ".merged.partial").exists()


@pytest.mark.filterwarnings("ignore:the validation was interrupted")
def test_a_rule_without_data_is_merged_again(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        merge(tmp_path / "merged", interrupt, 2, method=Average())
    assert not (tmp_path / "merged").exists()
    assert merge(tmp_path / "merged", method=Average())["metrics"]["merged"]


@pytest.mark.parametrize(
    ("event", "options", "told"),
    [(fail, {}, "failed (ValueError: no metric today)"), (interrupt, {"resume": False}, "was interrupted")],
)
def test_a_result_without_metrics_says_so(
    event: Callable[[], object], options: dict[str, Any], told: str, tmp_path: Path
) -> None:
    """A validation that fails would fail again, and without a record the merge would be lost: it is written."""
    with pytest.raises((ValueError, SystemExit)):
        merge(tmp_path / "merged", event, 7, **options)
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert [
        text for text in report["warnings"] if text.startswith(f"the validation {told}, so that metrics are missing")
    ]
