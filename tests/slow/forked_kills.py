"""A merge that is killed loses nothing. Run by tests/slow/test_killed.py in an interpreter of its own.

Processes are forked, which is fast, and safe only where nothing has started threads before.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule
from com_lightning.core.solve.statistics import InputSums
from tests.helpers import Classifier, make_data, make_experts, quiet_trainer

_WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
_count, _last, _where = 0, -1, ""


def _watch(event: str, args: tuple[Any, ...]) -> None:
    """Count what is done to the disk, and be killed just before the last one that is allowed."""
    global _count
    writes = event == "open" and isinstance(args[1], str) and not set(args[1]).isdisjoint("wxa+")
    if _where and (writes or event in _WRITES) and str(args[0]).startswith(_where):
        if _count == _last:
            os.kill(os.getpid(), signal.SIGKILL)
        _count += 1


def run(folder: Path, overwrite: bool = False) -> None:
    merger = ChainOfMergesCallback(
        dict(zip("ab", make_experts())),
        ChainOfMerges(refit_heads=False),  # each layer has the statistics of both tasks
        baselines=False,
        output_dir=str(folder),
        overwrite=overwrite,
    )
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
    quiet_trainer(callbacks=[merger]).validate(Classifier(3), datamodule=tasks, verbose=False)


def forked(work: Callable[[], Any]) -> int:
    """Exit status of a process that does the work; negative: the signal that ended it."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(number: int, folder: Path, overwrite: bool = False) -> int:
    """Run a merge that is killed before it does the n-th thing to the disk. ``-1``: never; all are counted."""

    def work() -> None:
        global _last, _where
        _last, _where = number, str(folder.parent)
        sys.addaudithook(_watch)
        run(folder, overwrite)
        (folder / "count").write_text(str(_count))

    return forked(work)


def content(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The merged weights, bit by bit, and what is told of the layers."""
    states = {"": load_file(folder / "merged.safetensors")}
    states.update({task: torch.load(folder / f"{task}.ckpt", weights_only=True)["state_dict"] for task in "ab"})
    every = {f"{task} {name}": tensor for task, state in states.items() for name, tensor in state.items()}
    bits = {name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, tensor in every.items()}
    report = json.loads((folder / "report.json").read_text())
    return bits, [{**layer, "seconds": 0, "solving": 0} for layer in report["layers"]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, int]:
    folder = tmp_path_factory.mktemp("whole") / "merged"
    assert killed_at(-1, folder) == 0
    return content(folder), int((folder / "count").read_text())


def _points(total: int) -> list[int]:
    """All of them, or a sample of a quarter, the last ones included."""
    if os.environ.get("KILL_EVERYWHERE"):
        return list(range(total))
    return sorted({*random.Random(0).sample(range(total), total // 4), total - 1})


def test_killed_at_every_write(uninterrupted: Any, tmp_path: Path) -> None:
    """Whatever was last written, there is a whole result or none, and the same command ends with the same bits."""
    expected, total = uninterrupted
    assert total > 20
    for number in _points(total):
        folder = tmp_path / str(number) / "merged"
        folder.parent.mkdir()
        assert killed_at(number, folder) == -signal.SIGKILL, number
        if folder.exists():
            assert content(folder) == expected, number
            continue
        assert forked(partial(run, folder)) == 0, number
        assert content(folder) == expected, number
        assert [entry.name for entry in folder.parent.iterdir()] == ["merged"], number


def test_killed_while_a_result_is_replaced(uninterrupted: Any, tmp_path: Path) -> None:
    """At any time there is the old result, the new one, or what the next run makes one of them again."""
    expected, _ = uninterrupted
    counted = tmp_path / "counted" / "merged"
    counted.parent.mkdir()
    assert forked(lambda: run(counted)) == 0
    assert killed_at(-1, counted, overwrite=True) == 0
    total = int((counted / "count").read_text())
    for number in range(total - 8, total):
        folder = tmp_path / str(number) / "merged"
        folder.parent.mkdir()
        assert forked(partial(run, folder)) == 0
        assert killed_at(number, folder, overwrite=True) == -signal.SIGKILL
        if folder.exists():
            assert content(folder) == expected, number
        assert forked(partial(run, folder, True)) == 0, number
        assert content(folder) == expected, number
        assert [entry.name for entry in folder.parent.iterdir()] == ["merged"], number


@pytest.mark.parametrize("layers", [1, 2])
def test_what_was_merged_is_not_solved_again(layers: int, uninterrupted: Any, tmp_path: Path) -> None:
    """Killed as it gathers the statistics of a layer, it goes on with that layer."""
    folder, log = tmp_path / "merged", tmp_path / "log"
    original = InputSums.to_means

    def counted(self: InputSums, weight: Tensor) -> Any:
        with open(log, "a") as stream:
            stream.write(".")
        if not (tmp_path / "second").exists() and len(log.read_text()) == 2 * layers + 1:  # two tasks
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, weight)

    def work() -> None:
        InputSums.to_means = counted  # type: ignore[method-assign]
        run(folder)

    assert forked(work) == -signal.SIGKILL
    log.unlink()
    (tmp_path / "second").touch()
    assert forked(work) == 0
    expected, _ = uninterrupted
    assert content(folder) == expected
    resumed = json.loads((folder / "report.json").read_text())["resumed"]
    assert resumed == layers
    assert len(log.read_text()) == 2 * (len(expected[1]) - layers)
