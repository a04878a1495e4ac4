"""The options of a merge: their names, defaults, explanations and checks stand here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from com_lightning.arguments import argument_problems
from com_lightning.compat import renamed_options
from com_lightning.core.tensors.placement import Offload
from com_lightning.errors import MergeError
from com_lightning.experts.load import ExpertSource
from com_lightning.experts.state_dicts import some


@dataclass(eq=False)
class MergeOptions:
    """How experts are merged, and what is done with the result.

    Args:
        private: patterns of parameters that stay with their task ("head", "*.classifier.*"); all others are
            shared. By default a parameter is private if its name or shape differs between the experts.
        monitor: the logged metric that tables show; by default the first one that is not a loss. If it was not logged,
            the report says so and shows another one.
        mode: whether "min" or "max" of that metric is best; by default this is guessed from its name.
        baselines: also validate the experts and their plain average, for comparison.
        base: the model that the experts were fine-tuned from, in any form that an expert may have. Some methods need
            it (task arithmetic and its relatives). By default it is the given model with its current weights.
        output_dir: folder for the merged weights, one Lightning checkpoint for each task, and the report.
        overwrite: replace an existing output_dir.
        resize_embeddings: if embedding tables differ in length, give all of them the rows of the longest one. Rows that
            all experts have are merged, the others are kept. Without it, such tables are an error.
        on_bad_batch: what happens if a calibration batch, or an activation computed from it, holds NaN or infinity:
            "raise" raises an error that names task, batch and layer; "skip" leaves the batch out from that
            layer on.
        memory_budget: GiB that paused calibration forwards may hold together. What exceeds it is moved from an
            accelerator to host memory, or from the CPU to temporary files, which takes time. "auto": as much as is
            free. null (None): no limit.
        offload: what stays off the device, so that less has to fit there. "experts": each weight of an expert is
            brought there only while its forward uses it. "layers": the merged model stays off it, too, in a mapped
            file, so that one layer at a time is there. By default all models whose forwards are needed are on it.
        resume: keep a record of merged layers beside output_dir until the result is written (about as large as the
            merged model). A merge that was killed then goes on from it if it is started again with the same experts,
            data, settings and versions. Files of experts are known by size, time and a few of their values; "exact"
            compares all values, which takes as long as reading them.
        files: further text files for output_dir, name -> text.
    """

    private: list[str] | None = None
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    baselines: bool = True
    base: ExpertSource | None = None
    output_dir: str | None = None
    overwrite: bool = False
    resize_embeddings: bool = False
    on_bad_batch: Literal["raise", "skip"] = "raise"
    memory_budget: float | Literal["auto"] | None = "auto"
    offload: Offload = None
    resume: bool | Literal["exact"] = True
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.private, str):
            self.private = [self.private]
        if found := self._wrong_types():
            raise MergeError(found)

    def __repr__(self) -> str:
        """Return those options that differ from their defaults."""
        return f"{type(self).__name__}({', '.join(self.changed())})"

    def changed(self) -> list[str]:
        """Return ``name=value`` for each option that differs from its default."""
        default = vars(type(self)())
        del default["files"]  # whole texts
        values = {name: vars(self)[name] for name in default}
        plain = {name: not isinstance(value, (nn.Module, Mapping)) for name, value in values.items()}
        return [f"{n}={repr(v) if plain[n] else '...'}" for n, v in values.items() if not plain[n] or v != default[n]]

    @property
    def budget(self) -> int | None:
        """``memory_budget`` in bytes; ``None`` if there is no limit, or none yet."""
        return None if self.memory_budget in (None, "auto") else int(float(self.memory_budget) * 2**30)

    def problems(self) -> list[str]:
        """Return what is wrong with the values, each as one sentence."""
        if found := self._wrong_types():
            return found
        if self.output_dir is not None and not str(self.output_dir).strip():
            found.append("output_dir: is empty; name a folder, or leave it out")
        if self.memory_budget not in (None, "auto") and not 0 < float(self.memory_budget) < math.inf:
            found.append(f"memory_budget: must be a number of GiB above 0, got {self.memory_budget}")
        if outside := [name for name in self.files if name in ("", ".", "..") or name != Path(name).name]:
            found.append(f"files: {some(outside)} would be written outside output_dir; give plain names")
        return found

    def _wrong_types(self) -> list[str]:
        return argument_problems(type(self).__init__, vars(self))


MergeOptions.__init__ = renamed_options(MergeOptions.__init__)  # type: ignore[method-assign]
