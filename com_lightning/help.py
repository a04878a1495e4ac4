"""Help of the command line, from the docstrings, without importing PyTorch or Lightning: that takes many seconds."""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
import shutil
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path

from com_lightning.overlays import FOLDER, overlays

COMMANDS = {
    "merge": "merge experts into one model, save it, and validate every task",
    "compare": "merge the same experts by several rules, and write tables and pictures",
    "inspect": "show how far apart experts are, before anything is merged",
    "export": "write a result as a folder for transformers' from_pretrained",
    "configs": "list the configurations that --config finds by name",
    "completion": "print a script that completes commands and options in bash and zsh",
    "fit": "train a model, as in Lightning",
    "validate": "validate a model, or with --merged FOLDER every task of a merge",
    "test": "test a model, or with --merged FOLDER every task of a merge",
}
"""Subcommand -> what it does."""
_INPUTS = {
    "config": "YAML file with any of these options, or a name that `com-lightning configs` lists. It can be given "
    "several times; the later one wins.",
    "model": "class of your LightningModule, such as my_project.Classifier. Its options follow: --model.width 64",
    "data": "class of the data, com_lightning.MergeDataModule; --data.tasks.TASK names each task's datamodule",
    "trainer.OPTION": "any option of Lightning's Trainer, such as --trainer.accelerator cpu",
    "seed_everything": "seed of all random numbers",
    "method.help RULE": "explain the settings of a rule; they follow it: --method TIES --method.density 0.1",
    "print_config": "print a file with all settings, and end",
    "help_all": "explain the options of Lightning's Trainer, too",
}
_NOISE = (
    *("Parser key", "Does not validate", "Subtypes:", "Errors:", "Given value", "Problem with"),
    *("Expected a NoneType", "Expected a path"),
)
"""How lines of a parser's message begin that say nothing to a user."""
_ONLY_IN_PYTHON = {"model", "datamodule", "files", "self", "verbose", "experts_device"}


def overview() -> str:
    """The help of ``com-lightning`` itself."""
    rows = "".join(f"  {command:<12}{about}\n" for command, about in COMMANDS.items())
    return (
        "usage: com-lightning COMMAND [options]\n\n"
        "Merges fine-tuned checkpoints into one model, with PyTorch Lightning.\n\n"
        f"commands:\n{rows}\n"
        "com-lightning COMMAND --help explains the options of a command.\n"
        "com-lightning --version shows the version.\n"
    )


def configurations() -> str:
    """The names that ``--config`` takes, and what they choose."""
    found = overlays()
    width = max(map(len, found)) + 2
    rows = "".join(f"  {name:<{width}}{about}\n" for name, about in found.items())
    return f"configurations for --config NAME, after your own files:\n{rows}\nThe files are in {FOLDER}.\n"


def help_of(command: str) -> str:
    """The help of ``merge`` or ``compare``: its own options, then what it is given."""
    own, settings = _own_options(command), _settings(command)
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    rule = f"\nsettings of ChainOfMerges, the default method:\n{_rows(settings, width)}" if settings else ""
    return (
        f"usage: com-lightning {command} [--config FILE] [--OPTION VALUE]\n\n"
        f"{textwrap.fill(COMMANDS[command][0].upper() + COMMANDS[command][1:] + '.', width)}\n\n"
        f"options of {command}:\n{_rows(own, width)}{rule}\nmodel, data and trainer:\n{_rows(_INPUTS, width)}"
    )


def options_of(command: str) -> list[str]:
    """Names of all options that the help of ``merge`` or ``compare`` explains."""
    return [*_own_options(command), *_settings(command), *_INPUTS]


def _own_options(command: str) -> dict[str, str]:
    here = Path(__file__).parent
    options = _arguments(here / "trainer.py", "MergeTrainer", command)
    options.update(_arguments(here / "options.py", "MergeOptions", None, known=options))
    if command == "compare":  # the experts are always validated there
        options.pop("baselines", None)
    return options


def _settings(command: str) -> dict[str, str]:
    """The settings of the default method. ``compare`` takes rules as a list."""
    if command == "compare":
        return {}
    settings = _arguments(Path(__file__).parent / "methods" / "chain.py", "ChainOfMerges", "__init__")
    return {f"method.{name}": _first_sentence(text) for name, text in settings.items()}


def plain(text: str) -> str:
    """A text without the marks of RST, and without Python's words for classes."""
    text = re.sub(r":\w+:`~?([^`]*)`", lambda found: found[1].rpartition(".")[2], text)
    text = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", text)
    return text.replace("``", "")


