"""What a merge leaves behind: the folder, its files, and the report."""

from __future__ import annotations

import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file

import com_lightning.results.folder
from com_lightning import (
    ChainOfMergesCallback,
    MergeDataModule,
    MergeError,
)
from com_lightning.core.tensors.modules import named_tensors, tied_names
from com_lightning.results.folder import are_alike, load_results, output_problems, save_results
from tests.helpers import Classifier, make_data, perturb
from tests.helpers.folders import merge

FILES = {"a.ckpt", "b.ckpt", "merged.safetensors", "README.md"} | {
    f"report.{kind}" for kind in ("json", "md", "html", "png")
}


class TiedClassifier(Classifier):
    """The head is the last layer of the body."""

    def __init__(self) -> None:
        super().__init__(8)
        self.save_hyperparameters()
        self.head.weight = self.body.get_submodule("3").weight  # type: ignore[assignment]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[ChainOfMergesCallback, Path]:
    """A merge and the folder it left; not to be changed."""
    folder = tmp_path_factory.mktemp("results") / "new" / "merged"
    return merge(folder), folder


Result = tuple[ChainOfMergesCallback, Path]


# The folder


def test_the_files(result: Result) -> None:
    callback, folder = result
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    assert (folder / "report.md").read_text() == callback.report.to_markdown()
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")


def test_others_may_read_the_files(result: Result) -> None:
    for path in (result[1], *result[1].iterdir()):
        assert path.stat().st_mode & 0o044 == 0o044, path


def test_the_safetensors_file_holds_the_shared_tensors(result: Result) -> None:
    callback, folder = result
    tensors = load_file(folder / "merged.safetensors")
    shared = [n for n, what in callback.report.parameters.items() if not what.status.startswith("private")]
    assert sorted(tensors) == sorted(shared)
    for module in callback.modules.values():
        values = {name: tensor for name, tensor, _ in named_tensors(module)}
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, values[name].detach(), rtol=0, atol=0)


def test_checkpoints_are_what_was_validated(result: Result, tmp_path: Path) -> None:
    """In a fresh process, by ``load_from_checkpoint`` and by ``trainer.validate(ckpt_path=...)``."""
    callback, folder = result
    script = """
import json, sys
from com_lightning.compat import LOADS_SAFELY
from tests.helpers import Classifier, make_data, quiet_trainer
safe = {"weights_only": True} if LOADS_SAFELY else {}
found = {}
for task, classes, seed in (("a", 3, 0), ("b", 4, 1)):
    path = f"{sys.argv[1]}/{task}.ckpt"
    module, data = Classifier.load_from_checkpoint(path, weights_only=True), make_data(seed, classes)
    loaded = quiet_trainer().validate(module, datamodule=data, verbose=False)
    by_path = quiet_trainer().validate(Classifier(classes), datamodule=data, ckpt_path=path, verbose=False, **safe)
    found[task] = [loaded[0], by_path[0], module.hparams.classes, all(p.requires_grad for p in module.parameters())]
print("FOUND" + json.dumps(found))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.split("FOUND")[1])
    for task, classes in (("a", 3), ("b", 4)):
        loaded, by_path, hparam, trainable = found[task]
        assert loaded == by_path == callback.report.metrics["merged"][task]
        assert hparam == classes
        assert trainable


def test_results_are_loaded_again(result: Result) -> None:
    callback, folder = result
    modules = load_results(folder, Classifier(), ["a", "b"])
    for task, module in callback.modules.items():
        torch.testing.assert_close(modules[task].state_dict(), module.state_dict(), rtol=0, atol=0)


def test_results_can_be_merged_again(result: Result) -> None:
    """What is written is a source: merging a merge changes next to nothing, as its experts are the same."""
    callback, folder = result
    again = merge(experts={task: str(folder / f"{task}.ckpt") for task in "ab"})
    for task, module in callback.modules.items():
        torch.testing.assert_close(again.modules[task].state_dict(), module.state_dict(), rtol=1e-3, atol=1e-4)


def test_results_that_are_missing(result: Result, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match=r"no such file; .* has results for a, b") as caught:
        load_results(result[1], Classifier(), ["a", "x", "y"])
    assert len(caught.value.problems) == 2
    (tmp_path / "a.ckpt").write_bytes(b"nothing")
    with pytest.raises(MergeError, match="not a readable checkpoint") as caught:
        load_results(tmp_path, Classifier(), ["a", "x"])
    assert len(caught.value.problems) == 2
    with pytest.raises(MergeError, match="has results for no task"):
        load_results(tmp_path / "none", Classifier(), ["a"])


def test_saving_later_gives_the_same(result: Result, tmp_path: Path) -> None:
    callback, folder = result
    callback.save(tmp_path / "later")
    assert {path.name for path in (tmp_path / "later").iterdir()} == FILES
    assert (tmp_path / "later" / "report.json").read_text() == (folder / "report.json").read_text()


def test_further_files(result: Result, tmp_path: Path) -> None:
    callback, _ = result
    shared = ["body.0.weight"]
    save_results(tmp_path / "x", callback.modules, shared, callback.report, files={"config.yaml": "seed: ü\n"})
    assert (tmp_path / "x" / "config.yaml").read_text(encoding="utf-8") == "seed: ü\n"
    assert list(load_file(tmp_path / "x" / "merged.safetensors")) == shared


def test_tasks_that_differ_in_nothing_have_one_checkpoint(tmp_path: Path) -> None:
    """Eight language models with one head would be eight files of the same content."""
    callback = merge(tmp_path / "out")  # each task has its own head
    assert {path.name for path in (tmp_path / "out").glob("*.ckpt")} == {"a.ckpt", "b.ckpt"}
    assert not are_alike(callback.modules)
    alike = {task: copy.deepcopy(callback.modules["a"]) for task in "ab"}
    save_results(tmp_path / "one", alike, [], callback.report)
    assert {path.name for path in (tmp_path / "one").glob("*.ckpt")} == {"merged.ckpt"}
    for module in load_results(tmp_path / "one", alike["a"], ["a", "b"]).values():
        torch.testing.assert_close(module.state_dict(), alike["a"].state_dict(), rtol=0, atol=0)
    alike["b"].hparams["classes"] = 99  # what another task would be loaded with
    assert not are_alike(alike)


def test_tied_tensors_are_written_once(tmp_path: Path) -> None:
    """Safetensors refuses shared memory; the checkpoints keep both names."""
    base = TiedClassifier()
    state = base.state_dict()
    experts: dict[str, LightningModule] = {}
    for number, task in enumerate("ab"):
        experts[task] = TiedClassifier()
        experts[task].load_state_dict(state)
        perturb(experts[task], 0.2, seed=number)
    tasks = MergeDataModule({"a": make_data(0, 8), "b": make_data(1, 8)}, num_samples=24)
    callback = merge(tmp_path / "out", experts, TiedClassifier(), tasks)
    tensors = load_file(tmp_path / "out" / "merged.safetensors")
    assert "body.3.weight" in tensors
    assert "head.weight" not in tensors
    for task, module in load_results(tmp_path / "out", TiedClassifier(), ["a", "b"]).items():
        assert tied_names(module)["head.weight"] == "body.3.weight"
        torch.testing.assert_close(module.state_dict(), callback.modules[task].state_dict(), rtol=0, atol=0)
    files = dict.fromkeys("ab", str(tmp_path / "out" / "merged.ckpt"))  # tied tensors are all there is
    again = merge(experts=files, model=TiedClassifier(), tasks=tasks)
    assert tied_names(again.modules["a"])["head.weight"] == "body.3.weight"
    source: Any = str(tmp_path / "out" / "merged.safetensors")
    merge(experts={"a": source, "b": source}, model=TiedClassifier(), tasks=tasks)


# Whole or not at all


def fail(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["save_figure", "save_file", "_save_checkpoint"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing(
    function: str, existing: bool, result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at the target nor beside it; what is to be overwritten is left as it was."""
    callback, _ = result
    folder = tmp_path / "out"
    if existing:
        folder.mkdir()
        (folder / "report.json").write_text("old")
    monkeypatch.setattr(com_lightning.results.folder, function, fail)
    with pytest.raises(MergeError, match=r"could not be written .*No space left"):
        callback.save(folder, overwrite=existing)
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if existing else [])
    if existing:
        assert [path.name for path in folder.iterdir()] == ["report.json"]


