"""What a report ends with: the headline, and the advice that fits what is known."""

from __future__ import annotations

from typing import Any

import pytest

from com_lightning import MergeReport
from com_lightning.results.html import html_report
from com_lightning.results.model_size import Amount, ModelSize
from com_lightning.results.outcome import ParameterOutcome

CHAIN = {"class": "ChainOfMerges", "refit_heads": True, "sensitivity": None, "task_rank": 0, "task_share": 0.0}


def report_of(
    expert: float = 0.8, average: float | None = 0.4, merged: dict[str, float] | float = 0.7, **fields: Any
) -> MergeReport:
    """A report of two tasks, with one metric."""
    name = fields.pop("monitor", "acc")
    values = merged if isinstance(merged, dict) else {"a": merged, "b": merged}
    metrics = {"expert": {task: {name: expert} for task in values}, "merged": {t: {name: v} for t, v in values.items()}}
    if average is not None:
        metrics["average"] = {task: {name: average} for task in values}
    size = ModelSize(Amount(60_000, 240_000), dict.fromkeys(values, Amount(120, 480)), Amount(120_240, 480_960))
    settings: dict[str, Any] = {
        "method": CHAIN,
        "samples": dict.fromkeys(values, 256),
        "overlap": dict.fromkeys(values, 0),
        "size": size,
    }
    report = MergeReport(tasks=list(values), metrics=metrics, **{**settings, **fields})
    report.choose_monitor()
    return report


def test_the_headline_has_size_share_and_average() -> None:
    sentence = "One model of 60,240 values keeps 87.5 % of the acc of 2 experts; the plain average keeps 50.0 %."
    report = report_of()
    assert report.headline == sentence
    assert sentence in str(report).splitlines()[-2]
    for text in (report.to_markdown(), html_report(report), str(report.to_dict())):
        assert sentence in text
        assert report.advice[:40] in text.replace("&quot;", '"')


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (
            report_of(monitor="ppl", expert=10, average=20, merged=12.5),
            "mean ppl of 12.5000; the experts have 10.0000, and",
        ),
        (report_of(monitor="ppl", expert=10, average=20, merged=12.5), " 20.0000 (lower is better)."),
        (report_of(expert=-0.5, average=-0.9, merged=-0.6), "has a mean acc of -0.6000; the experts have -0.5000"),
        (report_of(average=None), "keeps 87.5 % of the acc of 2 experts."),
        (report_of(sizes={"correction": 5}), "One model with corrections for each task of 60,240 values keeps"),
        (report_of(size=ModelSize()), "One model keeps"),
        (MergeReport(tasks=["a"]), "nothing was validated"),
    ],
)
def test_headlines_of_other_merges(report: MergeReport, words: str) -> None:
    assert words in report.headline
    assert " None" not in report.headline
    assert "nan" not in report.headline


def test_a_merge_that_is_the_average_is_not_compared_with_itself() -> None:
    assert "plain average" not in report_of(average=0.7, method={"class": "Average"}).headline


PRIVATE = {"head.weight": ParameterOutcome("private"), "body.weight": ParameterOutcome("solved")}
UNSOLVED = {**CHAIN, "refit_heads": False}
ADVICE: dict[str, tuple[MergeReport, str]] = {
    "no data": (MergeReport(tasks=["a"]), "validate the result"),
    "overlap": (report_of(overlap={"a": 0, "b": 9}, method=UNSOLVED, parameters=PRIVATE), "holdout=True"),
    "heads": (report_of(method=UNSOLVED, parameters=PRIVATE), "head.weight are as in the experts; refit_heads=True"),
    "heads of another rule": (report_of(method={"class": "TIES"}, parameters=PRIVATE), "Refitted(method=TIES())"),
    "a lost task": (report_of(merged={"a": 0.2, "b": 0.76, "c": 0.72}), "'a' keeps 25.0 % of its expert, the other"),
    "few samples": (report_of(samples={"a": 32, "b": 64}), "num_samples, now 32"),
    "no samples": (report_of(method={"class": "TIES"}, samples={}), "ChainOfMerges, which reads calibration data"),
    "another rule": (report_of(method={"class": "RegMean"}), "try ChainOfMerges; com-lightning compare"),
    "the default": (report_of(), 'sensitivity="probabilities" and balance=True (--config accurate)'),
    "accurate": (report_of(method={**CHAIN, "sensitivity": "numbers"}), "task_rank=4 (--config adapters)"),
    "adapters": (report_of(method={**CHAIN, "task_rank": 4}), "a higher task_rank than 4"),
    "a share": (report_of(method={**CHAIN, "task_share": 0.05}), "a higher task_share than 0.05"),
    "a perplexity": (report_of(monitor="ppl", expert=10, average=20, merged=12.5), "--config accurate"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_the_advice_fits_what_is_known(case: str) -> None:
    report, words = ADVICE[case]
    assert words in report.advice
    assert str(report).splitlines()[-1] == f"Next: {report.advice}"


@pytest.mark.parametrize(
    "report",
    [
        MergeReport(),
        report_of(merged=0.8),
        report_of(monitor="ppl", expert=10, average=20, merged=9),
        report_of(merged=0.3),  # worse than the average: a warning says what to do
        report_of(merged=0.8, method={"class": "Refitted", "method": {"class": "TIES"}}, parameters=PRIVATE),
        report_of(merged=0.8, method={"class": "Combined", "matrices": CHAIN}, parameters=PRIVATE),
    ],
)
def test_no_advice_is_given_where_there_is_none(report: MergeReport) -> None:
    assert report.advice == ""
    assert "Next:" not in str(report)
