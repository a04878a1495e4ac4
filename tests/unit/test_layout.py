"""Tests lie where their names say: unit tests beside nothing but the module they test, and no test imports another."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
PACKAGE = TESTS.parent / "com_lightning"
FILES = sorted(path for path in TESTS.rglob("*.py") if path.name != "conftest.py")

# Tests of more than one module: what they hold all of them to.
OF_SEVERAL = {
    "core/chain/test_naive.py",  # the chain against benchmarks/naive.py
    "core/layers/test_functional_unusual.py",
    "core/layers/test_parametrised.py",  # layers whose weight is computed
    "methods/test_formulas.py",
    "methods/test_gradients.py",  # Fisher, LOT and AdaMerging
    "methods/test_promises.py",
    "methods/test_references.py",  # other implementations
    "test_layout.py",
}


def names(path: Path) -> str:
    return path.relative_to(TESTS).as_posix()


@pytest.mark.parametrize("path", [path for path in FILES if names(path).startswith("unit/")], ids=names)
def test_a_unit_test_is_named_after_its_module(path: Path) -> None:
    place = path.relative_to(TESTS / "unit")
    module = PACKAGE / place.with_name(place.name.removeprefix("test_"))
    assert path.name.startswith("test_")
    assert module.is_file() != (place.as_posix() in OF_SEVERAL)


@pytest.mark.parametrize("path", FILES, ids=names)
def test_helpers_hold_no_tests_and_tests_import_helpers_alone(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not [name for name in imported if name.startswith("tests.") and not name.startswith("tests.helpers")]
    folder, is_helper = path.relative_to(TESTS).parts[0], names(path).startswith("helpers/")
    assert folder in ("unit", "integration", "slow", "helpers")
    tests = [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    assert bool(tests) != is_helper


def test_slow_is_a_folder() -> None:
    by_hand = [names(path) for path in FILES if "mark." + "slow" in path.read_text()]
    assert not by_hand
