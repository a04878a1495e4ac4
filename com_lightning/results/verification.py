"""Compare what was written with the module in memory, as a user would load it.

A merged module is validated in memory, and used from files. Its class, its configuration and what it computes when it
is made may turn the same weights into another model, so :func:`verify` loads each file again, with nothing from memory
but the class, and compares tensors, settings and the outputs of all submodules on one calibration batch. What differs
is a warning, and what could not be compared is said.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from com_lightning.core.sweep.task import Task
from com_lightning.core.tensors.allocator import free_memory
from com_lightning.core.tensors.modules import copy_on_same_storage, named_tensors
from com_lightning.data.steps import shortened
from com_lightning.errors import reason
from com_lightning.experts.adapters import merge_adapter
from com_lightning.experts.load import take_precision
from com_lightning.experts.owner import differing_tensors, load_by_class
from com_lightning.experts.settings import computed_buffers, described, differing, settings_of
from com_lightning.experts.state_dicts import plain, some, submodule
from com_lightning.experts.transformers_models import load_pretrained
from com_lightning.results.corrections import BASE, BASE_CHECKPOINT, load_on_base

_SAMPLED = 256
"""Values of each output that are compared."""

Outputs = list[tuple[str, Tensor]]
"""Name of each submodule that was called -> a sample of its output, in the order of the calls."""


@dataclass
class Trial:
    """A calibration forward that can be repeated on any module of a task.

    Attributes:
        task: name of the task.
        batch: a few calibration samples, on the CPU.
        call: runs it, ``call(module, batch, 0)``.
        prepare: runs what comes before the first batch, if anything does.
        move: moves a module to the device and the precision of its forwards.
        device: that device.
    """

    task: str
    batch: Any
    call: Callable[[nn.Module, Any, int], object]
    prepare: Callable[[nn.Module], object] | None
    move: Callable[[nn.Module], nn.Module]
    device: torch.device

    @classmethod
    def of(cls, task: Task, device: torch.device) -> Trial | None:
        """The trial with the first samples of a task; ``None`` if it has none."""
        if not task.batches:
            return None
        batch = move_data_to_device(shortened(task.batches[0]), torch.device("cpu"))
        return cls(task.name, batch, task.call, task.prepare, task.move, device)

    def outputs(self, module: nn.Module) -> Outputs:
        """Run the forward, with the same random draws each time.

        Args:
            module: it is changed and moved.

        Returns:
            What its submodules return. Of each tensor of floating-point numbers at most 256 values are taken.
        """
        running = self.move(module).eval()
        result: Outputs = []

        def record(name: str) -> Callable[..., None]:
            def hook(part: nn.Module, inputs: Any, output: Any) -> None:
                apply_to_collection(output, Tensor, lambda tensor: result.append((name, _sample(tensor))))

            return hook

        for name, part in running.named_modules():
            part.register_forward_hook(record(plain(name)))
        with kept_draws(0, self.device), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            if self.prepare is not None:
                self.prepare(running)
            self.call(running, move_data_to_device(self.batch, self.device), 0)
        return result


@contextmanager
def kept_draws(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Give all random generators back as they were, and seed them meanwhile if a seed is given."""
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng([device] if device is not None and device.type == "cuda" else []):
        if seed is not None:
            torch.manual_seed(seed)
            random.seed(seed)
            numpy.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@dataclass
class Findings:
    """What a comparison found.

    Attributes:
        checks: what was compared, and what could not be. Files of which the same is to be said share a line.
        warnings: what differs, and what to do.
    """

    warnings: list[str] = field(default_factory=list)
    _of_files: dict[str, list[str]] = field(default_factory=dict)
    """What is said of files -> their names."""

    @property
    def checks(self) -> list[str]:
        return [f"{some(names, most=8)}: {text}" for text, names in self._of_files.items()]

    def add(self, label: str, text: str) -> None:
        """Say what was compared of a file, or what could not be."""
        self._of_files.setdefault(text, []).append(label)


