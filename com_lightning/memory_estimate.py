"""How much memory the calibration forwards of a merge take, measured on one batch of each task."""

from __future__ import annotations

import tempfile
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.data import extract_batch_size

from com_lightning.core.chain.dry_run import held_by_forwards, held_by_gradients
from com_lightning.core.sweep.distributed import Alike
from com_lightning.core.tensors.allocator import automatic_budget, free_memory
from com_lightning.core.tensors.placement import Offload
from com_lightning.data.datamodule import MergeDataModule
from com_lightning.execution import calibration_tasks
from com_lightning.plan import MergePlan
from com_lightning.shared_weights import average_shared
from com_lightning.validation import borrowed


def needed(
    plan: MergePlan,
    trainer: Trainer,
    data: MergeDataModule,
    memory_budget: float | Literal["auto"] | None = None,
    offload: Offload = None,
) -> str:
    """Return a text that says how much memory paused forwards will hold, and how many samples fit.

    The plan's experts are moved and converted as for the merge; nothing is merged or logged.

    Args:
        plan: what would be merged.
        trainer: whose device, precision and limits are used.
        data: the tasks' data.
        offload: what stays off the device.
        memory_budget: GiB that paused forwards may hold. ``"auto"``: as much as is free.
    """
    options = plan.method.options
    if options is None:
        return plan.need
    with (
        borrowed(trainer, validating=True, datamodule=data),
        torch.inference_mode(False),
        torch.compiler.set_stance("force_eager"),
    ):
        tasks, samples = calibration_tasks(plan, trainer, data, Alike(0, trainer.world_size), batches=1)
        merged = average_shared(plan)
        gradients = held_by_gradients(tasks, merged, options.sensitivity) if options.sensitivity else 0
        sizes = [(1 + data.augmented_copies) * size for size in held_by_forwards(tasks, merged, options)]
    counts = [len(samples[task.name].batches) for task in tasks]
    per_sample = [n / _size(samples[task.name].batches[0][0]) for n, task in zip(sizes, tasks) if task.batches]
    total = sum(size * count for size, count in zip(sizes, counts))
    device = trainer.strategy.root_device
    free = free_memory(device)
    models = "merged model and expert" if len(options.streams) > 1 else f"{options.streams[0]} model"
    most = max((sample.samples for sample in samples.values()), default=0)
    one, processes = float(sum(per_sample)), trainer.world_size
    in_each = f" in each of {processes} processes" if processes > 1 else ""
    text = (
        f"the calibration data's batches come on top.\nPaused forwards: about {_readable(total)}{in_each} for {most:,} "
        f"samples of each task ({_readable(one)} for one of each, {models})"
    )
    if free is not None and one:
        spare = max(free - plan.memory()["largest layer"], 0)
        fit = spare / one * (processes if device.type == "cuda" else 1)
        text += f"; {_readable(spare)} is free besides, enough for {fit:,.0f}"
    if gradients:
        text += f". Before that, the gradients of one batch at a time: about {_readable(gradients)}"
    where = f"files in {tempfile.gettempdir()}" if device.type == "cpu" else "host memory"
    if memory_budget == "auto":
        shared = 1 if device.type == "cuda" else trainer.num_devices
        budget = None if free is None else automatic_budget(total, free // shared, plan.memory()["largest layer"])
        if budget is not None:
            text += f". That is more than fits: {_readable(budget)} of it stays, the rest is paged to {where}"
    elif memory_budget is not None and one:
        budget = int(memory_budget * 2**30)
        rest = f"the rest is paged to {where}" if total > budget else "which is all"
        text += f". With memory_budget={memory_budget:g}, {_readable(min(total, budget))} of it stays, {rest}"
    if device.type != "cpu" and free is not None:
        text += offload_advice(plan, len(options.streams), offload, free)
    return text + "."


def offload_advice(plan: MergePlan, streams: int, offload: Offload, free: int) -> str:
    """Say what makes models fit on a device that has no room for all that would be there.

    Args:
        plan: what would be merged.
        streams: number of models that run for each task.
        offload: what stays off the device.
        free: bytes that are free there.

    Returns:
        The end of a sentence; empty if everything fits.
    """
    memory = plan.memory()
    experts = memory["experts"] if streams > 1 else 0
    largest = memory["largest layer"]
    needs: dict[Offload, int] = {
        None: memory["merged model"] + experts + largest,
        "experts": memory["merged model"] + largest,
        "layers": largest,
    }
    if needs[offload] <= free:
        return ""
    fitting = next((option for option, need in needs.items() if need <= free), None)
    models = f". On the device, {_readable(needs[offload])} of models and statistics do not fit into {_readable(free)}"
    return f"{models}; add --offload {fitting}" if fitting else f"{models}, and no offload changes that"


def _size(batch: Any) -> int:
    return max(extract_batch_size(batch), 1)


def _readable(size: float) -> str:
    for unit in ("KiB", "MiB"):
        size /= 1024
        if size < 1000:
            return f"{size:,.1f} {unit}"
    return f"{size / 1024:,.1f} GiB"
