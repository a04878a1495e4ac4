"""The command line: Lightning's own, with ``merge`` and ``compare``; and ``inspect`` and ``export``."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, _InstantiatorFn

from com_lightning import __version__
from com_lightning.analysis.inspection import MOST, inspect, save
from com_lightning.answers import answer
from com_lightning.compat import RENAMED_OPTIONS, with_new_names
from com_lightning.core.sweep.distributed import PeerError
from com_lightning.core.sweep.task import NonFiniteError
from com_lightning.core.tensors.allocator import keep_freed_memory
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.errors import MergeError, paths_told, reason
from com_lightning.experts.construction import without_memory
from com_lightning.experts.files import LONGEST_JSON
from com_lightning.help import explained, plain
from com_lightning.overlays import given_configs, with_config_paths
from com_lightning.results.adapter_export import export_adapters, export_lora
from com_lightning.results.export import PRECISIONS, export
from com_lightning.trainer import MergeTrainer

_OURS = {"ChainOfMerges", "ChainOfMergesCallback", "MergeDataModule"}
_DEFAULT_METHOD = "com_lightning.ChainOfMerges"
_NEW = {renamed.new for renamed in RENAMED_OPTIONS.values()}


class _Parser(LightningArgumentParser):
    """Understands old names of options in arguments and configurations, and warns of them."""

    def parse_args(self, args: Any = None, *others: Any, **kwargs: Any) -> Any:
        given = with_config_paths(sys.argv[1:] if args is None else args)
        return super().parse_args(given if args is None else self._new_arguments(given), *others, **kwargs)

    def _load_config_parser_mode(self, content: str, *others: Any, **kwargs: Any) -> Any:
        try:
            given = yaml.safe_load(content)
        except yaml.YAMLError as error:
            raise MergeError([f"config: no YAML that can be read: {' '.join(str(error).split())}"]) from error
        if isinstance(given, dict):
            config = with_new_names(_new_init_args(given), {action.dest for action in self._actions})
            for subcommand in ("merge", "compare"):
                if isinstance(config.get(subcommand), dict):
                    config[subcommand] = with_new_names(config[subcommand], _NEW)
            content = content if config == given else yaml.safe_dump(config)
        return super()._load_config_parser_mode(content, *others, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the key, the file and the nearest name, in place of all options."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        known = {option[2:] for action in parser._actions for option in action.option_strings if option[:2] == "--"}
        sys.stderr.write(f"com-lightning: {explained(message, known - {'help'}, given_configs(sys.argv))}\n")
        self.exit(2)

    def format_help(self, formatter: Any = None) -> str:
        return plain(super().format_help(formatter))

    def _new_arguments(self, args: list[str]) -> list[str]:
        known = {action.dest for action in self._actions}
        tasks = "experts" in known or any("MergeDataModule" in arg or arg.startswith("--merged") for arg in args)
        taken = {"": known, "method": {"refit_heads", "balance"}, "data": {"num_samples", "split"} if tasks else set()}
        result = []
        while args:
            option, equals, value = (argument := args.pop(0)).partition("=")
            prefix, dot, name = option.removeprefix("--").rpartition(".")
            names = taken.get(prefix.removesuffix(".init_args"), set())
            if not option.startswith("--") or name not in RENAMED_OPTIONS or {RENAMED_OPTIONS[name].new} - names:
                result.append(argument)
                continue
            if not equals:
                value = args.pop(0) if args and not args[0].startswith("--") else "true"
            ((name, new),) = with_new_names({name: yaml.safe_load(value)}, names, stacklevel=3).items()
            result.append(f"--{prefix}{dot}{name}={value if isinstance(new, str) else yaml.safe_dump(new).split()[0]}")
        return result


def _new_init_args(config: Any) -> Any:
    """Translate the options of our classes, wherever in a configuration they are."""
    if isinstance(config, list):
        return [_new_init_args(entry) for entry in config]
    if not isinstance(config, dict):
        return config
    config = {name: _new_init_args(value) for name, value in config.items()}
    if str(config.get("class_path")).rpartition(".")[2] in _OURS and isinstance(config.get("init_args"), dict):
        config["init_args"] = with_new_names(config["init_args"], _NEW)
    return config


class MergeCLI(LightningCLI):
    """``LightningCLI`` with the subcommands ``fit``, ``merge``, ``compare``, ``validate`` and ``test``.

    Model and data are any LightningModule and LightningDataModule, named by ``class_path``; a project of one model can
    fix its class: ``MergeCLI(MyModule)``.
    """

    def __init__(self, model_class: Any = LightningModule, datamodule_class: Any = LightningDataModule, **kwargs: Any):
        defaults = {
            "trainer_class": MergeTrainer,
            "parser_class": _Parser,
            "subclass_mode_model": model_class is LightningModule,
            "save_config_kwargs": {"overwrite": True},
            "auto_configure_optimizers": False,
        }
        # `None` is any datamodule, or none: a merge may need no data.
        datamodule_class = None if datamodule_class is LightningDataModule else datamodule_class
        super().__init__(model_class, datamodule_class, **{**defaults, **kwargs})

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "merge": {"model", "datamodule", "files"},
            "compare": {"model", "datamodule", "files"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule"},
        }

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        for action in parser._actions:  # so that a flag can be given without a value: `--dry_run`
            if action.dest in self._subcommand_method_arguments[subcommand] and action.default is False:
                action.nargs, action.const = "?", True
        if subcommand == "merge":  # so that its settings can be given alone, and are shown: `--method.ridge 0.1`
            parser.set_defaults(method={"class_path": _DEFAULT_METHOD})
        # Its own options come first, and Lightning's last.
        parser._action_groups = sorted(parser._action_groups, key=lambda group: "Trainer" in (group.title or ""))
        parser.usage = f"com-lightning {subcommand} [--config FILE] [--OPTION VALUE]"
        return parser

    def before_instantiate_classes(self) -> None:
        # LightningCLI gives every datamodule below `data` the hyperparameters of `data` itself; those of the tasks are
        # to keep their own, and MergeDataModule saves none.
        if isinstance(data := self._get(self.config, "data"), Namespace) and _is_merge_data(data.get("class_path")):
            self.parser.add_instantiator(_plainly, LightningDataModule, subclasses=True, prepend=True)
        if self._get(self.config, "offload") == "layers":  # only the model's class and shapes are needed
            path = self._get(self.config, "model").class_path if self.subclass_mode_model else None
            kind = _imported(path) if path else self._model_class
            if isinstance(kind, type):  # and no other modules, such as one that the data are computed by
                lean = _WithoutMemory(cli=self, key="model")
                self.parser.add_instantiator(lean, kind, subclasses=False, prepend=True)

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except MergeError:
            raise
        except Exception as error:  # a class was given what it cannot take
            at = traceback.extract_tb(error.__traceback__)[-1]
            told = f"what is configured cannot be made: {reason(error)} (raised at {at.filename}:{at.lineno})"
            raise MergeError([told]) from error

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        if self.subcommand != "fit":  # a merge keeps its configuration with its result
            self.save_config_callback = None
        return super().instantiate_trainer(**kwargs)

    def merge(self, **kwargs: Any) -> None:
        """Run the merge, and keep the resolved configuration with its result."""
        assert isinstance(self.trainer, MergeTrainer)
        with keep_freed_memory():
            self.trainer.merge(**kwargs, files=self._config_file("merge"))

    def compare(self, **kwargs: Any) -> None:
        """Run the comparison, and keep the resolved configuration with its result."""
        assert isinstance(self.trainer, MergeTrainer)
        with keep_freed_memory():
            self.trainer.compare(**kwargs, files=self._config_file("compare"))

    def _config_file(self, subcommand: str) -> dict[str, str]:
        config = yaml.safe_load(self.parser.dump(self.config))[subcommand]
        return {"config.yaml": yaml.safe_dump(config, sort_keys=False)}


class _WithoutMemory(_InstantiatorFn):
    """Builds the model as LightningCLI does, but without memory for its parameters."""

    # The parser gives the links only to what names them.
    def __call__(self, class_type: Any, *args: Any, applied_instantiation_links: Any, **kwargs: Any) -> Any:
        build = functools.partial(super().__call__, applied_instantiation_links=applied_instantiation_links)
        return without_memory(lambda: build(class_type, *args, **kwargs), class_type.__name__)


def _imported(class_path: str | None) -> Any:
    module, _, name = (class_path or "").rpartition(".")
    return getattr(import_module(module), name, None) if module else None


def _is_merge_data(class_path: str | None) -> bool:
    kind = _imported(class_path)
    return isinstance(kind, type) and issubclass(kind, MergeDataModule)


def _plainly(class_type: type, *args: Any, **kwargs: Any) -> Any:
    return class_type(*args, **kwargs)


def run_inspect(args: Sequence[str]) -> None:
    """``com-lightning inspect``, which needs neither a model nor data."""
    parser = argparse.ArgumentParser(
        prog="com-lightning inspect", description="How far apart experts are, before anything is merged."
    )
    parser.add_argument("experts", nargs="+", metavar="[NAME=]CKPT", help="checkpoint, state dict or model folder")
    parser.add_argument("--base", help="what they were fine-tuned from")
    parser.add_argument("--private", nargs="+", default=[], metavar="PATTERN", help="parameters to leave out")
    parser.add_argument("--output_dir", type=Path, help="for all layers as a table, as JSON and as a picture")
    options = parser.parse_args(args)
    experts: dict[str, str | Path] = {}
    for given in options.experts:
        with paths_told("inspect"):
            name, _, path = given.rpartition("=") if not Path(given).exists() else ("", "", given)
            name = name or (Path(path).stem if Path(path).is_file() else Path(path).name)
        experts[name if name not in experts else path] = path
    found = inspect(experts, options.base, options.private)
    print(found.to_markdown(MOST))
    if options.output_dir:
        print(f"{', '.join(save(found, options.output_dir))} written to {options.output_dir}.")


def run_export(args: Sequence[str]) -> None:
    """``com-lightning export``, which needs neither the module's class nor data."""
    parser = argparse.ArgumentParser(
        prog="com-lightning export",
        description="A folder for transformers' from_pretrained, or adapters for PEFT, with a model card.",
    )
    parser.add_argument("source", type=Path, help="folder of a merge, or a checkpoint")
    parser.add_argument("--output_dir", type=Path, required=True, help="where to; it does not exist yet")
    parser.add_argument("--task", help="which, where the tasks of a merge have parameters of their own")
    parser.add_argument("--base", type=Path, help="of a checkpoint: folder of a transformers model of the same class")
    parser.add_argument("--precision", choices=list(PRECISIONS), help="of the weights (default: as they are)")
    adapters = parser.add_argument_group("adapters").add_mutually_exclusive_group()
    adapters.add_argument("--adapters", action="store_true", help="of a merge with task_rank: its base and adapters")
    adapters.add_argument(
        "--rank", type=int, help="write a LoRA of this rank over --base, which approximates the model"
    )
    parser.add_argument("--base_name", help="what adapters name as their base, e.g. on the Hub (default: its folder)")
    parser.add_argument("--lora_only", action="store_true", help="with --rank: no biases, norms and heads")
    options = parser.parse_args(args)
    source, folder, base, rank = options.source, options.output_dir, options.base, options.rank
    common = {"task": options.task, "precision": options.precision}
    problems = ["base: of --adapters lies in the folder of the merge; give none"] * bool(options.adapters and base)
    problems += ["rank: needs --base, the model that the experts were fine-tuned from"] * (
        rank is not None and not base
    )
    problems += ["lora_only: is for --rank"] * (options.lora_only and rank is None)
    problems += ["base_name: is for adapters"] * bool(options.base_name and rank is None and not options.adapters)
    if problems:
        raise MergeError(problems)
    if options.adapters:
        export_adapters(source, folder, base_name=options.base_name, **common)
    elif rank is not None:
        names = {"base_name": options.base_name, "lora_only": options.lora_only}
        print(*export_lora(source, folder, base, rank, **common, **names).notes(), sep="\n")
    else:
        export(source, folder, base=base, **common)
    print(f"written to {folder}; to publish it: hf upload NAME {folder}")