def test_an_error_in_the_middle_leaves_nothing(result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(com_lightning.results.folder, "save_figure", stop)
    with pytest.raises(KeyboardInterrupt):
        result[0].save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_last_step_restores_the_old_folder(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, replace = tmp_path / "out", os.replace
    folder.mkdir()
    (folder / "report.json").write_text("old")

    def fail_once(source: Any, target: Any) -> None:
        if (Path(source) / "merged.safetensors").exists():
            fail()
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with pytest.raises(MergeError, match="could not be written"):
        result[0].save(folder, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / "report.json").read_text() == "old"


def test_a_folder_that_is_no_result_is_never_overwritten(result: Result, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(MergeError, match="is not the result of a merge"):
        result[0].save(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_an_old_folder_is_replaced_whole(result: Result, tmp_path: Path) -> None:
    callback, folder = result
    shutil.copytree(folder, tmp_path / "out")
    (tmp_path / "out" / "removed.ckpt").touch()
    with pytest.raises(MergeError, match="exists already; remove it, name another, or set overwrite"):
        callback.save(tmp_path / "out")
    assert (tmp_path / "out" / "removed.ckpt").exists()
    callback.save(tmp_path / "out", overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_result_that_cannot_be_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole callback, into a folder that is to be overwritten."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "report.json").write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(com_lightning.results.folder, "save_figure", fail)
        with pytest.raises(MergeError, match="could not be written"):
            merge(folder, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial", "out"]
    assert [path.name for path in folder.iterdir()] == ["report.json"]
    report = merge(folder, overwrite=True).report
    assert report.resumed == len(report.layers) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        assert output_problems(tmp_path / "out", False)[0].endswith("cannot be written to")
    finally:
        tmp_path.chmod(0o755)


def test_a_parent_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the merge, not after it."""

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(MergeError) as caught:
        merge(tmp_path / "out", experts={"a": Classifier()})
    assert f"output_dir: {tmp_path} cannot be written to" in caught.value.problems


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert output_problems(tmp_path / "file" / "out", False)[0].startswith(f"output_dir: {tmp_path / 'file'} cannot")


def test_checking_the_target_leaves_nothing(tmp_path: Path) -> None:
    assert output_problems(tmp_path / "out", False) == []
    assert list(tmp_path.iterdir()) == []


def test_hyperparameters_that_have_no_truth_value_are_compared_by_content() -> None:
    one, other = Classifier(3), Classifier(3)
    other.load_state_dict(one.state_dict())
    for module in (one, other):
        module.hparams.update(weights=torch.ones(3), table=numpy.arange(4))
    assert are_alike({"a": one, "b": other})
    other.hparams["weights"] = torch.zeros(3)
    assert not are_alike({"a": one, "b": other})
