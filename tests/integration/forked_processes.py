"""Several processes merge as one does. Run by tests/integration/test_processes.py in an interpreter of its own.

Processes are forked, which is fast, and safe only where nothing has started threads before.
"""

from __future__ import annotations

import copy
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import com_lightning.merging as merging
from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError, MergeTrainer, TaskLoaders
from com_lightning.core.chain import fit as fitting
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.heads import refit
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.chain.task_tensors import task_tensors
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.distributed import Alike, PeerError, Peers, ProcessGroup
from com_lightning.core.sweep.forward_check import check_forwards
from com_lightning.core.sweep.task import LayerRecord, NonFiniteError, SkippedBatch, Task
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.methods import ESM, LOT, AdaMerging, FeatCal, Fisher, MergingMethod
from com_lightning.strategies import together
from tests.helpers import Classifier, free_port, gradients, make_data, make_experts, perturb, quiet_trainer, relative
from tests.helpers.processes import _process, processes, share
from tests.helpers.zoo import averages
from tests.helpers.zoo import make_experts as zoo_experts
from tests.helpers.zoo import run as zoo_run

Result = tuple[dict[str, Tensor], list[LayerRecord]]


def merge(tasks: list[Task], rule: ChainOptions, peers: Peers) -> Result:
    merged = averages([task.expert for task in tasks])
    own = task_tensors(tasks, merged) if rule.private_biases else {}
    part = share(tasks, peers.rank, peers.size)
    if rule.refit_heads:
        merged = {name: tensor for name, tensor in merged.items() if not name.startswith("last")}
    records = merge_layers(part, merged, [0.25, 0.75], rule, Context(peers=peers), task_tensors=own)
    found = dict[str, dict[str, Tensor]]()
    if rule.refit_heads:
        refitted, found = refit(part, merged, own, rule, Context(peers=peers))
        records += refitted
    return {
        **merged,
        **{f"{name} of {task}": tensor for task, each in found.items() for name, tensor in each.items()},
        **{f"{name} of {n}": tensor for name, each in own.items() for n, tensor in enumerate(each)},
    }, records


def gathers(module: nn.Module, batch: Tensor, index: int) -> None:
    dist.all_reduce(module(batch))


def check(tasks: list[Task], peers: Peers) -> str:
    return str(
        check_forwards(share(tasks, peers.rank, peers.size), averages([t.expert for t in tasks]), Context(peers=peers))
    )


def test_a_forward_that_waits_for_other_processes_is_an_error_and_no_hang(tmp_path: Path) -> None:
    """With 5 batches, one process would run one forward more than the other."""
    tasks = mixture(5)
    assert (
        processes(2, lambda peers: check(tasks, peers), tmp_path)
        == ["compared with plain forwards of all 2 tasks, at 4 layers"] * 2
    )
    tasks[1].call = gathers
    (tmp_path / "second").mkdir()
    for error in processes(2, lambda peers: check(tasks, peers), tmp_path / "second"):
        assert isinstance(error, MergeError)
        (problem,) = error.problems
        assert problem.startswith("task 'task1': Mixture communicates with the other processes in its forward (c10d.")
        assert "calibration_step(batch)" in problem


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


RULES = {
    "two-sided": ChainOptions(),
    "one-sided": ChainOptions(target="merged"),
    "regmean": ChainOptions("expert", "merged"),
}
RULES["private biases"] = ChainOptions(private_biases=True, residual=True)
RULES["refitted"] = ChainOptions(refit_heads=True)
RULES["balance"] = ChainOptions(balance=True)
RULES["by similarity"] = ChainOptions(by_similarity=True)
SENSITIVE = ChainOptions(sensitivity="numbers")


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
            assert other.similarity == pytest.approx(ours.similarity, rel=1e-5)
        for name, value in expected.items():
            assert relative(merged[name], value) < 1e-6, name
            assert torch.equal(merged[name], results[0][0][name]), name


