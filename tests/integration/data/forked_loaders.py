"""Loaders that share out their data. Run by test_loaders.py in an interpreter of its own: processes are forked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset

from com_lightning import ChainOfMergesCallback, MergeDataModule
from tests.helpers import Classifier, free_port, make_data, make_experts, quiet_trainer, relative

COUNT = 47  # an odd number: a DistributedSampler repeats a sample


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Stream(IterableDataset[Any]):
    """Each process reads its own share."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        rank, size = place()
        return (self.dataset[index] for index in range(rank, COUNT, size))


class Data(LightningDataModule):
    def __init__(self, seed: int, kind: str) -> None:
        super().__init__()
        self.kind, self.dataset = kind, make_data(seed, count=COUNT).val_dataloader().dataset
        self.calls = 0

    def val_dataloader(self) -> Any:
        self.calls += 1
        rank, size = place()
        if self.kind == "stream":
            return DataLoader(Stream(self.dataset), 8)
        if self.kind == "split":
            order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(rank)).tolist()
            return DataLoader(Subset(self.dataset, order[:30]), 8)
        if self.kind == "unseeded split":
            return DataLoader(Subset(self.dataset, torch.randperm(COUNT)[:30].tolist()), 8)
        sampler: DistributedSampler[Any] = DistributedSampler(self.dataset, size, rank, shuffle=self.kind == "shuffled")
        return DataLoader(self.dataset, 8, sampler=sampler if self.kind != "plain" else None)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    os.environ["MASTER_PORT"] = str(free_port())
    yield
    os.environ.clear()
    os.environ.update(before)


def merged(kind: str, devices: int, folder: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tasks = MergeDataModule({"a": Data(0, kind), "b": Data(1, kind)}, **options)
    merger = ChainOfMergesCallback(dict(zip("ab", make_experts((3, 3)))), private=[], output_dir=str(folder))
    strategy: dict[str, Any] = {"devices": 2, "strategy": "ddp_fork"} if devices == 2 else {}
    trainer = quiet_trainer(callbacks=[merger], precision="64-true", **strategy)
    trainer.validate(Classifier(3), datamodule=tasks, verbose=False)
    return load_file(folder / "merged.safetensors"), json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("shuffled", {"num_samples": COUNT}), ("ordered", {"num_samples": 20, "holdout": True})],
)
def test_a_distributed_sampler_changes_nothing(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    one, report = merged("plain", 1, tmp_path / "one", **options)
    two, theirs = merged(kind, 2, tmp_path / "two", **options)
    assert theirs["samples"] == report["samples"] == dict.fromkeys("ab", options["num_samples"])
    assert theirs["overlap"] == report["overlap"] == dict.fromkeys("ab", 0 if options.get("holdout") else COUNT)
    for task in "ab":  # validated on all samples, once each
        assert theirs["metrics"]["expert"][task] == pytest.approx(report["metrics"]["expert"][task], rel=1e-6)
    for name, value in one.items():
        assert relative(two[name], value) < 1e-6, name


def test_a_stream_that_is_shared_out_is_read_whole(tmp_path: Path) -> None:
    one, _ = merged("plain", 1, tmp_path / "one", num_samples=COUNT)
    two, report = merged("stream", 2, tmp_path / "two", num_samples=COUNT)
    assert report["samples"] == dict.fromkeys("ab", COUNT)
    assert sum("its val loader gives each of the 2 processes other data" in text for text in report["warnings"]) == 2
    for name, value in one.items():
        assert relative(two[name], value) < 1e-6, name
    _, report = merged("stream", 2, tmp_path / "few", num_samples=16)
    assert report["samples"] == {"a": 16, "b": 16}


def test_a_split_of_its_own_in_each_process_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="task 'a': its val loader goes through other samples in each process"):
        merged("split", 2, tmp_path / "two", num_samples=20)


def test_all_processes_ask_for_a_loader_from_one_random_state(tmp_path: Path) -> None:
    _, report = merged("unseeded split", 2, tmp_path / "two", num_samples=20, holdout=True)
    assert report["overlap"] == {"a": 0, "b": 0}
