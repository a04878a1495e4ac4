"""The small language that rules are listed in."""

from __future__ import annotations

from typing import Any

import pytest

from com_lightning import (
    DARE,
    TIES,
    TSVM,
    ChainOfMerges,
    Combined,
    MergeError,
    MergingMethod,
    RegMeanPlusPlus,
    TaskArithmetic,
    methods,
)
from com_lightning.methods.registry import NAMES, read_methods
from tests.helpers.rules import make_values, merge


class Mine(TaskArithmetic):
    """A user's own rule."""


def labels(listed: Any) -> list[str]:
    return [setting.label for setting in read_methods(listed)]


def test_every_rule_has_a_name() -> None:
    kinds = {kind for kind, _ in NAMES.values()}
    rules = {getattr(methods, name) for name in methods.__all__}
    own = {rule for rule in rules if isinstance(rule, type) and issubclass(rule, MergingMethod)}
    assert own - {MergingMethod} == kinds


@pytest.mark.parametrize("name", [*NAMES, *(k.__name__ for k, _ in NAMES.values()), "karcher", "regmean++", "IsoC"])
def test_names_are_found_however_they_are_written(name: str) -> None:
    wanted = {"combined": "(matrices=tsvm, rest=average)", "refitted": "(method=ties)"}
    (setting,) = read_methods(f"{name}{wanted.get(name.lower(), '')}")
    assert isinstance(setting.method, MergingMethod)


def test_settings_reach_the_rule() -> None:
    read = read_methods("ties(density=0.5, trim=parameter),dare(ties=True,seed=3), chain(target='merged',normalize=no)")
    one, two, three = (setting.method for setting in read)
    assert isinstance(one, TIES)
    assert (one.density, one.trim) == (0.5, "parameter")
    assert isinstance(two, DARE)
    assert (two.elects, two.seed) == (True, 3)
    assert isinstance(three, ChainOfMerges)
    assert (three.options.target, three.options.normalize) == ("merged", False)
    (plus,) = read_methods("RegMean++(ridge=0)")
    assert isinstance(plus.method, RegMeanPlusPlus)


def test_grids() -> None:
    found = read_methods("ties(density=[0.1,0.2], scale=[1, 2], importance={'a': 1}), average")
    assert len({setting.name for setting in found}) == 2
    assert [s.label for s in found[:2]] == [
        "ties(density=0.1, scale=1, importance={'a': 1})",
        "ties(density=0.1, scale=2, importance={'a': 1})",
    ]
    assert len(found) == 5
    (one,) = {setting.name for setting in found[:4]}
    assert one == "ties(density=[0.1, 0.2], scale=[1, 2], importance={'a': 1})"
    weights = read_methods("average(importance=[{'a': 1, 'b': 2}, {'a': 2, 'b': 1}])")
    assert [setting.method.importance for setting in weights] == [{"a": 1, "b": 2}, {"a": 2, "b": 1}]


def test_grids_within_rules() -> None:
    found = read_methods("combined(matrices=[tsvm(scale=[0.5,1]), ties], rest=task_arithmetic)")
    assert [setting.label for setting in found] == [
        f"combined(matrices={inner}, rest=task_arithmetic)" for inner in ("tsvm(scale=0.5)", "tsvm(scale=1)", "ties")
    ]
    rules = [setting.method for setting in found]
    assert [type(rule.matrices) for rule in rules if isinstance(rule, Combined)] == [TSVM, TSVM, TIES]


def test_dictionaries_texts_and_rules() -> None:
    listed = [
        "ties, tsvm",
        {"class_path": "com_lightning.TaskArithmetic", "init_args": {"scale": [0.2, 0.3]}},
        {"class_path": f"{__name__}.Mine", "init_args": {"scale": 0.7}},
        DARE(0.5),
        ChainOfMerges(ridge=0.1),
    ]
    told = ["ties", "tsvm", "task_arithmetic(scale=0.2)", "task_arithmetic(scale=0.3)", "Mine(scale=0.7)"]
    assert labels(listed)[:5] == told
    assert labels(listed)[6:] == ["chain(ridge=0.1)"]
    assert type(read_methods(f"{__name__}.Mine")[0].method).__name__ == Mine.__name__
    assert labels("[ties, 'tsvm(scale=2)']") == ["ties", "tsvm(scale=2)"]


def test_what_is_read_merges() -> None:
    base, experts = make_values()
    (setting,) = read_methods("task_arithmetic(scale=0.5)")
    named = dict(zip("abc", experts))
    one, two = (merge(rule, base, named) for rule in (setting.method, TaskArithmetic(0.5)))
    assert all((one[name] == value).all() for name, value in two.items())


@pytest.mark.parametrize(
    ("listed", "told"),
    [
        ("", "none is given; known are average, breadcrumbs"),
        ([], "none is given"),
        ("tie", "'tie' is no method; did you mean ties? Known are average, breadcrumbs, chain"),
        ("ties(dens=1)", "ties has no setting 'dens'; did you mean density? It has density, scale, trim, importance"),
        ("one_sided(target='expert')", "one_sided has no setting 'target'"),
        ("ties(0.1)", "settings have a name, as in ties(setting=value)"),
        ("ties(**{})", "settings have a name"),
        ("ties(density=much)", "ties(density=much): density: Expected a <class 'float'>"),
        ("ties(trim=[model, all])", "ties(trim=all): trim: Expected"),
        ("ties(density=[])", "density is an empty list"),
        ("chain(ridge=0.1", "cannot be read"),
        ("chain,,ties", "cannot be read"),
        ("a],[b", "cannot be read"),
        ("chain()()", "is no method"),
        ("3", "is no method"),
        ([3], "3 is no method"),
        ([{"class_path": "TIES", "args": {}}], "is no method"),
        ("ties(density=1+1)", "is no value"),
        ("ties(density=__import__('os').getpid())", "is no method"),
        ("tests.helpers.Classifier", "tests.helpers.Classifier is no MergingMethod"),
        ("nowhere.Rule", "nowhere.Rule cannot be imported"),
        ("combined", "required"),
        ("combined(matrices=tie, rest=average)", "did you mean ties"),
        ("ties,TIES", "ties is listed twice"),
        ("ties(density=[0.1,0.1])", "listed twice"),
        ("(" * 300, "cannot be read"),
    ],
)
def test_what_is_wrong_is_told(listed: Any, told: str) -> None:
    with pytest.raises(MergeError) as caught:
        read_methods(listed)
    assert told in str(caught.value)


def test_all_that_is_wrong_at_once() -> None:
    with pytest.raises(MergeError) as caught:
        read_methods("tie,ties(density=x),chain")
    assert len(caught.value.problems) == 2
