"""Progress bars: drawn with what the trainer draws with, and never into anything else."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from rich import get_console
from rich.live import Live
from torch import Tensor, nn

from com_lightning import (
    TIES,
    AdaMerging,
    ChainOfMerges,
    ChainOfMergesCallback,
    Fisher,
    MergeDataModule,
    callback,
    progress,
)
from com_lightning.core.sweep.context import Advance, Progress
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer
from tests.helpers.commands import DATA, MODEL, expert_files
from tests.helpers.terminal import Terminal, open_terminal, terminal

BARS = [RichProgressBar, TQDMProgressBar]


def merged_with(bar: ProgressBar) -> None:
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), verbose=True)
    tasks = MergeDataModule({"a": make_data(), "b": make_data(1, 4)}, num_samples=32)
    trainer = quiet_trainer(callbacks=[merger, bar], enable_progress_bar=True)
    trainer.validate(Classifier(), datamodule=tasks)


def require_clean(shown: Terminal) -> None:
    """Make sure that nothing remains of our bars."""
    lines = shown.lines()
    assert "merging layers" in shown.written
    assert "validating merged" in shown.written
    assert not [line for line in lines if "merging" in line or "validating" in line]
    assert len([line for line in lines if line.startswith("Validation ")]) == 1  # Lightning's own


@pytest.mark.parametrize("bar", BARS)
def test_bars_of_a_merge_leave_the_terminal_clean(
    bar: Callable[[], ProgressBar], monkeypatch: pytest.MonkeyPatch
) -> None:
    with terminal(monkeypatch) as shown:
        merged_with(bar())
    require_clean(shown)
    lines = shown.lines()
    assert len(lines) < 40
    first = max(number for number, line in enumerate(lines) if "DataLoader 0" in line)
    assert min(number for number, line in enumerate(lines) if line.startswith("| task")) > first
    assert not lines[-1].startswith("Validation")


def test_a_display_that_a_failed_trainer_has_left_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    console = get_console()
    console.set_live(Live(console=console))  # Lightning's own display makes the console anew, later on
    with terminal(monkeypatch) as shown:
        merged_with(RichProgressBar())
    assert "merging layers" in shown.written


@pytest.mark.parametrize("bar", BARS)
def test_messages_have_lines_of_their_own(bar: Callable[[], ProgressBar], monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("a_project")
    trainer = quiet_trainer(callbacks=[bar()], enable_progress_bar=True)
    with terminal(monkeypatch) as shown:
        logger.addHandler(handler := logging.StreamHandler())  # it keeps the stream of now
        with progress.drawn(trainer) as draw, draw("outside", 1), draw("work", 3) as step:
            for number in range(3):
                print("it prints")
                print("it warns", file=sys.stderr)
                logger.warning("it logs")
                step(str(number))
        logger.removeHandler(handler)
    assert "work" in shown.written
    assert [line for line in shown.lines() if line] == ["it prints", "it warns", "it logs"] * 3


@pytest.mark.parametrize("bar", BARS)
def test_nothing_but_lines_of_text_goes_into_a_file(
    bar: Callable[[], ProgressBar], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = quiet_trainer(callbacks=[bar()], enable_progress_bar=True)
    with progress.drawn(trainer) as draw, draw("work", 2) as step:
        step("one")
        monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
        step("two")
    captured = capsys.readouterr()
    assert captured.err == "work: 2 of 2\n"
    assert captured.out == ""


@pytest.mark.parametrize("off", [{"enable_progress_bar": False}, {"refresh_rate": 0}])
@pytest.mark.parametrize("bar", BARS)
def test_nothing_is_drawn_if_the_trainers_bar_is_off(
    bar: Any, off: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = (
        quiet_trainer(**off)
        if "refresh_rate" not in off
        else quiet_trainer(callbacks=[bar(**off)], enable_progress_bar=True)
    )
    with terminal(monkeypatch) as shown, progress.drawn(trainer) as draw, draw("work", 1) as step:
        step("one")
    assert shown.written == ""


class WithParameters(Classifier):
    """A module with a parameter that is a layer of its own, and one that has no closed form."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.scale, self.power = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x * self.scale).abs().pow(self.power))


@pytest.mark.parametrize(
    "method", [ChainOfMerges(sensitivity="probabilities", refit_heads=True), TIES(), Fisher(), AdaMerging(steps=3)]
)
def test_no_stage_has_more_steps_than_it_says(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[tuple[str, int, list[str]]] = []

    @contextmanager
    def drawn(trainer: Trainer) -> Iterator[Progress]:
        @contextmanager
        def draw(what: str, steps: int) -> Iterator[Advance]:
            stages.append((what, steps, []))
            yield stages[-1][2].append

        yield draw

    monkeypatch.setattr(callback, "drawn", drawn)
    model = WithParameters(3)
    experts = {"a": perturb(copy.deepcopy(model)), "b": perturb(copy.deepcopy(model))}
    tasks = MergeDataModule({"a": make_data(), "b": make_data(1)}, num_samples=32)
    merger = ChainOfMergesCallback(experts, method)
    quiet_trainer(callbacks=[merger]).validate(model, datamodule=tasks)
    assert {what.split()[0] for what, _, _ in stages} > {"validating"}
    for what, steps, done in stages:
        assert 0 < len(done) <= steps, what
        assert len(done) == steps or what == "merging layers"  # what has no closed form is not reached


WITHOUT_RICH = """
import sys, importlib.metadata as metadata
found = metadata.distribution
def distribution(name):
    if name == "rich":
        raise metadata.PackageNotFoundError(name)
    return found(name)
metadata.distribution = distribution
sys.modules["rich"] = None
from com_lightning.cli import main
main()
"""


def test_the_command_line_without_rich(tmp_path: Path) -> None:
    """An interpreter of its own, in which rich cannot be imported, and a terminal of its own."""
    arguments = ["merge", *MODEL, *DATA, "--trainer.logger=false", "--trainer.accelerator=cpu", *expert_files(tmp_path)]
    master, slave = open_terminal()
    process = subprocess.Popen(
        [sys.executable, "-c", WITHOUT_RICH, *arguments, f"--output_dir={tmp_path / 'out'}"], stdout=slave, stderr=slave
    )
    os.close(slave)
    shown = Terminal()
    try:
        while chunk := os.read(master, 1 << 16):
            shown.written += chunk.decode(errors="replace")
    except OSError:  # the process has ended
        pass
    assert process.wait(60) == 0, shown.written
    os.close(master)
    require_clean(shown)
    assert len(shown.lines()) < 60
    assert next(line for line in shown.lines() if "The merged model is in" in line).startswith("The merged model")
    assert "Written to" in shown.lines()[-1]