@pytest.mark.parametrize(
    ("name", "residual"), [("BERT", False), ("ViT", False), ("U-Net", False), ("swin_t", False), ("ViT", True)]
)
def test_architectures_are_merged_as_by_one(name: str, residual: bool, tmp_path: Path) -> None:
    tasks, rule = zoo(name), ChainOptions(residual=residual)
    expected, records = merge(tasks, rule, Peers())
    assert any(r.corrected_for for r in records) == residual
    for merged, theirs in processes(2, lambda peers: merge(tasks, rule, peers), tmp_path):
        assert [(r.name, r.parameters, r.buffers, r.corrected_for, r.uncorrected) for r in theirs] == [
            (r.name, r.parameters, r.buffers, r.corrected_for, r.uncorrected) for r in records
        ]
        assert any(r.shared_with for r in theirs) or name in ("U-Net", "swin_t")
        for own, value in expected.items():
            assert relative(merged[own], value) < 1e-6, own


def test_sensitivities_are_those_of_all_processes(tmp_path: Path) -> None:
    tasks = mixture()
    expected, records = merge(tasks, SENSITIVE, Peers())
    plain, _ = merge(tasks, ChainOptions(), Peers())
    assert any(record.cg_steps for record in records)
    assert any(relative(plain[name], value) > 1e-3 for name, value in expected.items())
    for merged, theirs in processes(2, lambda peers: merge(tasks, SENSITIVE, peers), tmp_path):
        assert [record.name for record in theirs] == [record.name for record in records]
        for name, value in expected.items():
            assert relative(merged[name], value) < 1e-4, name


def test_identical_experts_come_back_from_several_processes(tmp_path: Path) -> None:
    tasks = mixture()
    twins = [Task(task.name, tasks[0].expert, task.batches) for task in tasks]
    for merged, _ in processes(2, lambda peers: merge(twins, ChainOptions(), peers), tmp_path):
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
    results = processes(2, lambda peers: merge(broken, ChainOptions(), peers), tmp_path)
    assert isinstance(results[culprit], ValueError)
    assert isinstance(results[1 - culprit], PeerError)
    assert f"process {culprit} of 2 failed: ValueError: this batch is broken" in str(results[1 - culprit])
    assert f"batch {2 + culprit}" in str(results[1 - culprit])


def _die(culprit: int) -> None:
    if dist.get_rank() == culprit:
        os.kill(os.getpid(), signal.SIGKILL)


class Mortal(Classifier):
    """Dies in its calibration forward or in a validation."""

    place, culprit = "", 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.place == ("validation" if type(self.trainer) is Trainer else "forward"):  # or a view of it
            _die(self.culprit)
        super().validation_step(batch, batch_idx)


class MortalData(TensorDataset):
    place, culprit = "", 0

    def __getitem__(self, index: int) -> Any:
        if self.place == "loading":
            _die(self.culprit)
        return super().__getitem__(index)  # type: ignore[no-untyped-call]


def _dying(place: str, culprit: int) -> None:
    """Kill a process at some place of its merge."""
    for mortal in (Mortal, MortalData):
        mortal.place, mortal.culprit = place, culprit
    for holder, name in ((merging, "early_peers"), (fitting, "solve_or_average"), (ProcessGroup, "add")):
        if place == name:
            _wrap(holder, name, culprit)
    if place == "broadcast":
        _wrap(ProcessGroup, "broadcast", culprit)


def _wrap(holder: Any, name: str, culprit: int) -> None:
    original = getattr(holder, name)

    def dies(*args: Any, **kwargs: Any) -> Any:
        if name != "early_peers":
            _die(culprit)
        result = original(*args, **kwargs)
        _die(culprit)
        return result

    setattr(holder, name, dies)


