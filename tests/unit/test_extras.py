"""Packages that are not always there: all are known, looked for in one place, and named where they are missing."""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Callable, Iterator
from importlib.metadata import packages_distributions, requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

from com_lightning.analysis import comparison_plots, inspection
from com_lightning.errors import MergeError
from com_lightning.experts.adapter_files import load_adapter
from com_lightning.experts.hub import local_folders
from com_lightning.experts.transformers_models import load_pretrained
from com_lightning.extras import EXTRAS, missing
from com_lightning.results import importance_plot, plots
from com_lightning.results.html import html_report
from com_lightning.results.lora import Adapter, write_adapter
from com_lightning.results.report import MergeReport

PACKAGE = Path(__file__).parents[2] / "com_lightning"
PROJECT: dict[str, Any] = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]


def distributions(package: str) -> set[str]:
    return {canonicalize_name(name) for name in packages_distributions().get(package, [package])}


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imports(tree: ast.AST, always: bool = True) -> Iterator[tuple[str, bool]]:
    """Packages that a module imports, and whether it does so whenever it is imported."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], always) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0], always
        within = isinstance(node, (ast.FunctionDef, ast.Try)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        yield from imports(node, always and not within)


def test_all_that_is_imported_is_installed_always_or_by_an_extra_that_is_known() -> None:
    everywhere = names(PROJECT["dependencies"]) | {"pyyaml"}  # lightning and jsonargparse bring it
    found: dict[str, bool] = {}
    for path in PACKAGE.rglob("*.py"):
        for package, always in imports(ast.parse(path.read_text())):
            if package not in sys.stdlib_module_names and package != "com_lightning":
                found[package] = found.get(package, False) or always
    optional = {package: always for package, always in found.items() if not distributions(package) & everywhere}
    assert {package for package, always in optional.items() if not always} == {*EXTRAS, "rich"}  # rich: if it is there
    assert not any(optional.values())
    for package, extra in EXTRAS.items():
        brought = names(PROJECT["optional-dependencies"][extra])
        brought |= {name for each in brought for name in names(requires(each) or [])}
        assert distributions(package) & brought


def test_nothing_else_looks_for_them() -> None:
    """An `except ImportError` elsewhere would be a second way, or none, to say what is missing."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try) and any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
                caught = {package for package, _ in imports(node)}
                assert not caught & EXTRAS.keys(), path


FOLDER = Path("nowhere")
NOTHING: Any = SimpleNamespace(layers=[], tasks=["a"], rows=[], metrics={"merged": {"a": {"acc": 1.0}}})
NEEDS: dict[str, tuple[str, Callable[[], object]]] = {
    "a folder of transformers": ("transformers", lambda: load_pretrained(FOLDER, "expert 'a'")),
    "an adapter": ("peft", lambda: load_adapter(FOLDER, nn.Linear(1, 1), "expert 'a'")),
    "adapters of a result": ("peft", lambda: write_adapter(Adapter({}), nn.Linear(1, 1), nn.Linear(1, 1), FOLDER)),
}
PICTURES: dict[str, Callable[[], object]] = {
    "of a report": lambda: plots.draw(NOTHING),
    "of importance": lambda: importance_plot.save_importance({"": [("layer", {"a": 1.0}, {"a": 1.0})]}, FOLDER),
    "of a comparison": lambda: comparison_plots.save_pictures(NOTHING, FOLDER),
    "of an inspection": lambda: inspection.draw(NOTHING),
}


@pytest.mark.parametrize("what", NEEDS)
def test_what_cannot_be_done_is_an_error_that_says_how_to_install(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package, act = NEEDS[what]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MergeError, match=rf'need {package}: pip install "com_lightning\[{EXTRAS[package]}\]"$'):
        act()


def test_a_model_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    _, problems = local_folders({"expert 'a'": "hf://owner/name"})
    assert [problem.partition("need ")[2] for problem in problems] == [
        'huggingface_hub: pip install "com_lightning[text]"'
    ]


@pytest.mark.parametrize("what", PICTURES)
def test_what_is_left_out_is_a_warning(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r'^pictures need matplotlib: pip install "com_lightning\[plots\]"$'):
        assert not PICTURES[what]()


def test_a_page_says_it_where_the_picture_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    report = MergeReport(tasks=["a"])
    assert "pip install" not in html_report(report)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pictures need matplotlib: pip install &quot;com_lightning[plots]&quot;" in html_report(report)


def test_a_broken_package_is_told_with_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "peft.py").write_text("from torch import nothing_of_this_name")
    monkeypatch.delitem(sys.modules, "peft", raising=False)
    assert missing("peft", "adapters").startswith(
        'adapters need peft: pip install "com_lightning[lora]" (cannot import'
    )
