"""The command line: every shipped configuration, and what a user sees when something is wrong."""

from __future__ import annotations

import functools
import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from com_lightning import ChainOfMerges, MergeOptions
from com_lightning.cli import MergeCLI, main
from com_lightning.compat import RENAMED_OPTIONS
from com_lightning.trainer import MergeTrainer
from tests.helpers import Classifier, PointsData
from tests.helpers.commands import DATA, MODEL, QUIET, expert_files

ROOT = Path(__file__).parents[2]


@pytest.fixture
def experts(tmp_path: Path) -> list[str]:
    return expert_files(tmp_path)


@pytest.mark.parametrize("kind", ["ChainOfMerges", "Average"])
def test_merge_then_validate_and_test(
    kind: str, experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the same samples: without those that a merge was calibrated on, if it was."""
    folder, calibrates = tmp_path / "merged", kind == "ChainOfMerges"
    common = [*MODEL, *DATA, "--data.num_samples=20", *QUIET]
    main(["merge", *common, *experts, f"--method={kind}", f"--output_dir={folder}"])
    out = capsys.readouterr().out
    assert "| mean |" in out
    assert str(folder) in out
    assert ("(held out of validation)" in out) == calibrates
    report = json.loads((folder / "report.json").read_text())
    assert report["held_out"] == (dict.fromkeys("ab", True) if calibrates else {})
    main(["validate", *common, f"--merged={folder}"])
    shown = capsys.readouterr().out
    assert ("The calibration samples of a, b were left out." in shown) == calibrates
    for task in "ab":
        assert f"{report['metrics']['merged'][task]['val_acc']:.4f}" in shown
    main(["test", *common, f"--merged={folder}"])
    assert "test_acc" in capsys.readouterr().out


def test_with_offloaded_layers_the_model_is_built_without_memory(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same, and so are its hyperparameters. Other commands build the model as usual."""
    built, common = list[Any](), [*MODEL, *DATA, *QUIET]
    original = MergeTrainer.merge

    @functools.wraps(original)
    def merge(self: MergeTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        built.append({parameter.is_meta for parameter in model.parameters()})
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(MergeTrainer, "merge", merge)
    for name in ("null", "layers"):
        main(["merge", *common, *experts, f"--offload={name}", f"--output_dir={tmp_path / name}"])
    MergeCLI(Classifier, args=["merge", *MODEL[1:], *DATA, *QUIET, *experts, "--offload=layers"])
    assert built == [{False}, {True}, {True}]
    one, other = (torch.load(tmp_path / name / "a.ckpt", weights_only=True) for name in ("null", "layers"))
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    assert one["hyper_parameters"] == other["hyper_parameters"]
    main(["validate", *common, f"--merged={tmp_path / 'layers'}"])


def test_datamodules_of_tasks_keep_their_own_hyperparameters(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LightningCLI would give them those of the MergeDataModule around them."""
    data = [argument.replace("PointsData", "SavedPointsData") for argument in DATA]
    main(["merge", *MODEL, *data, *QUIET, *experts, f"--output_dir={tmp_path / 'merged'}"])
    assert "'classes': 4" in capsys.readouterr().out


def test_validating_tasks_without_a_merge_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="only the first task, 'a', is validated"):
        main(["validate", *MODEL, *DATA, *QUIET])


def test_the_resolved_config_runs_again_and_gives_the_same(experts: list[str], tmp_path: Path) -> None:
    main(["merge", *MODEL, *DATA, *QUIET, *experts, f"--output_dir={tmp_path / 'one'}", "--method=RegMean"])
    main(["merge", f"--config={tmp_path / 'one' / 'config.yaml'}", f"--output_dir={tmp_path / 'two'}"])
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]
    assert two["method"]["class"] == "RegMean"


def test_old_names_of_options_work_with_a_warning(experts: list[str], tmp_path: Path) -> None:
    rule = "{class_path: com_lightning.ChainOfMerges, init_args: {balance: worst, refit_private: true}}"
    (tmp_path / "rule.yaml").write_text(f"metric: val_loss\nexperts_device: cpu\nmethod: {rule}\n")
    (tmp_path / "outer.yaml").write_text("merge: {grow_vocabulary: true}\n")
    data = [*DATA[:1], "--data.samples", "24", "--data.init_args.source=val", *DATA[2:]]
    arguments = [*MODEL, *data, *QUIET, *experts, "--no_resume", f"--config={tmp_path / 'rule.yaml'}"]
    with pytest.warns(FutureWarning) as caught:
        main([f"--config={tmp_path / 'outer.yaml'}", "merge", *arguments, f"--output_dir={tmp_path / 'out'}"])
    old = {str(warning.message).split()[2].partition("=")[0] for warning in caught if "is now" in str(warning.message)}
    assert old == set(RENAMED_OPTIONS) - {"offload_experts"}  # a newer name of what was experts_device
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (config["monitor"], config["resume"], config["offload"]) == ("val_loss", False, "experts")
    assert config["resize_embeddings"] is True
    assert (config["data"]["init_args"]["num_samples"], config["data"]["init_args"]["split"]) == (24, "val")
    assert config["method"]["init_args"]["refit_heads"] is config["method"]["init_args"]["balance"] is True


def test_print_config_gives_a_file_that_runs(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["merge", *MODEL, *DATA, *QUIET, *experts, f"--output_dir={tmp_path / 'merged'}", "--print_config"])
    config = tmp_path / "config.yaml"
    config.write_text(capsys.readouterr().out)
    main(["merge", f"--config={config}"])
    assert (tmp_path / "merged" / "merged.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {"refit_heads": True, "ridge": 0.01}),
        (["--method.refit_heads=false"], {"refit_heads": False, "ridge": 0.01}),
        (["--config={file}"], {"refit_heads": True, "ridge": 0.5}),
        (["--method=TIES"], {"density": 0.2}),
        (["--method=TIES", "--method.density=0.1"], {"density": 0.1}),
    ],
)
def test_settings_of_the_default_method_need_no_name(
    arguments: list[str],
    expected: dict[str, Any],
    experts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "ridge.yaml"
    file.write_text("method: {init_args: {ridge: 0.5}}")
    given = [argument.format(file=file) for argument in arguments]
    with pytest.raises(SystemExit):
        main(["merge", *MODEL, *DATA, *QUIET, *experts, *given, "--print_config"])
    method = yaml.safe_load(capsys.readouterr().out)["method"]
    assert method["class_path"].endswith("TIES" if "density" in expected else "ChainOfMerges")
    assert {name: method["init_args"][name] for name in expected} == expected


def test_the_help_has_the_settings_of_the_default_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name in inspect.signature(ChainOfMerges).parameters:
        assert f"--method.{name} " in words
    for noise in ("beyond the paper", "``", ".. "):
        assert noise not in words


def test_dry_run_reads_and_writes_nothing(
    experts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["merge", *MODEL, *DATA, *QUIET, *experts, f"--output_dir={tmp_path / 'merged'}", "--dry_run"])
    out = capsys.readouterr().out
    assert "solved: linear" in out
    assert "private to b: head.weight, head.bias" in out
    assert "Memory: at least" in out
    assert not (tmp_path / "merged").exists()


def test_all_problems_at_once_and_no_traceback(experts: list[str], tmp_path: Path) -> None:
    arguments = [*MODEL, *DATA, *QUIET, "--experts.a=nowhere.ckpt", "--experts.c=neither.ckpt", "--private=[nothing]"]
    with pytest.raises(SystemExit) as caught:
        main(["merge", *arguments, f"--output_dir={tmp_path}"])
    message = str(caught.value)
    for part in (
        "(nowhere.ckpt): no such file",
        "(neither.ckpt): no such file",
        "no data for c",
        "no expert for b",
        "exists",
    ):
        assert part in message


def test_fit_validate_without_a_merge(tmp_path: Path) -> None:
    arguments = [*MODEL, "--data=tests.helpers.PointsData", *QUIET, f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *arguments, "--trainer.max_steps=1", "--trainer.limit_val_batches=1"])
    main(["validate", *arguments])


@pytest.mark.parametrize("arguments", [["--help"], ["merge", "--help"], ["validate", "--help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    out = capsys.readouterr().out
    assert "merge" in out.lower()
    assert "scheduler" not in out.replace("lr_scheduler_step", "")


@pytest.mark.parametrize("subcommand", ["merge", "compare"])
def test_help_explains_every_option(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([subcommand, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    absent = {"files", "baselines"} if subcommand == "compare" else {"files"}
    for option in fields(MergeOptions):
        assert (f"--{option.name} " in words) == (option.name not in absent), option.name
    assert "keep a record of merged layers beside output_dir" in words
    assert "--verbose" not in words


@pytest.mark.parametrize("command", [["-m", "com_lightning"], ["com-lightning"]])
def test_both_ways_to_start(command: list[str]) -> None:
    program = [sys.executable, *command] if command[0] == "-m" else [str(Path(sys.executable).parent / command[0])]
    result = subprocess.run([*program, "--help"], capture_output=True, text=True, check=True)
    assert "merge experts into one model" in result.stdout


OVERLAYS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_merges(overlay: Path, experts: list[str], tmp_path: Path) -> None:
    arguments = [*MODEL, *DATA, *QUIET, *experts, f"--config={overlay}", f"--output_dir={tmp_path / 'merged'}"]
    torch.manual_seed(0)  # what make_experts starts from
    torch.save(Classifier().state_dict(), tmp_path / "base.pt")
    arguments.append(f"--base={tmp_path / 'base.pt'}")
    main(["merge", *arguments, "--trainer.accelerator=cpu", "--trainer.devices=1"])  # others would run pytest again
    assert (tmp_path / "merged" / "report.json").is_file()


def _with_outputs_in(folder: Path, config: Path) -> Path:
    """A copy of a demo configuration that reads and writes in a test's own folder."""
    copy = folder / config.name
    copy.write_text(config.read_text().replace("outputs/digits", str(folder)))
    return copy


def test_the_demo_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` of the base and of each expert for a few steps, `merge`, `validate`: the demo in small."""
    monkeypatch.chdir(ROOT)
    configs = {path.stem: _with_outputs_in(tmp_path, path) for path in (ROOT / "configs" / "digits").glob("*.yaml")}
    short: list[Any] = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.limit_val_batches=1"]
    small = ["--model.num_layers=2", "--model.hidden_size=16"]
    main(["fit", f"--config={configs['base']}", *short, *small])
    tasks = list(yaml.safe_load(configs["tasks"].read_text())["data"]["init_args"]["tasks"])
    for task in tasks:
        name = f"--trainer.callbacks.init_args.filename={task}"
        main(["fit", f"--config={configs['expert']}", f"--data.task={task}", name, *short, *small])
        assert (tmp_path / f"{task}.ckpt").is_file()
    both = [f"--config={configs['tasks']}", *small, "--data.num_samples=8", *QUIET]
    main(["merge", *both, f"--config={configs['merge']}", f"--output_dir={tmp_path / 'merged'}"])
    main(["validate", *both, f"--merged={tmp_path / 'merged'}"])
    assert torch.load(tmp_path / "merged" / f"{tasks[0]}.ckpt", weights_only=True)["state_dict"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"model: [1, 2\n", "config: no YAML that can be read: .*expected"), (b"\xff\xfe\x00a", "is not UTF-8 text")],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_a_configuration_that_cannot_be_read(content: bytes, message: str, form: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        main(["merge", *form.format(path).split()])


def test_numbers_that_are_none_are_told_in_words(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PointsData.val_dataloader

    def broken(self: PointsData) -> Any:
        loader = original(self)
        loader.dataset.tensors[0][:] = float("nan")
        return loader

    monkeypatch.setattr(PointsData, "val_dataloader", broken)
    with pytest.raises(SystemExit, match=r"com-lightning: the inputs of layer 'body\.0' hold NaN"):
        main(["merge", *MODEL, *DATA, *QUIET, *experts, f"--output_dir={tmp_path / 'merged'}"])


def test_what_cannot_be_tested_is_told_at_once(
    experts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["merge", *MODEL, *DATA, *QUIET, *experts, f"--output_dir={tmp_path / 'merged'}", "--method=Average"])
    monkeypatch.setattr(PointsData, "test_dataloader", lambda self: None)
    monkeypatch.delattr(Classifier, "test_step")
    with pytest.raises(SystemExit) as caught:
        main(["test", *MODEL, *DATA, *QUIET, f"--merged={tmp_path / 'merged'}"])
    assert str(caught.value).splitlines() == [
        "com-lightning: 3 problems:",
        "  1. model: Classifier has no test_step, which `test` runs; add one",
        "  2. task 'a': its datamodule gives no test loader; `test` needs one",
        "  3. task 'b': its datamodule gives no test loader; `test` needs one",
    ]
    with pytest.raises(SystemExit, match="No `test_step"):  # Lightning's own words
        main(["test", *MODEL, *DATA, *QUIET])


@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_a_configuration_that_is_no_file_is_not_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(10 * 2**30)  # takes no room on the disk
    with pytest.raises(SystemExit, match=r"is not a file|has 10,737,418,240 bytes"):
        main(["merge", f"--config={path}"])


@pytest.mark.parametrize("name", ["x" * 5000, "/".join(["x" * 200] * 30), "a\0b"])
def test_names_that_no_file_can_have_are_told(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    for arguments in (
        ["inspect", name, "x.pt"],
        ["inspect", "x.pt", "x.pt", "--base", name],
        ["export", name, "--output_dir", str(tmp_path / "out")],
        ["export", "x.pt", "--base", name, "--output_dir", str(tmp_path / "out")],
        ["export", "x.pt", "--output_dir", name],
        ["merge", "--config", name],
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code