def explained(message: str, known: Collection[str], files: Sequence[Path]) -> str:
    """What a parser says of an argument or a key, in at most three lines.

    Args:
        message: of the parser.
        known: names of the options.
        files: the configurations that were given.

    Returns:
        The key, the file and line that have it, and the nearest name.
    """
    if found := re.search(r"(?:accept option|Option|arguments:|choice:) '?(?:--)?([\w.]+)", message):
        name = found[1]
        within = re.findall(r"class_path '([\w.]+)'", message)
        owner = f"{within[-1].rpartition('.')[2]} has no option" if within else "there is no option"
        known = _parameters(within[-1]) if within else known
        if "choice:" in found[0]:
            owner, known = "there is no command", COMMANDS
        lines = [f"{owner} {name!r}"]
        lines[0] += _nearest(name, known)
    else:
        name = (re.search(r'Parser key "([\w.]+)"', message) or [""] * 2)[1]
        told = [line.strip(" -") for line in plain(message).splitlines()]
        said = [line for line in told if line and not line.startswith(_NOISE)]
        given = re.search(r"Given value: (.{1,60})$", message, re.MULTILINE)
        lines = [f"{name}: " * bool(name) + "; ".join(dict.fromkeys(said[:2])) if said else told[0]]
        lines[0] += f" (given: {given[1]})" if given else ""
    pieces = {piece for option in known for piece in option.split(".")}
    wanted = sorted(name.split("."), key=lambda piece: piece in pieces)
    if place := next((place for file in files for key in wanted if (place := _place(file, key))), ""):
        lines.append(f"  in {place}")
    return "\n".join(lines)


def _nearest(name: str, known: Collection[str]) -> str:
    # An option within an unknown one ("exprets.a") is told by the name of that.
    names = {option.partition(".")[0] for option in known} | set(known)
    for part in (name, name.partition(".")[0], name.rpartition(".")[2]):
        if part not in names and (nearest := difflib.get_close_matches(part, names, 1)):
            return f"; did you mean {nearest[0]!r}?"
    return f"; there are {', '.join(sorted(known))}" if len(known) < 20 else ""


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, TypeError, ValueError):  # the parser has told of it
        return []


def _place(file: Path, key: str) -> str:
    """File and line of a key in a configuration."""
    for number, line in enumerate(file.read_text("utf-8").splitlines() if file.is_file() else [], 1):
        if key and re.search(rf"(?<![\w.]){re.escape(key)}\s*:", line):
            return f"{file}, line {number}: {line.strip()}"
    return ""


def _arguments(file: Path, owner: str, method: str | None, known: dict[str, str] | None = None) -> dict[str, str]:
    """Name of an argument -> what its docstring says, with its default."""
    body = next(n for n in ast.parse(file.read_text("utf-8")).body if isinstance(n, ast.ClassDef) and n.name == owner)
    defaults: dict[str, str] = {}
    documented: ast.ClassDef | ast.FunctionDef = body
    if method is None:
        fields = [n for n in body.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        defaults = {ast.unparse(n.target): ast.unparse(n.value) for n in fields if n.value is not None}
    else:
        documented = next(n for n in body.body if isinstance(n, ast.FunctionDef) and n.name == method)
        names = [argument.arg for argument in documented.args.args]
        values = [ast.unparse(default) for default in documented.args.defaults]
        defaults = dict(zip(names[len(names) - len(values) :], values))
    texts = ast.get_docstring(documented) or ast.get_docstring(body) or ""
    section = re.split(r"\n\n\w+:\n", texts.partition("Args:\n")[2] + "\n\n")[0]
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    result = {}
    for name, text in found:
        if name in _ONLY_IN_PYTHON or name == "options" or name in (known or ()):
            continue
        default = defaults.get(name, "None").strip("'\"")
        shown = (
            ""
            if default in ("None", "")
            else f" (default: {default.replace('True', 'true').replace('False', 'false')})"
        )
        result["experts.TASK" if name == "experts" else name] = plain(" ".join(text.split())) + shown
    return result


def _first_sentence(text: str) -> str:
    """The first sentence of what a docstring says, and the default."""
    said, found, default = text.partition(" (default: ")
    said = re.sub(r" \((?:beyond the paper|l above)[^)]*\)", "", said)
    return re.split(r"\.(?: |$)", said)[0] + "." + found + default


def _rows(options: dict[str, str], width: int) -> str:
    rows = []
    for name, text in options.items():
        body = textwrap.fill(text, width, initial_indent=" " * 22, subsequent_indent=" " * 22)
        first = f"  --{name}"
        rows.append(first.ljust(22) + body[22:] if len(first) < 21 else f"{first}\n{body}")
    return "\n".join(rows) + "\n"
