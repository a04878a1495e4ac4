"""The interface of every merging rule: what it gets and what it returns."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from com_lightning.arguments import checked
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, Task

Need = Literal["data", "loss", "base"]
Importance = dict[str, float] | Literal["similarity"] | None
"""Task -> its weight, relative to the others; or how it is computed. ``None``: all tasks count alike."""


@dataclass
class MergeJob:
    """The experts to merge, and the place for the result.

    Attributes:
        tasks: the experts and their calibration batches. There are no batches if the rule does not need data.
        merged: full name of each shared parameter or buffer -> the tensor to write its merged value into. It holds the
            average of the experts, weighted by the rule's task importance, if the rule asks for that. Otherwise the
            parameters hold arbitrary values.
        context: how the merge is carried out.
        base: the same names -> value in the model that the experts were fine-tuned from. ``None`` unless the rule needs
            the base.
        device: where to compute. ``None``: where the merged tensors are. Experts may be elsewhere if the rule needs no
            data, so that they do not have to fit there.
        task_tensors: name of a shared parameter -> its value for each task, if the rule keeps one for each. Filled by
            the rule.
        heads: task -> name of a private parameter -> its value, if the rule solves it for the merged model. Filled by
            the rule, with an entry for each task, if it solves private layers at all.
        warnings: for the report. Filled by the rule.
    """

    tasks: Sequence[Task]
    merged: Mapping[str, Tensor]
    context: Context = field(default_factory=Context)
    base: Mapping[str, Tensor] | None = None
    device: torch.device | None = None
    task_tensors: dict[str, list[Tensor]] = field(default_factory=dict)
    heads: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass
class ParameterRecord(LayerRecord):
    """A parameter that a rule has merged by itself, not as part of a layer. ``layer_type`` is the rule's name."""


class MergingMethod(ABC):
    """A rule that merges experts into one set of shared parameters.

    A rule is a class with settings. The attributes below say what it needs and how it works.

    Args:
        importance: task -> its weight, relative to the others. The default is uniform.
    """

    needs: Set[Need] = frozenset({"data"})
    """What the rule reads beside the experts' weights: ``"data"`` (calibration batches), ``"loss"`` (what
    ``training_step`` returns for them, sample by sample), ``"base"`` (the weights that the experts were fine-tuned
    from)."""
    options: ChainOptions | None = None
    """How layers are solved, if the rule merges layer by layer with the sweep. ``None``: it merges parameters."""
    starts_from_average: bool = True
    """Whether ``job.merged`` holds the average of the experts at first. If not, the rule writes all parameters."""
    size_settings: tuple[str, ...] = ("private_biases", "rank", "task_rank", "task_share")
    """Names of settings that change how much each task keeps for itself, if the rule has them. A comparison does not
    choose between their values, but reports each."""
    separable: bool = True
    """Whether the rule can merge some of the parameters and leave the others alone."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Settings of a wrong type, such as ``null`` in a configuration, are an error where a rule is made."""
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = checked(cls.__init__)  # type: ignore[method-assign]

    @checked
    def __init__(self, importance: Importance = None) -> None:
        self.importance = importance

    @property
    def runs_calibration_forwards(self) -> bool:
        """Whether the rule runs the module's calibration step on the tasks' data."""
        return self.options is not None

    @property
    def merges_layers(self) -> bool:
        """Whether shared parameters are merged layer by layer, and not one by one."""
        return self.options is not None

    @property
    def has_corrections(self) -> bool:
        """Whether each task gets a correction of low rank of the shared weights."""
        return bool(self.options and (self.options.task_rank or self.options.task_share))

    @property
    def refits_heads(self) -> bool:
        """Whether private layers are fitted to the merged model."""
        return bool(self.options and self.options.refit_heads)

    @abstractmethod
    def merge(self, job: MergeJob) -> list[LayerRecord]:
        """Write the merged values into ``job.merged``, and return what happened at each layer, in order."""

    def weights(self, tasks: Sequence[str]) -> list[float]:
        """Return the importance of tasks, in the order of ``tasks``, with a sum of one: uniform, if it is computed.

        Example::

            >>> from com_lightning import Average
            >>> Average(importance={"a": 3, "b": 1}).weights(["b", "a"])
            [0.25, 0.75]
        """
        given = self.given_importance()
        if not given:
            return [1.0 / len(tasks)] * len(tasks)
        total = sum(given[task] for task in tasks)
        return [given[task] / total for task in tasks]

    def given_importance(self) -> Mapping[str, float]:
        """Task -> its weight, as it was given; empty if all tasks count alike, or their importance is computed."""
        return {} if self.importance is None or isinstance(self.importance, str) else self.importance

    def problems(self, tasks: Sequence[str]) -> list[str]:
        """What is wrong with the rule's settings for these tasks, each problem as one sentence."""
        if self.importance is None:
            return []
        if isinstance(self.importance, str):
            if self.options and self.options.by_similarity:
                return []
            return [f"importance: {type(self).__name__} cannot compute it by {self.importance}; give weights"]
        problems = []
        if missing := [task for task in tasks if task not in self.importance]:
            problems.append(f"importance: no weight for {', '.join(missing)}; give every task one, 0 leaves a task out")
        if unknown := [task for task in self.importance if task not in tasks]:
            problems.append(f"importance: {', '.join(unknown)} is no task; the tasks are {', '.join(tasks)}")
        if not (all(0 <= w < math.inf for w in self.importance.values()) and sum(self.importance.values()) > 0):
            problems.append(f"importance: weights must be finite, not negative, and not all 0; got {self.importance}")
        return problems

    def describe(self) -> dict[str, Any]:
        """Class and settings in plain values, for reports and for what a merge depends on."""
        settings = {
            name: value.describe() if isinstance(value, MergingMethod) else value
            for name, value in vars(self).items()
            if name not in MergingMethod.__annotations__
        }
        return {"class": type(self).__name__, **settings}

    def __repr__(self) -> str:
        """Return the rule as Python code, with those settings that differ from their defaults.

        Example::

            >>> from com_lightning import TIES
            >>> TIES(density=0.1)
            TIES(density=0.1)
        """
        settings = {**self.describe(), **{n: v for n, v in vars(self).items() if isinstance(v, MergingMethod)}}
        defaults = {name: parameter.default for name, parameter in inspect.signature(type(self)).parameters.items()}
        changed = [
            f"{n}={settings[n]!r}" for n, default in defaults.items() if n in settings and settings[n] != default
        ]
        return f"{type(self).__name__}({', '.join(changed)})"
