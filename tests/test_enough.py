"""Calibrating with no more samples than help."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from com_lightning import ChainOfMerges, ChainOfMergesCallback, MergeDataModule
from com_lightning.core.sweep.context import Run
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.methods import MergeJob
from tests.helpers import built, make_data, make_experts, quiet_trainer, relative
from tests.processes import processes, share


def _network() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3))


def _tasks(batches: int, rank: int) -> list[Task]:
    """Inputs of a subspace, so that few rows may tell all."""
    torch.manual_seed(0)
    experts = [expert.requires_grad_(False) for expert in built(_network)]
    inputs = [[torch.randn(4, rank) @ mix for _ in range(batches)] for mix in torch.randn(2, rank, 24) / rank**0.5]
    return [Task(f"task{n}", expert, own, size=len) for n, (expert, own) in enumerate(zip(experts, inputs))]


def _job(tasks: list[Task], peers: Peers | None = None) -> tuple[MergeJob, list[LayerRecord]]:
    states = [dict(task.expert.named_parameters()) for task in tasks]
    merged: dict[str, Tensor] = {n: nn.Parameter((states[0][n] + states[1][n]) / 2, False) for n in states[0]}
    reported: list[LayerRecord] = []
    return MergeJob(tasks, merged, Run(reported.append, peers or Peers())), reported


@pytest.mark.parametrize(("rank", "used"), [(1, 16), (24, 64)])
def test_it_stops_when_more_do_not_help(rank: int, used: int) -> None:
    job, reported = _job(_tasks(16, rank))
    records = ChainOfMerges(enough=0.1).merge(job)
    assert job.used == {"task0": used, "task1": used}
    assert [record.rows for record in reported] == [job.used] * 3  # one round is told, the last
    assert [record.name for record in records] == [record.name for record in reported]


def test_the_result_is_that_of_the_samples_used() -> None:
    tasks = _tasks(16, 1)
    job, _ = _job(tasks)
    ChainOfMerges(enough=0.1, private_biases=True).merge(job)
    part = [Task(task.name, task.expert, task.batches[:4]) for task in tasks]
    alone, _ = _job(part)
    ChainOfMerges(private_biases=True).merge(alone)
    for name, tensor in alone.merged.items():
        assert torch.equal(job.merged[name], tensor), name
    assert list(job.own) == list(alone.own) != []
    assert all(torch.equal(one, other) for name in job.own for one, other in zip(job.own[name], alone.own[name]))


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_few_batches_are_all_used_if_they_help(batches: int) -> None:
    job, _ = _job(_tasks(batches, 24))
    ChainOfMerges(enough=0.01).merge(job)
    assert job.used == {"task0": 4 * batches, "task1": 4 * batches}


@pytest.mark.parametrize("rank", [1, 24])
def test_processes_use_as_much_as_one(rank: int, tmp_path: Path) -> None:
    tasks = _tasks(12, rank)
    expected, _ = _job(tasks)
    ChainOfMerges(enough=0.1).merge(expected)

    def work(peers: Peers) -> tuple[dict[str, int], dict[str, Tensor]]:
        job, _ = _job([replace(task, size=len) for task in share(tasks, peers.rank, peers.size)], peers)
        ChainOfMerges(enough=0.1).merge(job)
        return job.used, dict(job.merged)

    for used, merged in processes(2, work, tmp_path):
        assert used == expected.used
        assert all(relative(merged[name], tensor) < 1e-4 for name, tensor in expected.merged.items())


def test_the_report_tells_how_many_were_used() -> None:
    data = MergeDataModule({"a": make_data(0), "b": make_data(1, 4)}, samples=48, batch_size=4)
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts())), ChainOfMerges(enough=0.9), ["head"])
    quiet_trainer(callbacks=[merger]).validate(make_experts()[0], datamodule=data, verbose=False)
    assert merger.report.samples == {"a": 12, "b": 12}


def test_it_is_a_share_of_what_is_two_sided() -> None:
    told = ChainOfMerges(target="merged", enough=1.5).problems(["a", "b"])
    assert [line.partition(":")[0] for line in told] == ["enough", "enough"]
