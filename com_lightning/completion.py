"""Completion for the shell: commands, their options, and the names of configurations."""

from __future__ import annotations

import re
from pathlib import Path

from com_lightning.help import COMMANDS, options_of
from com_lightning.overlays import overlays

SCRIPT = """\
# Completes com-lightning in bash, and in zsh after `autoload -U bashcompinit && bashcompinit`.
_com_lightning() {
    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD - 1]}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="%(commands)s"
    elif [ "$before" = --config ]; then
        words="%(configurations)s $(compgen -f -- "$word")"
    else
        case "${COMP_WORDS[1]}" in
%(cases)s
        esac
    fi
    COMPREPLY=($(compgen -W "$words" -- "$word"))
}
complete -o default -F _com_lightning com-lightning
"""
_LIGHTNINGS = ("--config", "--model", "--data", "--trainer", "--seed_everything", "--print_config", "--help")


def completion() -> str:
    """The script for bash. It is made without importing PyTorch or Lightning."""
    cases = [f'            {command}) words="{" ".join(_options(command))}" ;;' for command in sorted(COMMANDS)]
    names = {"commands": " ".join(sorted(COMMANDS)), "configurations": " ".join(overlays())}
    return SCRIPT % {**names, "cases": "\n".join(cases)}


def _options(command: str) -> list[str]:
    if command in ("merge", "compare"):
        # An option that ends in a name of the user's, such as --experts.TASK, is completed up to it.
        names = {re.split(r"[.\s][A-Z]", name)[0] for name in options_of(command)}
        return sorted({f"--{name}" for name in names} | {"--help"})
    if command in ("inspect", "export"):
        source = (Path(__file__).parent / "cli.py").read_text("utf-8")
        own = source.partition(f"def run_{command}(")[2].partition("\ndef ")[0]
        return sorted({*re.findall(r'add_argument\(\s*"(--\w+)"', own), "--help"})
    if command in ("fit", "validate", "test"):
        return sorted([*_LIGHTNINGS, *["--merged"] * (command != "fit")])
    return []
