"""Several processes merge as one does. Run by tests/test_processes.py in an interpreter of its own.

Processes are forked, which is fast, and safe only where nothing has started threads before.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError, MergeTrainer
from com_lightning.core.chain import merge_layers
from com_lightning.core.peers import PeerError, Peers, ProcessGroup
from com_lightning.core.rule import LayerRecord, NonFiniteError, Rule, SkippedBatch, Task
from com_lightning.core.run import Run
from com_lightning.core.sharing import named_tensors
from tests.helpers import Classifier, make_data, make_experts, perturb, quiet_trainer, relative
from tests.zoo import averages
from tests.zoo import make_experts as zoo_experts
from tests.zoo import run as zoo_run

Result = tuple[dict[str, Tensor], list[LayerRecord]]


def share(tasks: list[Task], rank: int, size: int) -> list[Task]:
    """What a process gets of the tasks' batches."""
    mine = [range(rank, len(task.batches), size) for task in tasks]
    return [
        Task(task.name, task.expert, [task.batches[n] for n in numbers], task.call, task.keep, numbers)
        for task, numbers in zip(tasks, mine)
    ]


def _process(rank: int, size: int, store: str, work: Callable[[Peers], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        result = work(ProcessGroup())
    except BaseException as error:
        result = error
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def processes(size: int, work: Callable[[Peers], Any], folder: Path) -> list[Any]:
    """What ``work`` returns or raises in each of several processes."""
    mp.start_processes(  # type: ignore[attr-defined, no-untyped-call]
        _process, (size, str(folder / f"store{size}"), work, str(folder)), size, start_method="fork"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]


def merge(tasks: list[Task], rule: Rule, peers: Peers) -> Result:
    merged = averages([task.expert for task in tasks])
    records = merge_layers(share(tasks, peers.rank, peers.size), merged, [0.25, 0.75], rule, Run(peers=peers))
    return merged, records


class Mixture(nn.Module):
    """Batches go different ways by their content; some by a function, some by modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.ways = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.stack = nn.Parameter(torch.randn(3, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x, way = self.first(x).relu(), int(x[0, 0] * 1000) % 3
        x = self.ways[way](x) + F.linear(x, self.stack[way])
        return self.last(x.relu())  # type: ignore[no-any-return]


def mixture(batches: int = 5) -> list[Task]:
    torch.manual_seed(0)
    base = Mixture().double().eval()
    experts = [perturb(copy.deepcopy(base), 0.3, seed=n) for n in range(2)]
    sizes = [3, 7, 4, 6, 2][:batches]
    data = [[torch.randn(n, 5).double() + task for n in sizes] for task in range(2)]
    return [Task(f"task{n}", expert, data[n]) for n, expert in enumerate(experts)]


def zoo(name: str) -> list[Task]:
    experts, batches = zoo_experts(name)
    cast = [[{k: v.double() if v.is_floating_point() else v for k, v in b.items()} for b in part] for part in batches]
    return [Task(f"task{n}", e.double(), b, zoo_run) for n, (e, b) in enumerate(zip(experts, cast))]


RULES = {"two-sided": Rule(), "one-sided": Rule(target="merged"), "regmean": Rule("expert", "merged")}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_processes_merge_as_one(size: int, rule: str, tmp_path: Path) -> None:
    """Uneven shares, ways that some processes never see, more processes than batches of a task."""
    tasks = mixture(5 if size < 4 else 3)
    expected, records = merge(tasks, RULES[rule], Peers())
    results = processes(size, lambda peers: merge(tasks, RULES[rule], peers), tmp_path)
    for merged, theirs in results:
        assert [(r.name, r.parameters, r.rows, r.unpaired) for r in theirs] == [
            (r.name, r.parameters, r.rows, r.unpaired) for r in records
        ]
        for ours, other in zip(records, theirs):
            assert other.residual == pytest.approx(ours.residual, rel=1e-5)
            assert other.distance == pytest.approx(ours.distance, rel=1e-5)
        for name, value in expected.items():
            assert relative(merged[name], value) < 1e-6, name
            assert torch.equal(merged[name], results[0][0][name]), name


@pytest.mark.parametrize("name", ["BERT", "ViT", "U-Net", "swin_t"])
def test_architectures_are_merged_as_by_one(name: str, tmp_path: Path) -> None:
    tasks = zoo(name)
    expected, records = merge(tasks, Rule(), Peers())
    for merged, theirs in processes(2, lambda peers: merge(tasks, Rule(), peers), tmp_path):
        assert [(r.name, r.parameters, r.buffers) for r in theirs] == [
            (r.name, r.parameters, r.buffers) for r in records
        ]
        assert any(r.shared_with for r in theirs) or name in ("U-Net", "swin_t")
        for own, value in expected.items():
            assert relative(merged[own], value) < 1e-6, own


def test_identical_experts_come_back_from_several_processes(tmp_path: Path) -> None:
    tasks = mixture()
    twins = [Task(task.name, tasks[0].expert, task.batches) for task in tasks]
    for merged, _ in processes(2, lambda peers: merge(twins, Rule(), peers), tmp_path):
        for name, tensor, _ in named_tensors(tasks[0].expert):
            assert relative(merged[name], tensor) < 1e-9


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_process_that_fails_ends_all_with_its_message(culprit: int, tmp_path: Path) -> None:
    tasks = mixture()

    def call(module: nn.Module, batch: Tensor, index: int) -> object:
        if index == 2 + culprit:
            raise ValueError("this batch is broken")
        return module(batch)

    broken = [Task(task.name, task.expert, task.batches, call) for task in tasks]
    results = processes(2, lambda peers: merge(broken, Rule(), peers), tmp_path)
    assert isinstance(results[culprit], ValueError)
    assert isinstance(results[1 - culprit], PeerError)
    assert f"process {culprit} of 2 failed: ValueError: this batch is broken" in str(results[1 - culprit])
    assert f"batch {2 + culprit}" in str(results[1 - culprit])


def with_bad_batches(*places: tuple[int, int]) -> list[Task]:
    tasks = mixture()
    for task, batch in places:
        tasks[task].batches[batch][0, 1] = float("nan")
    return tasks


def merge_skipping(tasks: list[Task], peers: Peers) -> tuple[dict[str, Tensor], list[SkippedBatch]]:
    merged, run = averages([task.expert for task in tasks]), Run(peers=peers, on_bad_batch="skip")
    merge_layers(share(tasks, peers.rank, peers.size), merged, [0.25, 0.75], Rule(), run)
    return merged, run.skipped


@pytest.mark.parametrize("size", [2, 3])
def test_bad_batches_are_skipped_as_by_one(size: int, tmp_path: Path) -> None:
    """One process has none of them, and one loses all that it has of a task."""
    tasks = with_bad_batches((0, 1), (1, 1), (0, 3))
    expected, skipped = merge_skipping(tasks, Peers())
    assert sorted((entry.task, entry.batch) for entry in skipped) == [("task0", 1), ("task0", 3), ("task1", 1)]
    for merged, theirs in processes(size, lambda peers: merge_skipping(tasks, peers), tmp_path):
        assert [(e.task, e.batch, e.layer) for e in theirs] == [(e.task, e.batch, e.layer) for e in skipped]
        for name, value in expected.items():
            assert relative(merged[name], value) < 1e-6, name


def test_a_task_that_loses_all_its_batches_over_all_processes_is_named_by_each(tmp_path: Path) -> None:
    tasks = with_bad_batches(*((1, batch) for batch in range(5)))
    for error in processes(2, lambda peers: merge_skipping(tasks, peers), tmp_path):
        assert isinstance(error, NonFiniteError)
        assert "task 'task1': none of its calibration batches is left" in str(error)


@pytest.fixture
def forked() -> Iterator[dict[str, Any]]:
    """Settings of a trainer with two processes."""
    environment = dict(os.environ)
    yield {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    os.environ.clear()
    os.environ.update(environment)


def test_a_trainer_with_two_processes_merges_as_one(forked: dict[str, Any], tmp_path: Path) -> None:
    experts = dict(zip("abc", make_experts((3, 3, 3))))  # one process validates more of them than the other
    folders = []
    for name, settings in {"one": {}, "two": forked}.items():
        data = {task: make_data(seed) for seed, task in enumerate("abc")}
        tasks = MergeDataModule(data, samples=37, batch_size=8)
        merger = ChainOfMergesCallback(dict(experts), output_dir=str(tmp_path / name))
        trainer = quiet_trainer(callbacks=[merger], precision="64-true", **settings)
        trainer.validate(Classifier(3), datamodule=tasks, verbose=False)
        folders.append(tmp_path / name)
    one, two = (load_file(folder / "merged.safetensors") for folder in folders)
    for own, value in one.items():
        assert relative(two[own], value) < 1e-6, own
    reports = [json.loads((folder / "report.json").read_text()) for folder in folders]
    for task in "abc":  # exact: of one process each, not padded
        assert reports[1]["metrics"]["expert"][task] == reports[0]["metrics"]["expert"][task]
        assert reports[1]["metrics"]["merged"][task] == pytest.approx(reports[0]["metrics"]["merged"][task], rel=1e-9)
    assert reports[1]["samples"] == reports[0]["samples"] == dict.fromkeys("abc", 37)
    assert [layer["rows"] for layer in reports[1]["layers"]] == [layer["rows"] for layer in reports[0]["layers"]]


def test_what_comes_back_from_processes_of_their_own_is_a_folder(
    forked: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experts = dict(zip("ab", make_experts((3, 3))))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, samples=16)
    merger = ChainOfMergesCallback(dict(experts))
    with pytest.raises(Exception, match="output_dir: the processes of this strategy end with the merge"):
        quiet_trainer(callbacks=[merger], **forked).validate(Classifier(3), datamodule=tasks, verbose=False)
    trainer = MergeTrainer(logger=False, enable_progress_bar=False, **forked)
    sources: Any = experts
    trainer.merge(Classifier(3), tasks, sources, output_dir=str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "a.ckpt").is_file()
    assert "Merge of 2 experts" in capfd.readouterr().out


def test_strategies_that_shard_are_refused() -> None:
    strategy = ModelParallelStrategy()
    trainer = MergeTrainer(logger=False, accelerator="cpu", devices=2, strategy=strategy)
    experts: Any = dict(zip("ab", make_experts((3, 3))))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, samples=16)
    with pytest.raises(MergeError, match="ModelParallelStrategy may keep a part of the model"):
        trainer.merge(Classifier(3), tasks, experts)


def test_a_sample_is_dealt_out_without_padding() -> None:
    tasks = MergeDataModule({"a": make_data(0)}, samples=37, batch_size=8)
    tasks.setup("validate")
    whole = tasks.calibration("a")
    shares = [tasks.calibration("a", rank=rank, processes=3) for rank in range(3)]
    assert sorted(number for part in shares for number in part.numbers) == whole.numbers == [0, 1, 2, 3, 4]
    for part in shares:
        assert part.samples == whole.samples == 37
        for number, (batch, _) in zip(part.numbers, part.batches):
            assert all(torch.equal(a, b) for a, b in zip(batch, whole.batches[number][0]))
