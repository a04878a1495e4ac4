"""What an unfinished merge leaves is used by the same merge only, and by one process at a time."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

import com_lightning.results.journal
from com_lightning import (
    Average,
    ChainOfMerges,
    ChainOfMergesCallback,
    Combined,
    MergeDataModule,
    MergeError,
    TaskArithmetic,
)
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context, Solved
from com_lightning.core.sweep.task import LayerRecord, SkippedBatch, Task
from com_lightning.core.tensors.digest import digest
from com_lightning.errors import MergeWarning
from com_lightning.results.atomic import Workplace, write_whole
from com_lightning.results.fingerprint import combined, fingerprint_of_data, fingerprint_of_experts
from com_lightning.results.journal import FileJournal
from tests.helpers import Classifier, built, make_data, make_experts, quiet_trainer
from tests.helpers.zoo import averages


class Interrupted(Exception):
    pass


def merge(folder: Path, seed: int = 0, scale: float = 0.3, **kwargs: Any) -> ChainOfMergesCallback:
    settings: dict[str, Any] = {"baselines": False, "output_dir": str(folder), **kwargs}
    callback = ChainOfMergesCallback(dict(zip("ab", make_experts(scale=scale))), **settings)
    data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40, seed=seed)
    quiet_trainer(callbacks=[callback]).validate(Classifier(3), datamodule=data, verbose=False)
    return callback


def interrupt(folder: Path, layers: int, **kwargs: Any) -> None:
    """A merge that ends with an exception after so many layers."""
    count = 0

    def on_layer(*record: Any) -> None:
        nonlocal count
        count += 1
        if count == layers:
            raise Interrupted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("com_lightning.callback.log_layer", on_layer)
        with pytest.raises(Interrupted):
            merge(folder, **kwargs)


def test_a_merge_that_is_told_to_end_ends_after_a_layer_and_goes_on_later(tmp_path: Path) -> None:
    merged: list[str] = []

    def on_layer(*record: Any) -> None:
        merged.append("layer")
        if len(merged) == 2:
            assert callable(signal.getsignal(signal.SIGTERM))  # Lightning's; or else this process would end
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("com_lightning.callback.log_layer", on_layer)
        with pytest.raises(SystemExit) as ended:
            merge(tmp_path / "out")
    assert (len(merged), ended.value.code) == (2, 143)
    assert merge(tmp_path / "out").report.resumed == 2


def without_time(records: list[LayerRecord]) -> list[dict[str, Any]]:
    return [{**vars(record), "seconds": 0, "solving": 0} for record in records]


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The folder of a merge that has two layers."""
    interrupt(tmp_path / "out", 2)
    assert len(list((tmp_path / ".out.partial" / "journal").glob("*.safetensors"))) == 2
    return tmp_path / "out"


def test_the_same_merge_goes_on(unfinished: Path, tmp_path: Path) -> None:
    callback, whole = merge(unfinished), merge(tmp_path / "whole")
    assert (callback.report.resumed, whole.report.resumed) == (2, 0)
    assert "2 layers from an interrupted merge" in str(callback.report)
    for ours, theirs in zip(callback.modules["a"].parameters(), whole.modules["a"].parameters()):
        assert torch.equal(ours, theirs)
    assert without_time(callback.report.layers) == without_time(whole.report.layers)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_refitted_heads_go_on(tmp_path: Path) -> None:
    method = ChainOfMerges(refit_heads=True)
    interrupt(tmp_path / "out", 4, method=method)  # the first of two heads is done
    callback, whole = (merge(tmp_path / name, method=method) for name in ("out", "whole"))
    assert callback.report.resumed == 4
    for task in "ab":
        ours, theirs = callback.modules[task].state_dict(), whole.modules[task].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert without_time(callback.report.layers) == without_time(whole.report.layers)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"scale": 0.2}, "expert 'a', expert 'b'"),
        ({"seed": 1}, "calibration data of 'a', calibration data of 'b'"),
        ({"method": ChainOfMerges(ridge=0.1)}, "method"),
        ({"private": ["head", "body.0"]}, "shared parameters"),
    ],
)
def test_another_merge_is_refused(change: dict[str, Any], told: str, unfinished: Path) -> None:
    with pytest.raises(MergeError, match=f"differs from this one: {told}.*set resume=False") as caught:
        merge(unfinished, **change)
    assert len(caught.value.problems) == 1
    assert merge(unfinished, **change, resume=False).report.resumed == 0
    assert not (unfinished.parent / ".out.partial").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    """By rules that use it: layers may have been solved on what it has gone into."""
    bases = make_experts()
    method = Combined(ChainOfMerges(), TaskArithmetic())
    interrupt(tmp_path / "out", 8, method=method, base=bases[0], private=["head"])  # six of them are parameters
    with torch.no_grad():
        bases[1].get_parameter("body.1.weight").add_(1)
    with pytest.raises(MergeError, match="differs from this one: base"):
        merge(tmp_path / "out", method=method, base=bases[1], private=["head"])
    assert merge(tmp_path / "out", method=method, base=bases[0], private=["head"]).report.resumed == 2