def _check_configs(args: Any) -> None:
    """Make sure that configurations are files of text.

    Raises:
        MergeError: naming one that is not.
    """
    for path in given_configs(args) if isinstance(args, list) else ():
        with paths_told(f"config: {path}"):
            if "\0" in str(path):  # Path.exists takes it for a missing file
                raise MergeError([f"config: the name {str(path)!r} holds a zero byte"])
            if not path.exists() or path.is_dir():  # the parser says so
                continue
            if not path.is_file():  # reading a pipe would wait, and a device may have no end
                raise MergeError([f"config: {path} is not a file"])
            if path.stat().st_size > LONGEST_JSON:
                raise MergeError([f"config: {path} has {path.stat().st_size:,} bytes; at most {LONGEST_JSON:,}"])
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise MergeError([f"config: {path} is not UTF-8 text ({error})"]) from error


def main(args: ArgsType = None) -> None:
    """Run the command line; ``args`` in place of ``sys.argv`` for use from Python."""
    if os.getcwd() not in sys.path:  # the user's project is found as `python -m` finds it
        sys.path.insert(0, os.getcwd())
    given = sys.argv[1:] if args is None else args
    if isinstance(given, list):
        if given and (text := answer(given, __version__)) is not None:
            print(text, end="")
            sys.exit(0)
        if "--help_all" in given:
            given = ["--help" if arg == "--help_all" else arg for arg in given]
            args = None if args is None else given
            sys.argv[1:] = given if args is None else sys.argv[1:]
    try:
        _check_configs(given)
        if isinstance(given, list) and given[:1] == ["inspect"]:
            run_inspect(given[1:])
        elif isinstance(given, list) and given[:1] == ["export"]:
            run_export(given[1:])
        else:
            MergeCLI(args=args)
    except (MergeError, PeerError, NonFiniteError, MisconfigurationException) as error:
        sys.exit("\n".join([f"com-lightning: {error}", *getattr(error, "__notes__", ())]))
