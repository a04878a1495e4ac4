"""Several processes, forked, that work on their share of each task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from com_lightning.core.sweep.distributed import Peers, ProcessGroup
from com_lightning.core.sweep.task import Task


def share(tasks: list[Task], rank: int, size: int) -> list[Task]:
    """What a process gets of the tasks' batches."""
    mine = [range(rank, len(task.batches), size) for task in tasks]
    return [
        Task(task.name, task.expert, [task.batches[n] for n in numbers], task.call, task.masks, numbers)
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