def verify(
    checkpoints: Mapping[Path, tuple[str, LightningModule]],
    folders: Mapping[Path, tuple[str, nn.Module, str]],
    trials: Mapping[str, Trial],
    adapters: Mapping[Path, tuple[str, nn.Module, str]] | None = None,
) -> Findings:
    """Load what was written as a user would, and compare it with the modules in memory.

    Args:
        checkpoints: Lightning checkpoint -> task and its module.
        folders: folder of ``save_pretrained`` -> task, its module, and the name of the transformers model in it.
        trials: task -> a calibration forward, for those that have one.
        adapters: folder of an adapter of PEFT -> task, its module, and the name of the model in it that the adapter
            makes. Their base lies beside them.

    Returns:
        What was found.
    """
    found = Findings()
    expected: dict[int, tuple[Outputs, str]] = {}
    for path, (task, module) in checkpoints.items():
        advice = "Build the module as the expert was built, and load the file's state_dict into it"
        advice += ", or take its network from `transformers`" if folders else ""
        load: Callable[[], nn.Module] = partial(load_by_class, path, module)
        how = f"{type(module).__name__}.load_from_checkpoint"
        _compare(found, _Written(path.name, how, load, advice, module, "", trials.get(task), expected))
    for path, (task, outer, place) in folders.items():
        label = path.relative_to(next(iter(checkpoints)).parent).as_posix()
        load = partial(load_pretrained, path, label)
        how = f"{type(submodule(outer, place)[1]).__name__}.from_pretrained"
        advice = "Take the weights from the checkpoint"
        _compare(found, _Written(label, how, load, advice, outer, place, trials.get(task), expected))
    for path, (task, outer, place) in (adapters or {}).items():
        label, base = f"{path.parent.name}/{task}", path.parent / (BASE if place else BASE_CHECKPOINT)
        assert isinstance(outer, LightningModule)
        load = partial(load_pretrained, base, base.name) if place else partial(load_by_class, base, outer)
        how = f"PeftModel.from_pretrained on {base.name}"
        advice = f"Take the task's module from {task}.ckpt"
        written = _Written(label, how, load, advice, outer, place, trials.get(task), expected, path)
        _compare(found, written)
    return found


@dataclass
class _Written:
    """A checkpoint, or a folder of ``save_pretrained``.

    Attributes:
        label: names it in messages.
        how: the function that a user would load it with.
        load: loads it.
        advice: what to do if that gives something else.
        module: the module in memory.
        place: name of the part of it that was written.
        trial: a calibration forward, if there is one.
        expected: ``id`` of a module in memory -> its outputs, and why there are none.
        adapter: the folder of an adapter that is loaded on what ``load`` gives. Tensors are then sums, and equal up to
            rounding.
    """

    label: str
    how: str
    load: Callable[[], nn.Module]
    advice: str
    module: nn.Module
    place: str
    trial: Trial | None
    expected: dict[int, tuple[Outputs, str]]
    adapter: Path | None = None