def _host(rank: int, size: int, port: int, place: str, culprit: int, folder: str) -> None:
    """One of several processes that were started from outside, as ``torchrun`` does."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="1")
    _dying(place, culprit)
    experts: Any = {task: Mortal(3) for task in "abc"}
    loader = DataLoader(MortalData(torch.randn(40, 6), torch.arange(40) % 3), 4)
    tasks = MergeDataModule({task: TaskLoaders(val=loader) for task in "abc"}, num_samples=24)
    trainer = MergeTrainer(logger=False, enable_progress_bar=False, accelerator="cpu", devices=size, strategy="ddp")
    try:
        trainer.merge(Mortal(3), tasks, experts, output_dir=f"{folder}/merged")
    except BaseException as error:
        told = [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
        Path(folder, f"{rank}.txt").write_text("\n".join(told))
        raise SystemExit(1) from error


PLACES = ["early_peers", "loading", "forward", "add", "solve_or_average", "broadcast", "validation"]


@pytest.mark.parametrize(
    ("place", "size", "culprit"),
    [
        *((place, 2, number % 2) for number, place in enumerate(PLACES)),
        ("forward", 3, 0),
        ("broadcast", 3, 1),
        ("validation", 2, 1),
    ],
)
def test_a_process_that_is_killed_ends_all(place: str, size: int, culprit: int, tmp_path: Path) -> None:
    port = free_port()
    context = mp.get_context("fork")
    hosts = [context.Process(target=_host, args=(n, size, port, place, culprit, str(tmp_path))) for n in range(size)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(120)  # they would wait for half an hour; some wait for FAILURE_TIMEOUT seconds
    try:
        assert [host.exitcode for host in hosts] == [-signal.SIGKILL if n == culprit else 1 for n in range(size)]
    finally:
        for host in hosts:
            host.kill()
    if place == "validation":  # the same command goes on
        assert not (tmp_path / "merged").exists()
        assert any((tmp_path / ".merged.partial" / "journal").iterdir())
    for rank in set(range(size)) - {culprit}:
        told = (tmp_path / f"{rank}.txt").read_text()
        # A validation of Lightning's own raises what Lightning raises, with our words as a note.
        assert told.startswith("PeerError: ") or place == "validation", told
        assert "has ended without an error message. It was killed, most often because memory ran out" in told
        assert f"{culprit} of {size} (pid {hosts[culprit].pid} on " in told
        assert size > 2 or f"process {culprit} of" in told


def _fails_early(peers: Peers) -> None:
    if peers.rank == 1:
        peers.report_failure(ValueError("told in the store"))
        dist.destroy_process_group()
        os._exit(1)
    peers.broadcast(torch.zeros(3), 1)  # while the other is in an exchange


@pytest.mark.parametrize("apart", [False, True])
def test_processes_that_are_not_in_an_exchange_hear_of_a_failure(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends them, within the time that the one that failed waits for them."""
    monkeypatch.setattr("com_lightning.core.sweep.distributed.FAILURE_TIMEOUT", 1.0)
    if apart:  # as where tensors go through NCCL
        monkeypatch.setattr(dist, "get_backend", lambda *group: "gloo" if group else "nccl")
    context = mp.get_context("fork")
    arguments = (2, str(tmp_path / "store"), _fails_early, str(tmp_path))
    hosts = [context.Process(target=_process, args=(rank, *arguments)) for rank in range(2)]
    for host in hosts:
        host.start()
    for host in hosts:
        host.join(60)
    codes = [host.exitcode for host in hosts]
    for host in hosts:
        host.kill()
    assert None not in codes  # both had ended
    error = torch.load(tmp_path / "0.pt", weights_only=False)
    assert isinstance(error, PeerError)
    assert str(error) == "process 1 of 2 failed: ValueError: told in the store"


def test_what_fails_in_all_processes_is_told_by_each(tmp_path: Path) -> None:
    def work(peers: Peers) -> None:
        with together(peers):
            raise ValueError(f"in {peers.rank}")

    assert [str(error) for error in processes(2, work, tmp_path)] == ["in 0", "in 1"]


def with_bad_batches(*places: tuple[int, int]) -> list[Task]:
    tasks = mixture()
    for task, batch in places:
        tasks[task].batches[batch][0, 1] = float("nan")
    return tasks


