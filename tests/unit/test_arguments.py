"""Values of a wrong type are told of where they are given, for every rule, option and datamodule at once."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import numpy
import pytest

import com_lightning.methods
from com_lightning import MergeDataModule, MergeError
from com_lightning.arguments import argument_problems, checked
from com_lightning.methods import TIES, Average, MergingMethod
from com_lightning.options import MergeOptions

RULES = [
    rule
    for rule in map(vars(com_lightning.methods).get, com_lightning.methods.__all__)
    if isinstance(rule, type) and issubclass(rule, MergingMethod) and not inspect.isabstract(rule)
]
REQUIRED: dict[str, Any] = {"matrices": TIES(), "rest": Average(), "method": TIES(), "tasks": {}}
"""Right values of arguments without a default."""


def settings(made: Any) -> list[tuple[Any, str]]:
    return [(made, name) for name in inspect.signature(made).parameters if name != "rules"]


def problems_of(made: Any, **given: Any) -> list[str]:
    parameters = inspect.signature(made).parameters
    needed = {name: value for name, value in REQUIRED.items() if name in parameters}
    try:
        result = made(**{**needed, **given})
    except MergeError as error:
        return error.problems
    problems: list[str] = result.problems(["a", "b"]) if isinstance(result, MergingMethod) else result.problems()
    return problems


@pytest.mark.parametrize(
    ("made", "name"), [setting for made in (*RULES, MergeOptions, MergeDataModule) for setting in settings(made)]
)
def test_no_setting_is_compared_with_what_it_is_not(made: Any, name: str) -> None:
    """``null`` in a configuration reaches any of them as None. Whatever comes, it is told, and by its name."""
    if inspect.signature(made).parameters[name].default is not None and name != "memory_budget":  # None: no limit
        assert any(name in problem and "must be" in problem for problem in problems_of(made, **{name: None}))
    values: list[Any] = ["x", math.nan, [None], {"a": None}, object()]
    for value in values:
        if name == "tasks" and made is MergeDataModule:
            with pytest.raises((MergeError, TypeError, AttributeError)):
                made(value)
        else:
            assert all(isinstance(problem, str) for problem in problems_of(made, **{name: value}))


def test_all_wrong_types_are_told_at_once() -> None:
    told = problems_of(MergeOptions, mode="x", baselines=None, memory_budget="much", private=[1])
    assert told == [
        "private: must be a list (each entry text) or None, got [1]",
        "mode: must be 'min' or 'max' or None, got 'x'",
        "baselines: must be true or false, got None",
        "memory_budget: must be a number or 'auto' or None, got 'much'",
    ]
    options = MergeOptions()
    options.mode = "x"  # type: ignore[assignment]
    assert options.problems() == told[1:2]


@checked
def example(
    flag: bool = False, count: int = 1, share: float = 0.5, text: str = "", more: dict[str, float] | None = None
) -> str:
    return f"{flag} {count} {share} {text} {more}"


def test_what_means_the_same_is_taken() -> None:
    assert example(1, numpy.int64(3), 2, Path("x"), {"a": 1}) == "1 3 2 x {'a': 1}"  # type: ignore[arg-type]
    assert example(numpy.bool_(True), 2, numpy.float32(0.5)) == "True 2 0.5  None"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"flag": "false"}, "flag: must be true or false, got 'false'"),
        ({"flag": 2}, "flag: must be true or false, got 2"),
        ({"count": 1.0}, "count: must be a whole number, got 1.0"),
        ({"count": True}, "count: must be a whole number, got True"),
        ({"share": "0.1"}, "share: must be a number, got '0.1'"),
        ({"share": True}, "share: must be a number, got True"),
        ({"text": b"x"}, "text: must be text, got b'x'"),
        ({"more": {"a": "1"}}, "more: must be a dictionary (each value a number) or None, got {'a': '1'}"),
        ({"more": [1]}, "more: must be a dictionary (each value a number) or None, got [1]"),
    ],
)
def test_what_does_not_mean_the_same_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(MergeError) as caught:
        example(**given)
    assert caught.value.problems == [told]


def test_python_tells_of_arguments_that_do_not_exist() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        example(wrong=None)  # type: ignore[call-arg]


def test_a_rule_of_a_user_is_checked_too() -> None:
    class Mine(Average):
        def __init__(self, power: float = 2.0, old_style: int = None) -> None:  # type: ignore[assignment]  # noqa: RUF013
            super().__init__()
            self.power = power**2

    assert Mine(3).power == 9
    with pytest.raises(MergeError, match="power: must be a number, got None"):
        Mine(power=None)  # type: ignore[arg-type]
    assert Mine(old_style=None).power == 4  # type: ignore[arg-type]


def test_annotations_that_only_type_checkers_know_are_left_alone() -> None:
    def function(value: NotHere = 0) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert argument_problems(function, {"value": None}) == []