def _compare(found: Findings, written: _Written) -> None:
    """Compare a module, or a part of it, with what was written of it."""
    label, how, part = written.label, written.how, submodule(written.module, written.place)[1]
    size = sum(4 * tensor.numel() for _, tensor, _ in named_tensors(part))
    free = free_memory(torch.device("cpu"))
    if free is not None and 1.5 * size > free:
        found.add(label, f"not compared, because that takes {1.5 * size / 2**30:.1f} GiB of memory")
        return
    try:
        with kept_draws(), warnings.catch_warnings():  # making a module draws random weights
            warnings.simplefilter("ignore")
            loaded = written.load()
            merge_adapter(loaded, label)  # as in memory; what is left of adapters computes nothing
    except Exception as error:  # the user's class decides what it can load
        found.add(label, f"not compared, because {how} cannot load it ({reason(error)})")
        return
    if written.adapter:
        try:
            with kept_draws(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loaded = load_on_base(loaded, written.adapter, part)
        except Exception as error:  # of PEFT
            found.warnings.append(f"{label}: {how} cannot load it ({reason(error)}). {written.advice}")
            found.add(label, f"{how} cannot load it, see the warning")
            return
    take_precision(loaded, part)
    unsaved = [] if written.place else _left_out(part)
    tensors = [name for name in differing_tensors(part, loaded, bool(written.adapter)) if name not in unsaved]
    settings = differing({"memory": settings_of(part), "the file": settings_of(loaded)})
    outputs, why_not = (None, "weights are missing") if unsaved else _differing_outputs(written, loaded)
    differences = [f"{some(tensors, most=3)} {'has' if len(tensors) == 1 else 'have'} other values"] * bool(tensors)
    if settings and outputs != "":
        differences.append(described(settings))
    if outputs:
        differences.append(outputs)
    if differences:
        found.warnings.append(
            f"{label}: loaded by {how}, it is not the module in memory: {'; '.join(differences)}. {written.advice}"
        )
        found.add(label, f"loaded by {how}, it is not the module in memory, see the warning")
        return
    count = len(dict.fromkeys(name for name, _, _ in named_tensors(part))) - len(unsaved)
    tensors_told = f"its {count:,} tensors{' (up to rounding)' * bool(written.adapter)}"
    *others, last = [tensors_told, *["settings"] * (not settings), *["outputs"] * (outputs == "")]
    same = f"{', '.join(others)} and {last}" if others else last
    text = f"loaded by {how}, {same} are those in memory"
    text += f"; without {some(unsaved, most=3)}, which the class leaves out of its checkpoints" if unsaved else ""
    found.add(label, text + (f"; outputs were not compared ({why_not})" if why_not else ""))


def _left_out(module: nn.Module) -> list[str]:
    """Names of parameters and buffers that a class leaves out of its checkpoints on its own account."""
    saved, computed = module.state_dict().keys(), computed_buffers(module)
    return [name for name, _, _ in named_tensors(module) if name not in saved and name not in computed]


def _differing_outputs(written: _Written, loaded: nn.Module) -> tuple[str | None, str]:
    """Compare the outputs of all submodules.

    Returns:
        What differs in words, empty if nothing does, and ``None`` if they were not compared; and then, why not.
    """
    trial, module = written.trial, written.module
    if trial is None:
        return None, "no calibration batch is at hand"
    if id(module) not in written.expected:
        written.expected[id(module)] = _expected(trial, module)
    expected, why_not = written.expected[id(module)]
    if why_not:
        return None, why_not
    other = loaded
    if written.place:
        other = copy_on_same_storage(module)
        other.set_submodule(submodule(other, written.place)[0], loaded)
    try:
        actual = trial.outputs(other)
    except Exception as error:
        return f"its calibration forward fails ({reason(error)})", ""
    for (name, one), (called, two) in zip(expected, actual):
        if name != called or one.shape != two.shape:
            return f"its calibration forward goes on otherwise at {name or 'the end'}", ""
        precision = torch.finfo(one.dtype).eps ** 0.5
        one, two = (torch.nan_to_num(value.double(), nan=0.0, posinf=1e30, neginf=-1e30) for value in (one, two))
        distance = float((one - two).norm() / one.norm().clamp_min(1e-30))
        if distance > precision:
            return f"the outputs of {name or 'the module'} differ by {100 * distance:.2g} %", ""
    return ("" if len(expected) == len(actual) else "its calibration forward calls other submodules"), ""


def _expected(trial: Trial, module: nn.Module) -> tuple[Outputs, str]:
    """The outputs in memory, and why there are none."""
    try:
        outputs = trial.outputs(copy_on_same_storage(module))
    except Exception as error:  # the user's code
        return [], f"in memory, {reason(error)}"
    return outputs, "" if outputs else "the calibration forward calls no submodule"


def _sample(tensor: Tensor) -> Tensor:
    """A few values from all over a tensor. Other numbers than those with a fraction are left out."""
    if not tensor.is_floating_point() or tensor.layout is not torch.strided or tensor.is_nested:
        return torch.empty(0)
    flat = tensor.detach().reshape(-1)
    return flat[:: max(flat.numel() // _SAMPLED, 1)][:_SAMPLED].clone().cpu()