def merge_skipping(tasks: list[Task], peers: Peers) -> tuple[dict[str, Tensor], list[SkippedBatch]]:
    merged, run = averages([task.expert for task in tasks]), Context(peers=peers, on_bad_batch="skip")
    merge_layers(share(tasks, peers.rank, peers.size), merged, [0.25, 0.75], ChainOptions(), run)
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
    os.environ["MASTER_PORT"] = str(free_port())
    yield {"accelerator": "cpu", "devices": 2, "strategy": "ddp_fork"}
    os.environ.clear()
    os.environ.update(environment)


def test_a_trainer_with_two_processes_merges_as_one(forked: dict[str, Any], tmp_path: Path) -> None:
    experts = dict(zip("abc", make_experts((3, 3, 3))))  # one process validates more of them than the other
    folders = []
    for name, settings in {"one": {}, "two": forked}.items():
        data = {task: make_data(seed, count=60 + 20 * seed) for seed, task in enumerate("abc")}
        tasks = MergeDataModule(data, num_samples=37, batch_size=8)
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
    assert reports[1]["held_out"] == reports[0]["held_out"] == {"a": False, "b": True, "c": True}
    assert reports[1]["overlap"] == reports[0]["overlap"] == {"a": 37, "b": 0, "c": 0}
    assert [layer["rows"] for layer in reports[1]["layers"]] == [layer["rows"] for layer in reports[0]["layers"]]


def test_what_comes_back_from_processes_of_their_own_is_a_folder(
    forked: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    experts = dict(zip("ab", make_experts((3, 3))))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    merger = ChainOfMergesCallback(dict(experts))
    with pytest.raises(Exception, match="output_dir: the processes of this strategy end with the merge"):
        quiet_trainer(callbacks=[merger], **forked).validate(Classifier(3), datamodule=tasks, verbose=False)
    trainer = MergeTrainer(logger=False, enable_progress_bar=False, **forked)
    sources: Any = experts
    trainer.merge(Classifier(3), tasks, sources, output_dir=str(tmp_path / "merged"))
    assert (tmp_path / "merged" / "merged.ckpt").is_file()
    assert "Merge of 2 experts" in capfd.readouterr().out


def test_strategies_that_shard_are_refused() -> None:
    strategy = ModelParallelStrategy()
    trainer = MergeTrainer(logger=False, accelerator="cpu", devices=2, strategy=strategy)
    experts: Any = dict(zip("ab", make_experts((3, 3))))
    tasks = MergeDataModule({"a": make_data(0), "b": make_data(1)}, num_samples=16)
    with pytest.raises(MergeError, match="ModelParallelStrategy may keep a part of the model"):
        trainer.merge(Classifier(3), tasks, experts)


def test_a_sample_is_dealt_out_without_padding() -> None:
    tasks = MergeDataModule({"a": make_data(0)}, num_samples=37, batch_size=8)
    tasks.setup("validate")
    whole = tasks.calibration("a")
    shares = [tasks.calibration("a", peers=Alike(rank, 3)) for rank in range(3)]
    assert sorted(number for part in shares for number in part.numbers) == whole.numbers == [0, 1, 2, 3, 4]
    for part in shares:
        assert part.samples == whole.samples == 37
        for number, (batch, _) in zip(part.numbers, part.batches):
            assert all(torch.equal(a, b) for a, b in zip(batch, whole.batches[number][0]))


@pytest.mark.parametrize("method", [Fisher(), Fisher(normalize=True), AdaMerging(8), LOT(), FeatCal(), ESM()], ids=str)
def test_rules_that_differentiate(method: MergingMethod, tmp_path: Path) -> None:
    base, experts = gradients.made()
    one, _, _ = gradients.run(method, gradients.tasks_of(experts, 5), base)

    def work(peers: Peers) -> dict[str, Tensor]:
        tasks = gradients.tasks_of(experts, 5)
        parts = share(tasks, peers.rank, peers.size)
        for part, task in zip(parts, tasks):
            part.loss, part.predict, part.size = task.loss, task.predict, task.size
        return gradients.run(method, parts, base, peers)[0]

    for result in processes(2, work, tmp_path):
        assert isinstance(result, dict), result
        gradients.close(result, one, 1e-6 if isinstance(method, (LOT, FeatCal, ESM)) else 1e-9)
