"""What a stranger is told: warnings in the report, and errors that say what to do."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.utils.parametrizations import weight_norm

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule, MergeError, MergeReport
from com_lightning.core.sweep.task import LayerRecord
from com_lightning.errors import reason
from com_lightning.experts.adapters import adapter_problems
from com_lightning.experts.load import load_expert
from com_lightning.experts.parameters import Parameters, sort_parameters
from com_lightning.results.outcome import ParameterOutcome
from com_lightning.results.parameter_summary import summarize_parameters
from com_lightning.results.plots import _spikes
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer


def merge(experts: dict[str, Any], model: LightningModule | None = None, **kwargs: Any) -> MergeReport:
    tasks = MergeDataModule({task: make_data(number) for number, task in enumerate(experts)}, num_samples=24)
    callback = ChainOfMergesCallback(experts, **{"baselines": False, **kwargs})
    quiet_trainer(callbacks=[callback]).validate(model or Classifier(), datamodule=tasks, verbose=False)
    return callback.report


def told(source: Any, model: LightningModule | None = None) -> str:
    with pytest.raises(MergeError) as caught:
        load_expert("a", source, model or Classifier())
    return str(caught.value)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_package_for_adapters_is_told_before_the_merge(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("com_lightning.plan.missing", lambda package, what: f"{what} need {package}: pip install it")
    experts = dict(zip("ab", make_experts((3, 3))))
    report = merge(experts, method=ChainOfMerges(task_rank=rank))
    told = [text for text in report.warnings if "the tasks' adapters need peft: pip install it. Without" in text]
    assert len(told) == rank


# A merge that is worse than the average


def compared(average: float, merged: float, metric: str = "acc", method: str = "ChainOfMerges") -> list[str]:
    values = {
        "average": {"a": {metric: average}, "b": {metric: 0.5}},
        "merged": {"a": {metric: merged}, "b": {metric: 0.5}},
    }
    settings: dict[str, Any] = {"class": method, "ridge": 0.01}
    report = MergeReport(settings, ["a", "b"], metric, metrics=values, samples={"a": 64, "b": 64})
    report.compare_with_average()
    return report.warnings


@pytest.mark.parametrize("metric", ["acc", "val_f1", "power"])
def test_a_merge_below_the_average_is_told(metric: str) -> None:
    [warning] = compared(0.9, 0.7, metric)
    for part in (
        f"mean {metric} is 0.6000 merged and 0.7000 averaged",
        "now 64 per task",
        "now 0.01",
        "Average",
    ):
        assert part in warning
    assert not compared(0.7, 0.9, metric)
    assert not compared(0.7, 0.7, metric)
    assert not compared(float("nan"), 0.7, metric)
    assert not compared(0.9, 0.7, metric, "Average")


@pytest.mark.parametrize("metric", ["val_loss", "Perplexity", "MeanSquaredError", "test/wer", "rmse"])
def test_errors_are_better_the_lower(metric: str) -> None:
    assert compared(0.7, 0.9, metric)
    assert not compared(0.9, 0.7, metric)


def test_the_mode_decides_whatever_the_name() -> None:
    values = {"average": {"a": {"acc": 0.5}}, "merged": {"a": {"acc": 0.7}}}
    for mode, warned in (("min", True), ("max", False), (None, False)):
        report = MergeReport(tasks=["a"], metrics=values)
        report.choose_monitor("acc", mode)  # type: ignore[arg-type]
        report.compare_with_average()
        assert (report.mode, bool(report.warnings)) == (mode or "max", warned)


def test_a_report_without_averages_compares_nothing() -> None:
    report = MergeReport(tasks=["a"], monitor="acc", metrics={"merged": {"a": {"acc": 0.1}}})
    report.compare_with_average()
    assert report.warnings == []


def test_a_merge_compares_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MergeReport, "compare_with_average", lambda self: self.warnings.append("compared"))
    assert merge(dict(zip("ab", make_experts((3, 3)))), baselines=True).warnings[-1] == "compared"


# Experts of another architecture


class Stack(Classifier):
    def __init__(self, depth: int = 1, classes: int = 3) -> None:
        super().__init__(classes)
        self.save_hyperparameters()
        self.more = nn.Sequential(*(nn.Linear(8, 8) for _ in range(depth)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.more(self.body(x)))


def stacks(*depths: int) -> dict[str, Stack]:
    torch.manual_seed(0)
    shallow = Stack(max(depths))
    experts = {}
    for task, depth in zip("abc", depths):
        experts[task] = Stack(depth)
        experts[task].load_state_dict(
            {n: t for n, t in shallow.state_dict().items() if n in experts[task].state_dict()}
        )
        perturb(experts[task], 0.1)
    return experts


def test_an_expert_of_another_architecture_is_told_in_the_report() -> None:
    report = merge(dict(stacks(1, 3)), Stack(1))
    [warning] = [w for w in report.warnings if "same architecture" in w]
    assert warning.startswith("37 % of the values of expert 'b' have no counterpart in the model, expert 'a'")
    assert "more.1.weight" in warning


def test_a_model_of_another_architecture_is_told_once() -> None:
    experts = stacks(3, 3)
    warned = sort_parameters(Stack(1), experts, None).warnings
    assert [w.split(" have ")[0][-10:] for w in warned if "same architecture" in w] == ["expert 'a'", "expert 'b'"]
    assert not [w for w in sort_parameters(Stack(1), experts, ["more"]).warnings if "same architecture" in w]


def test_heads_of_other_size_are_of_the_same_architecture() -> None:
    experts = dict(zip("ab", make_experts((3, 400))))
    assert not sort_parameters(Classifier(), experts, None).warnings


# Warnings of experts


class Net(Classifier):
    def __init__(self, classes: int = 3, **options: Any) -> None:
        super().__init__(classes)
        net: Any = nn.Sequential(self.body, self.head)
        self.net = torch.compile(net, **options) if options else net
        del self.body, self.head

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))


def test_warnings_of_experts_are_in_the_report_and_shown_once() -> None:
    torch.manual_seed(0)
    wide = perturb(Net(4), 0.1)
    wide.load_state_dict({**wide.state_dict(), **{n: t for n, t in Net().state_dict().items() if ".0." in n}})
    narrow = Net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = merge({"a": narrow, "b": wide.net}, narrow, private=["net.1"])
    shown = [str(w.message) for w in caught if "cannot load the result's checkpoint" in str(w.message)]
    assert len(shown) == 1
    assert shown[0] in report.warnings
    assert "net.1.weight ((4, 8), in your model (3, 8))" in shown[0]
    assert "metrics and hyperparameters are still those of your model" in shown[0]


def test_other_warnings_are_shown_as_ever() -> None:
    class Deprecated(Classifier):
        def __deepcopy__(self, memo: Any) -> Any:
            warnings.warn("this is the user's own", DeprecationWarning, stacklevel=1)
            return Classifier()

    with pytest.warns(DeprecationWarning, match="the user's own"):
        report = merge({"a": Deprecated(), "b": Classifier()}, private=[])
    assert not [w for w in report.warnings if "own" in w]


def test_options_of_compiled_modules_are_kept() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    model = Net(backend=backend)
    sources: list[Any] = [Net().net, Net(), dict(model.state_dict())]
    for number, source in enumerate(sources, 1):
        net: Any = load_expert("a", source, model).get_submodule("net")
        assert isinstance(net, OptimizedModule)
        torch._dynamo.reset()
        assert net(torch.zeros(2, 6)).shape == (2, 3)
        assert len(compiled) == number


# Masks


class Masked(Classifier):
    """Sequences of points, to which a class token may be prepended."""

    mask: Any = None
    token = False

    def forward(self, x: Tensor) -> Any:
        x = self.body[0](x[:, None] * torch.arange(1.0, 4.0)[:, None])
        x = torch.cat([x[:, :1], x], 1) if self.token else x
        for layer in self.body[1:]:
            x = layer(x)
        return self.head(x.mean(1))

    def calibration_mask(self, batch: Any) -> Any:
        return type(self).mask(len(batch[0]))


def masked(mask: Any, token: bool = False) -> MergeReport:
    kind = type("Masked", (Masked,), {"mask": staticmethod(mask), "token": token})
    experts = {}
    for task, expert in zip("ab", make_experts((3, 3))):
        experts[task] = kind()
        experts[task].load_state_dict(expert.state_dict())
    return merge(experts, kind(), private=[])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (lambda n: torch.zeros(n, 3, dtype=torch.bool), r"\(16, 3\) of torch.bool, leaves out every position"),
        (lambda n: torch.zeros(n, 3), "may be one to be added to scores.*give True"),
        (lambda n: torch.full((n, 3), 2), "holds other numbers than 0 and 1"),
        (lambda n: [True], "is a list, not a tensor"),
    ],
)
def test_masks_that_are_refused(mask: Any, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Masked, "forward", None)  # nothing is run
    with pytest.raises(MergeError, match=f"task 'a', calibration batch 0: what calibration_mask returns.*{expected}"):
        masked(mask)


def test_a_mask_without_the_class_token_is_told() -> None:
    def mask(count: int) -> Tensor:
        return torch.tensor([[1, 1, 0]]).expand(count, 3)

    [warning, _] = [w for w in masked(mask, token=True).warnings if "padding mask" in w]
    assert "task 'a': its padding mask, (16, 3), fits the inputs of 1 of 3 layers that take positions" in warning
    assert "body.1 first" in warning
    assert not [w for w in masked(mask).warnings if "padding mask" in w]


# Files and folders


def test_a_class_without_hyperparameters_is_told_what_to_do(tmp_path: Path) -> None:
    class Wide(Classifier):
        def __init__(self) -> None:
            super().__init__(3)
            self._hparams = {}

    quiet_trainer().strategy.connect(module := Classifier(9))
    content = {"state_dict": module.state_dict(), "pytorch-lightning_version": "2.6.0"}
    torch.save(content, tmp_path / "a.ckpt")
    problem = told(tmp_path / "a.ckpt", Wide())
    assert "head.weight is (9, 8), in the model (3, 8) and 1 more). Call save_hyperparameters()" in problem
    assert "or give the module itself or its state dict" in problem


def test_lists_of_torch_are_shortened() -> None:
    with pytest.raises(RuntimeError) as caught:
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(9))).load_state_dict({})
    assert reason(caught.value).endswith('Missing key(s) in state_dict: "0.weight", "0.bias" and 16 more.')


# Kinship and adapters


def test_experts_without_a_common_base_are_told_of_once() -> None:
    torch.manual_seed(0)
    for count, start in (
        (2, "the two experts 'a', 'b' seem not to"),
        (3, "no two of the experts 'a', 'b', 'c' seem to"),
    ):
        experts = {task: Classifier(width=64) for task in "abc"[:count]}
        [warning] = sort_parameters(Classifier(width=64), experts, []).warnings
        assert warning.startswith(f"{start} share a base")


def test_adapters_in_modules_beside_a_plain_model_are_one_problem() -> None:
    peft = pytest.importorskip("peft")

    def adapted() -> Classifier:
        module = Classifier()
        module.body = peft.get_peft_model(module.body, peft.LoraConfig(target_modules=["0", "3"]))
        return module

    plan = ChainOfMergesCallback({"a": adapted(), "b": adapted()})
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)})
    with pytest.raises(MergeError) as caught:
        plan.plan(Classifier(), tasks)
    [problem] = caught.value.problems
    assert problem.startswith("expert 'a' and expert 'b' have adapters at 2 layers (0, 3), the model has none there.")
    assert adapter_problems({"a": adapted(), "b": adapted()}) == []


# The report


def test_rows_without_data_count_as_averaged() -> None:
    layers = {"table": nn.Embedding(10, 2), "head": nn.Linear(2, 3), "late": nn.Linear(2, 1), "state": nn.Linear(2, 1)}
    module = nn.ModuleDict({**layers, "parts": nn.Conv1d(4, 4, 1, groups=4)})
    records = [
        LayerRecord("table", "embedding", {"table.weight": 20}, groups=10, groups_without_data=7),
        LayerRecord("head", "linear", {"head.weight": 6, "head.bias": 3}, groups=1),
        LayerRecord("late", "linear", {"late.weight": 2, "late.bias": 1}, groups=1, groups_without_data=1),
        LayerRecord("state", "linear", {"state.weight": 2, "state.bias": 1}, groups=1, kept={"state.weight": 2}),
        LayerRecord("parts", "convolution", {"parts.weight": 4, "parts.bias": 4}, groups=4, kept={"parts.weight": 1}),
    ]
    shared = Parameters([name for name, _ in module.named_parameters()], {"a": []}, {"adapter.weight"})
    outcomes, sizes = summarize_parameters({"a": module}, shared, records, True)
    assert sizes == {"solved": 6 + 9 + 1 + 7, "averaged": 14 + 3 + 2 + 1, "private": 0, "re-estimated": 0, "buffer": 0}
    assert str(outcomes["table.weight"]) == "solved in part: no calibration data reached 14 of its values"
    assert str(outcomes["late.bias"]) == "averaged: no calibration data reached it"
    assert str(outcomes["state.weight"]) == "averaged: its calibration inputs are all zero"
    assert str(outcomes["parts.weight"]) == "solved in part: calibration gave 1 of its values no inputs, or only zeros"
    assert {str(outcomes[name]) for name in ("state.bias", "parts.bias")} == {"solved"}
    assert str(outcomes["adapter.weight"]) == "folded"


def test_what_was_not_solved_has_its_own_reason() -> None:
    module = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2), "bound": weight_norm(nn.Linear(2, 2))})
    records = [
        LayerRecord("used", "linear", {"used.weight": 4, "used.bias": 2}, groups=1, of_tasks={"used.bias": 2}),
        LayerRecord("bound", "linear", note="its weight cannot be written"),
    ]
    shared = Parameters([name for name, _ in module.named_parameters()], {"a": [], "b": []}, set())
    outcomes, sizes = summarize_parameters({"a": module, "b": module}, shared, records, True)
    assert {name: str(outcome) for name, outcome in outcomes.items()} == {
        "used.weight": "solved",
        "used.bias": "private, solved for each task",
        "idle.weight": "averaged: no calibration forward uses it",
        "idle.bias": "averaged: no calibration forward uses it",
        "bound.bias": "averaged: its weight cannot be written",
        "bound.parametrizations.weight.original0": "averaged: its weight cannot be written",
        "bound.parametrizations.weight.original1": "averaged: its weight cannot be written",
    }
    assert (sizes["solved"], sizes["private"], sizes["averaged"]) == (4, 2 * 2, 6 + 2 + 6)


@pytest.mark.parametrize(
    ("kind", "groups", "idle", "note"),
    [
        ("embedding", 30522, 29518, "29,518 of 30,522 rows of the table saw no data"),
        ("grouped linear", 8, 2, "2 of 8 experts saw no data"),
        ("sum", 192, 32, "32 of 192 elements saw no data"),
        ("linear", 1, 1, "| saw no data"),
    ],
)
def test_notes_on_missing_data(kind: str, groups: int, idle: int, note: str) -> None:
    assert note in MergeReport(layers=[LayerRecord("x", kind, groups=groups, groups_without_data=idle)]).layer_table()


def test_notes_on_zeros_and_calls() -> None:
    record = LayerRecord("x", "convolution", groups=4, groups_of_zeros=3, calls=6, late=2)
    table = MergeReport(layers=[record]).layer_table()
    assert "3 of 4 groups saw only zeros; merged from the first of 6 calls; 2 forwards came after" in table


def test_the_summary_is_a_sentence() -> None:
    sizes = {"solved": 5, "averaged": 0, "private": 2695, "re-estimated": 0, "buffer": 1024}
    report = MergeReport(
        parameters={"head.weight": ParameterOutcome("private"), "x": ParameterOutcome("solved")}, sizes=sizes
    )
    expected = "Values: 5 solved, 2,695 private to their tasks (head.weight), 1,024 in buffers that are left unchanged."
    assert expected in report.summary()


def test_the_plan_tells_of_the_calibration_data() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "val data, held out of validation."),
        ({"holdout": True}, "val data, held out of validation."),
        ({"holdout": False}, "val data, also validated."),
        ({"split": "train"}, "train data."),
    ]
    for settings, expected in cases:
        tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=8, **settings)
        plan = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3))))).plan(Classifier(), tasks)
        assert f"up to 8 samples of each task's {expected}" in str(plan)
    tasks = MergeDataModule({"a": make_data(0, count=15), "b": make_data(1, count=16)}, num_samples=8)
    plan = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3))))).plan(Classifier(), tasks)
    assert "val data, held out of validation in b alone." in str(plan)


def test_metrics_of_data_that_the_merge_has_seen_are_told() -> None:
    report = MergeReport(samples={"a": 8, "b": 8}, overlap={"a": 8, "b": 0})
    assert "8 calibration samples per task (a: validated on data that the merge has seen, use" in report.summary()
    report.overlap["b"] = 5
    assert "8 calibration samples per task (validated on data that the merge has seen, use" in report.summary()
    report.overlap["b"] = None
    for words in ("(a: validated on data that the merge has seen", "; b: perhaps validated on data"):
        assert words in report.summary()
    report.overlap = {"a": 0, "b": 0}
    assert "8 calibration samples per task (none of them is validated)" in report.summary()
    report.held_out = {"a": True, "b": True}
    assert "8 calibration samples per task (held out of validation)" in report.summary()


def test_the_largest_spikes_are_named() -> None:
    assert _spikes({"a": [0.1, 0.1, 0.9, 0.1, None, 0.5, 0.1], "b": [0.1, 0.1, 0.2, 0.1, 0.1, 0.6, 0.1]}) == [
        (2, 0.9),
        (5, 0.6),
    ]
    assert _spikes({"a": [0.3] * 5}) == []
    assert _spikes({}) == []
