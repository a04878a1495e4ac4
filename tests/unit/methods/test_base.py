"""What every rule says of itself: its settings as code and as plain values."""

from __future__ import annotations

from typing import Any

import pytest

import com_lightning
from com_lightning import (
    DARE,
    TIES,
    TSVM,
    ChainOfMerges,
    Combined,
    MergeError,
    MergingMethod,
    Refitted,
    RegMean,
    methods,
)
from com_lightning.analysis.compare import rules_to_compare
from com_lightning.methods.naming import as_rule
from tests.helpers.rules import RULES


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (TIES(), "TIES()"),
        (TIES(0.1, importance={"a": 1.0}), "TIES(density=0.1, importance={'a': 1.0})"),
        (ChainOfMerges(ridge=0.5, target="merged"), "ChainOfMerges(target='merged', ridge=0.5)"),
        (Combined(TSVM(0.5), TIES()), "Combined(matrices=TSVM(scale=0.5), rest=TIES())"),
        (Refitted(RegMean()), "Refitted(method=RegMean())"),
    ],
)
def test_a_rule_is_shown_as_code(rule: MergingMethod, code: str) -> None:
    assert repr(rule) == code
    assert eval(code, vars(methods)).describe() == rule.describe()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_settings_of_every_rule_are_shown(rule: MergingMethod) -> None:
    assert eval(repr(rule), vars(methods)).describe() == rule.describe()


def test_settings_are_plain_values() -> None:
    settings = Combined(TSVM(0.5), ChainOfMerges(ridge=0.1)).describe()
    assert settings["class"] == "Combined"
    assert settings["matrices"] == {"class": "TSVM", "importance": None, "scale": 0.5}
    assert settings["rest"]["ridge"] == 0.1
    assert "options" not in settings


def test_a_rule_around_others_needs_what_they_need() -> None:
    assert Combined(TSVM(), ChainOfMerges()).needs == {"base", "data"}
    assert Combined(ChainOfMerges(), TSVM()).options == ChainOfMerges().options
    assert Refitted(TIES()).needs == {"base", "data"}
    assert Refitted(TIES()).options is None


def test_every_rule_is_public() -> None:
    rules = {rule for rule in vars(methods).values() if isinstance(rule, type) and issubclass(rule, MergingMethod)}
    public = {rule.__name__ for rule in rules if not rule.__abstractmethods__ and rule.__module__ != "__main__"}
    inner = {"ClosedForm", "OnTop", "TaskVectorRule", "MatrixRule"}
    assert public - inner <= {*com_lightning.__all__}
    assert public - inner <= {*methods.__all__}


# -- what is compared --------------------------------------------------------------------------------------------------


def test_the_average_is_always_compared() -> None:
    assert [*map(str, rules_to_compare())] == ["Average()", "RegMean()", "ChainOfMerges()"]
    average = methods.Average(importance={"a": 1.0})
    assert rules_to_compare([TIES(), average])[1:] == [average]


def test_the_rule_of_a_merge_is_compared_once() -> None:
    rules = rules_to_compare([TIES(), DARE()], TIES(0.3))
    assert [*map(str, rules)] == ["Average()", "TIES(density=0.3)", "TIES()", "DARE(scale=0.3)"]
    assert len(rules_to_compare([TIES(), DARE()], TIES())) == 3


@pytest.mark.parametrize("wrong", [[], "ties"])
def test_what_is_no_list_of_rules(wrong: list[MergingMethod]) -> None:
    with pytest.raises(MergeError, match="methods: must be a list of rules"):
        rules_to_compare(wrong)


def test_a_rule_is_given_as_itself_its_class_or_its_text() -> None:
    rules = rules_to_compare([TIES, "regmean", "TIES(density=0.1)", DARE()], "chain_of_merges(ridge=0.1)")
    texts = ["Average()", "ChainOfMerges(ridge=0.1)", "TIES()", "RegMean()", "TIES(density=0.1)", "DARE(scale=0.3)"]
    assert [*map(str, rules)] == texts
    assert [*map(str, map(as_rule, texts))] == texts


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("TISE", "no rule is called TISE; did you mean TIES"),
        ("TIES(densty=3)", "TIES has no densty; it has density"),
        ("Combined", "Combined needs matrices and rest"),
        ("TIES(0.2)", "is no rule; write it as TIES"),
        ("TIES(density=a)", "is no rule"),
        (3, "must be a rule such as TIES"),
        (MergingMethod, "must be a rule"),
    ],
)
def test_what_is_no_rule_is_told_with_the_nearest(given: Any, message: str) -> None:
    with pytest.raises(MergeError, match=f"method: .*{message}"):
        as_rule(given)


def test_a_rule_is_listed_once() -> None:
    with pytest.raises(MergeError, match=r"TIES\(\) is listed twice"):
        rules_to_compare([TIES(), RegMean(), TIES(0.2)])
