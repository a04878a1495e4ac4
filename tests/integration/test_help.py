"""Help and version at once, and errors of the command line in a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from com_lightning import __version__
from com_lightning.cli import MergeCLI, main
from com_lightning.completion import completion
from com_lightning.help import COMMANDS, explained, help_of, plain
from tests.helpers.commands import MODEL


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--help"], "with PyTorch Lightning"),
        (["--version"], __version__),
        (["merge", "--help"], "--output_dir"),
        (["compare", "-h"], "--methods"),
        (["configs"], "\n  accurate  "),
        (["completion"], "complete -o default -F _com_lightning com-lightning"),
    ],
)
def test_help_needs_neither_pytorch_nor_lightning(arguments: list[str], shown: str) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['torch', 'lightning', 'jsonargparse']))\n"
        "from com_lightning.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_the_overview_has_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out
    assert set(COMMANDS) == {*MergeCLI.subcommands(), "inspect", "export", "configs", "completion"}
    assert all(f"\n  {command} " in shown for command in COMMANDS)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"com_lightning {__version__}\n"


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("com", {"compare", "completion"}),
        ("merge --off", {"--offload"}),
        ("merge --method.rid", {"--method.ridge"}),
        ("compare --method", {"--method", "--method.help", "--methods"}),
        ("merge --exp", {"--experts"}),
        ("merge --config acc", {"accurate"}),
        ("inspect --pri", {"--private"}),
        ("export --ran", {"--rank"}),
        ("validate --mer", {"--merged"}),
        ("fit --mer", set()),
    ],
)
def test_completion(typed: str, completed: set[str]) -> None:
    words = " ".join(["com-lightning", typed])
    ask = f'COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _com_lightning; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", f"{completion()}\n{ask}"], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == completed
    assert not done.stderr


@pytest.mark.parametrize("command", ["merge", "compare"])
def test_the_long_help_has_the_same_options_first(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    short = help_of(command)
    with pytest.raises(SystemExit):
        main([command, "--help_all"])
    long = capsys.readouterr().out
    names = [line.split()[0].partition(".")[0] for line in short.splitlines() if line.startswith("  --")]
    assert all(name in long for name in names if name != "--help_all")
    assert long.index("--output_dir") < long.index("--trainer.accelerator ")
    for text in (short, long):
        assert not [mark for mark in ("``", ":class:", ":meth:", "<class", "object at") if mark in text]


def test_marks_of_rst_and_names_of_classes_are_left_out() -> None:
    assert plain("a :class:`~a.b.C`, ``x``, <class 'a.b.D'>") == "a C, x, D"


DENSITY = "TIES has no option 'densty'; did you mean 'density'?"
TYPOS = {
    "num_sampels: 3": ("MergeDataModule has no option 'num_sampels'; did you mean 'num_samples'?", "line 5"),
    "exprets: {a: x}": ("there is no option 'exprets.a'; did you mean 'experts'?", "line 7"),
    "memory_budget: much": ("memory_budget: Expected a float", "line 7"),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_told_with_file_line_and_nearest_name(
    typo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, outer = (typo, "overwrite: true") if "sampels" in typo else ("seed: 1", typo)
    config = tmp_path / "merge.yaml"
    config.write_text(
        f"model: tests.helpers.Classifier\ndata:\n  class_path: com_lightning.MergeDataModule\n  init_args:\n"
        f"    {inner}\n    tasks: {{a: tests.helpers.PointsData}}\n{outer}\n"
    )
    arguments = ["merge", f"--config={config}"]
    monkeypatch.setattr("sys.argv", ["com-lightning", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr().err.splitlines()
    what, line = TYPOS[typo]
    assert ended.value.code == 2
    assert told[0].startswith(f"com-lightning: {what}")
    assert told[1] == f"  in {config}, {line}: {typo}"
    assert len(told) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["merg"], "there is no command 'merg'; did you mean 'merge'?"),
        (["merge", "--methodd", "TIES"], "there is no option 'methodd'; did you mean 'method'?"),
        (
            ["merge", *MODEL, "--method=TIES", "--method.densty=3"],
            DENSITY,
        ),
    ],
)
def test_a_wrong_argument_is_told_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert capsys.readouterr().err == f"com-lightning: {told}\n"


def test_a_message_of_another_kind_stays() -> None:
    assert explained("the following arguments are required: merge.model", [], []) == (
        "the following arguments are required: merge.model"
    )