class Augmenting(Classifier):
    """On the device, as the datamodule's seed does not tell."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] + torch.randn_like(batch[0]), batch[1]


def test_random_hooks_give_the_same_data(tmp_path: Path) -> None:
    results = []
    experts = {task: Augmenting(3) for task in "ab"}
    for _ in range(2):
        callback = ChainOfMergesCallback(experts, baselines=False)
        data = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=40)
        quiet_trainer(callbacks=[callback]).validate(Augmenting(3), datamodule=data, verbose=False)
        results.append(callback.modules["a"].state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


def test_another_version_is_refused(unfinished: Path) -> None:
    path = unfinished.parent / ".out.partial" / "journal" / "fingerprint.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version of torch": "1.0"}))
    with pytest.raises(MergeError, match=rf"version of torch \(1.0, now {torch.__version__.split('+')[0]}"):
        merge(unfinished)


def test_without_resume_it_keeps_no_record(tmp_path: Path) -> None:
    interrupt(tmp_path / "out", 2, resume=False)
    assert list(tmp_path.iterdir()) == []


def test_a_rule_without_data_leaves_nothing(tmp_path: Path) -> None:
    merge(tmp_path / "out", method=Average())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "truncated": lambda content: content[:50],
    "empty": lambda content: b"",
    "missing": lambda content: None,
    "a bit of the last value": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "a bit of the record": lambda content: content.replace(b"rows", b"rovs", 1),
    "a digit of the record": lambda content: content.replace(b'ridge\\": 0.01', b'ridge\\": 0.02', 1),
    "another layer's name": lambda content: content.replace(b'"layer":"body.1"', b'"layer":"body.9"', 1),
}


@pytest.mark.filterwarnings("ignore:.*is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_merged_again(damage: str, unfinished: Path, tmp_path: Path) -> None:
    _, second = sorted((unfinished.parent / ".out.partial" / "journal").glob("*.safetensors"))
    content = second.read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    if damaged is None:
        second.unlink()
    else:
        second.write_bytes(damaged)
    callback = merge(unfinished)
    assert callback.report.resumed == 1
    for ours, theirs in zip(callback.modules["a"].parameters(), merge(tmp_path / "whole").modules["a"].parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_a_file_of_another_journal_is_merged_again(unfinished: Path, tmp_path: Path) -> None:
    """It is whole, but its layer was solved from other samples."""
    interrupt(tmp_path / "other" / "out", 2, seed=1)
    for folder in (unfinished.parent, tmp_path / "other"):
        (*_, second) = sorted((folder / ".out.partial" / "journal").glob("*.safetensors"))
        content = second.read_bytes()
    (*_, second) = sorted((unfinished.parent / ".out.partial" / "journal").glob("*.safetensors"))
    second.write_bytes(content)
    callback = merge(unfinished)
    assert callback.report.resumed == 1
    for ours, theirs in zip(callback.modules["a"].parameters(), merge(tmp_path / "whole").modules["a"].parameters()):
        assert torch.equal(ours, theirs)


def test_files_of_experts_are_known_by_size_time_and_a_few_values(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, path = nn.Linear(100, 100), tmp_path / "a.ckpt"
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.weight[0, 1] += 1  # not one of the values that are looked at
    path.write_bytes(b"one")
    time = path.stat().st_mtime_ns
    files = {"expert 'a'": path}

    def fingerprints(module: nn.Module) -> list[dict[str, str]]:
        tasks = [Task("a", module, [])]
        of_files = fingerprint_of_experts(tasks, files)
        return [of_files, fingerprint_of_experts(tasks, files, exact=True), fingerprint_of_experts(tasks)]

    before = fingerprints(module)
    assert fingerprints(module) == before
    assert [one == two for one, two in zip(before, fingerprints(other))] == [True, False, False]
    os.utime(path, ns=(time, time + 1))
    assert [one == two for one, two in zip(before, fingerprints(module))] == [False, True, True]
    path.write_bytes(b"longer")
    os.utime(path, ns=(time, time))
    assert [one == two for one, two in zip(before, fingerprints(module))] == [False, True, True]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff"])
def test_a_damaged_fingerprint_is_told_and_all_is_merged_again(content: bytes, unfinished: Path) -> None:
    (unfinished.parent / ".out.partial" / "journal" / "fingerprint.json").write_bytes(content)
    with pytest.warns(UserWarning, match="fingerprint.json is damaged"):
        callback = merge(unfinished)
    assert callback.report.resumed == 0


def test_other_hyperparameters_of_an_expert_are_another_merge() -> None:
    def fingerprint(**settings: Any) -> dict[str, str]:
        torch.manual_seed(0)
        module = Classifier(3)
        module.hparams.update(settings)
        return fingerprint_of_experts([Task("a", module, [])])

    assert fingerprint(activation="gelu") == fingerprint(activation="gelu")
    assert fingerprint(activation="gelu") != fingerprint(activation="relu")


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def acquire(lock: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr("com_lightning.results.atomic.FileLock.acquire", acquire)
    with pytest.warns(MergeWarning, match="output_dir: the file system of .* has no locks"):
        Workplace(tmp_path / "out")


def test_one_merge_at_a_time(tmp_path: Path) -> None:
    workplace = Workplace(tmp_path / "out")
    with pytest.raises(MergeError, match=r"another merge is writing .*out"):
        merge(tmp_path / "out")
    workplace.close()
    merge(tmp_path / "out")


def test_a_merge_that_failed_can_be_run_again_in_the_same_process(unfinished: Path) -> None:
    interrupt(unfinished, 1)
    assert merge(unfinished).report.resumed == 2


def test_a_full_disk_is_told_and_nothing_is_lost(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(com_lightning.results.journal, "save_file", full)
        with pytest.raises(MergeError, match=r"after 2 others.*No space left on device"):
            merge(unfinished)
    assert merge(unfinished).report.resumed == 2


def test_too_little_room_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(MergeError, match=r"the result takes up to 0.00 GiB, and .* has 0.00 GiB free"):
        merge(tmp_path / "out")


def test_parts_of_a_parameter_are_taken_down_as_they_are_written(tmp_path: Path) -> None:
    journal = FileJournal(tmp_path / "journal")
    journal.bind({"a": "1"})
    values = [torch.arange(3, dtype=torch.bfloat16), torch.tensor([1.5], dtype=torch.float64)]
    solved = Solved(LayerRecord("x", "linear", {"w": 3}, condition=1e30), [("w", (3, 5)), ("v", (0, 0))], values)
    journal.add("x", solved)
    again = FileJournal(tmp_path / "journal")
    again.bind({"a": "1"})
    found = again.get("x")
    assert found is not None
    assert (found.record, found.written) == (solved.record, solved.written)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found.values, values))
    assert again.get("y") is None


class Shares(nn.Module):
    """Three layers with one input, of which a batch is lost at the first."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(5, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.q(x) * self.k(x).sigmoid() + self.v(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_batches_stay_lost(layers: int, tmp_path: Path) -> None:
    """Also where layers share their input with the one at which a batch was lost."""
    experts = built(Shares)
    batches = [[torch.randn(7, 5) + task for _ in range(3)] for task in range(2)]
    batches[0][1][0, 1] = float("nan")

    def merge(name: str, layers: int = -1) -> tuple[dict[str, Tensor], list[LayerRecord], list[SkippedBatch]]:
        done = []

        def on_layer(record: LayerRecord) -> None:
            done.append(record)
            if len(done) == layers:
                raise Interrupted

        run = Context(on_layer, journal=FileJournal(tmp_path / name), on_bad_batch="skip")
        run.journal.bind({"a": "1"})
        merged = averages(experts)
        tasks = [Task(str(n), expert, batches[n]) for n, expert in enumerate(experts)]
        return merged, merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(), run), run.skipped

    with pytest.raises(Interrupted):
        merge("unfinished", layers)
    (ours, records, skipped), (theirs, expected, all_skipped) = merge("unfinished"), merge("whole")
    assert skipped == all_skipped
    assert without_time(records) == without_time(expected)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fails(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        write_whole(path, fails)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["old"]

    def works(temporary: Path) -> None:
        temporary.write_text("new")

    write_whole(path, works)
    assert [entry.read_text() for entry in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("there", [False, True])
def test_a_link_stays_and_what_it_points_to_is_written(there: bool, tmp_path: Path) -> None:
    real, link = tmp_path / "elsewhere" / "real", tmp_path / "link"
    link.symlink_to(real)
    if there:
        merge(real)
    merge(link, overwrite=there)
    assert link.is_symlink()
    assert (real / "report.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "link"]


@pytest.mark.parametrize("length", [250, 300])
def test_a_name_that_is_too_long_is_told(length: int, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="File name too long"):
        merge(tmp_path / ("l" * length))


def test_a_lock_of_a_process_that_is_gone_does_not_count(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "lock").touch()  # as a killed process leaves it
    Workplace(tmp_path / "out").close()
    assert isinstance(FileLock(tmp_path / "x"), FileLock)


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: Tensor


_DIGEST = """
import torch
from PIL import Image
from com_lightning.core.tensors.digest import digest
from tests.integration.results.test_journal import Slotted
print(digest([Slotted(torch.ones(2)), {"one", "two", "three"}, Image.new("L", (2, 2), 3)]))
"""


def test_data_have_the_same_digest_in_every_process() -> None:
    """Whatever the addresses of what they hold, and the order of sets."""
    found = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-W", "ignore", "-c", _DIGEST]
        root = Path(__file__).parents[3]
        found.add(subprocess.run(command, cwd=root, env=environment, capture_output=True, check=True).stdout)
    assert len(found) == 1


def test_objects_are_told_apart_by_content() -> None:
    jagged = torch.nested.nested_tensor
    pairs: list[tuple[Any, Any]] = [
        (Image.new("L", (2, 2), 3), Image.new("L", (2, 2), 4)),
        (Slotted(torch.ones(2)), Slotted(torch.zeros(2))),
        ({"one", "two"}, {"one", "three"}),
        (deque([torch.ones(2)]), deque([torch.zeros(2)])),
        (numpy.array([None, "a"], dtype=object), numpy.array([None, "b"], dtype=object)),
        (jagged([torch.ones(2)], layout=torch.jagged), jagged([torch.zeros(2)], layout=torch.jagged)),
        (torch.tensor([1j]).conj(), torch.tensor([1j])),
    ]
    for one, other in pairs:
        assert digest(one) == digest(copy.deepcopy(one)) != digest(other), one


def test_data_are_told_apart_by_content() -> None:
    def digest(*batches: Any, numbers: Any = None) -> dict[str, str]:
        tasks = [Task("a", Classifier(), batches, numbers=numbers)]
        return combined(tasks, [fingerprint_of_data(tasks)])

    batch = {"x": torch.arange(3), "text": ["one", "two"]}
    assert digest(batch) == digest(copy.deepcopy(batch))
    changed = [
        {"x": torch.arange(3), "text": ["one", "three"]},
        {"x": torch.arange(3).float(), "text": ["one", "two"]},
        {"x": torch.arange(1, 4), "text": ["one", "two"]},
        {"y": torch.arange(3), "text": ["one", "two"]},
    ]
    assert len({str(digest(part)) for part in (batch, *changed)}) == 5
    assert digest(batch, changed[0]) != digest(changed[0], batch)
    tasks = [[Task("a", Classifier(), [b], numbers=[n])] for n, b in enumerate((batch, changed[0]))]
    both = combined(tasks[0], [fingerprint_of_data(part) for part in reversed(tasks)])
    assert both == digest(batch, changed[0])  # whichever process had which
