"""What a merge did, for people (table, Markdown) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from com_lightning.core.sweep.task import LayerRecord, SkippedBatch
from com_lightning.results.tables import finite, lower_is_better, mean, number, percent, table

Metrics = Mapping[str, float]

PRIVATE_SOLVED, PRIVATE_REFITTED = "private, solved for each task", "private, solved for the merged model"
"""What became of a parameter that would be shared by default, and of one that is private anyway."""

_COMPARED = ("average", "merged")


@dataclass
class MergeReport:
    """All that is known of a merge.

    Attributes:
        method: class and settings of the merging rule.
        tasks: their names, in order.
        metric: the metric that tables show.
        metrics: ``"expert"``, ``"average"``, ``"merged"`` -> task -> metric -> value, from ``trainer.validate``.
        layers: what happened at each layer, in the order of merging.
        parameters: name of each parameter or buffer -> ``"solved"``, ``"averaged: why"``, ``"private"``,
            ``"re-estimated"`` (running statistics), ``"buffer"``, ``"folded"`` (what is left of adapters), ``"merged by
            TIES"`` or another rule that merges each parameter on its own.
        sizes: the same kinds -> number of values; private ones are summed over tasks, and those that no data reached
            are averaged.
        samples: task -> calibration samples used.
        overlap: task -> how many of them are among those validated; ``None`` where that cannot be known.
        skipped: calibration batches that were left out because they hold NaN or infinity.
        warnings: what was odd.
        seconds: of the merge, without validation.
        peak_memory: bytes: of the process on a CPU, allocated on the device otherwise.
        seed, versions: of the calibration sample, of the packages.
        resumed: how many layers were taken from an earlier run that was interrupted.
    """

    method: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=list)
    metric: str | None = None
    metrics: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    layers: list[LayerRecord] = field(default_factory=list)
    parameters: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)
    overlap: dict[str, int | None] = field(default_factory=dict)
    skipped: list[SkippedBatch] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory: int = 0
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    resumed: int = 0

    def normalized(self, kind: str, task: str, metric: str | None = None) -> float | None:
        """``kind``'s metric of a task divided by its expert's, e.g. ``normalized("merged", "mnist")``."""
        metric = metric or self.metric or ""
        value = self.metrics.get(kind, {}).get(task, {}).get(metric)
        expert = self.metrics.get("expert", {}).get(task, {}).get(metric)
        return value / expert if value is not None and expert else None

    def mean_normalized(self, kind: str) -> float | None:
        """Mean over tasks of :meth:`normalized`; ``None`` unless every task has a value."""
        values = [self.normalized(kind, task) for task in self.tasks]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    def choose_metric(self, name: str | None = None) -> None:
        """Set the metric that tables show: ``name``, or else the first logged one that is not a loss."""
        kinds = list(self.metrics.values())
        names = list(next(iter(kinds[-1].values()), {})) if kinds else []
        if name is not None and name not in names:
            self.warnings.append(f"metric '{name}' was not logged; logged are {', '.join(names) or 'none'}")
            name = None
        self.metric = name or next((n for n in names if "loss" not in n), names[0] if names else None)

    def compare_with_average(self) -> None:
        """Add a warning if the plain average does better than the merged model in the mean of the shown metric."""
        means = {k: mean([t.get(self.metric or "") for t in self.metrics.get(k, {}).values()]) for k in _COMPARED}
        average, merged = (means[kind] for kind in _COMPARED)
        if average is None or merged is None or self.method.get("class") == "Average":
            return
        if merged > average if lower_is_better(self.metric or "") else merged < average:
            ridge = f" (it is {self.method['ridge']})" if "ridge" in self.method else ""
            samples = sorted({0, *self.samples.values()})[-1]
            data = f"Give more calibration samples (there are {samples} per task), a higher ridge{ridge}, or take"
            self.warnings.append(
                f"the merge is worse than the plain average: the mean {self.metric} is {number(merged)} merged and "
                f"{number(average)} averaged. {data if samples else 'Try other settings, or'} the method Average"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything, in plain values; NaN and infinity become ``None``, so that any JSON reader takes it."""
        normalized = {
            kind: {task: {m: self.normalized(kind, task, m) for m in values} for task, values in tasks.items()}
            for kind, tasks in self.metrics.items()
        }
        summary = {kind: self.mean_normalized(kind) for kind in self.metrics}
        plain: dict[str, Any] = finite({**asdict(self), "normalized": normalized, "mean_normalized": summary})
        return plain

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    def task_table(self) -> str:
        """The result at a glance: per task the expert, the average and the merged model."""
        return table(self.task_rows())

    def task_rows(self) -> list[list[str]]:
        """The cells of :meth:`task_table`."""
        kinds = [kind for kind in ("expert", "average", "merged") if kind in self.metrics]
        ratio_kinds = [kind for kind in kinds if kind != "expert" and "expert" in kinds]
        rows = [["task", *kinds, *(f"{kind} / expert" for kind in ratio_kinds)]]
        for task in self.tasks:
            values = [self.metrics[kind].get(task, {}).get(self.metric or "") for kind in kinds]
            ratios = [self.normalized(kind, task) for kind in ratio_kinds]
            rows.append([task, *map(number, values), *map(percent, ratios)])
        means = [mean([self.metrics[k].get(t, {}).get(self.metric or "") for t in self.tasks]) for k in kinds]
        ratios = [self.mean_normalized(kind) for kind in ratio_kinds]
        rows.append(["mean", *map(number, means), *map(percent, ratios)])
        return rows

    def layer_table(self) -> str:
        """Per layer the covariate shift on arrival, the residual of the fit, and its conditioning."""
        return table(self.layer_rows())

    def layer_rows(self) -> list[list[str]]:
        """The cells of :meth:`layer_table`."""
        rows = [["layer", "type", "shift", "cosine", "residual", "condition", "seconds", "note"]]
        for layer in self.layers:
            note = layer.note or (f"inputs of {layer.shared_with}" if layer.shared_with else "")
            told = [note] if note else []
            told += [f"{layer.unpaired} calls one-sided"] if layer.unpaired else []
            told += [f"corrected for {' and '.join(layer.corrected_for)}"] if layer.corrected_for else []
            told += [f"{layer.uncorrected} calls uncorrected"] if layer.uncorrected else []
            told += [_idle(layer)] if layer.idle else []
            told += [f"{layer.kept:,} of {layer.groups:,} keep the average, which is better"] if layer.kept else []
            shift, cosine = mean(list(layer.distance.values())), mean(list(layer.cosine.values()))
            numbers = [shift, cosine, layer.residual, layer.condition]
            rows.append(
                [layer.name or "(root)", layer.kind, *map(number, numbers), f"{layer.seconds:.2f}", "; ".join(told)]
            )
        return rows

    def layers_explained(self) -> str:
        """What the columns of :meth:`layer_table` are."""
        return (
            "Shift and cosine compare a layer's inputs in the merged model with those in the experts on arrival "
            "(relative distance; mean over tasks); the residual is the relative squared error of its output after the "
            "merge (where it is corrected for other tensors, of its sum with them). The condition is a lower bound, "
            "and bad from about 1e6 on, where rounding shows: more calibration samples or a higher ridge bring it down."
        )

    def unsolved_rows(self) -> list[list[str]]:
        """Parameters that were averaged, and why, below a head; nothing if there are none."""
        averaged = [(name, what.split(": ", 1)[1:]) for name, what in self.parameters.items() if "averaged" in what]
        return [["parameter", "why"], *([name, *(why or [""])] for name, why in averaged)] if averaged else []

    def summary(self) -> str:
        """Two lines on data and cost, and one for each batch that was skipped."""
        samples = sorted(set(self.samples.values()))
        told = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}" if samples else ""
        overlaps = list(self.overlap.values())
        if any(overlap is None for overlap in overlaps):
            both = "how many of them are validated too is not known"
        else:
            both = f"{sum(o or 0 for o in overlaps)} of them in all are among those validated"
        data = f"{told} calibration samples per task ({both})" if told else "no calibration data"
        private = [name for name, kind in self.parameters.items() if kind in ("private", PRIVATE_REFITTED)]
        told_private = [*private[:4], *["..."] * (len(private) > 4)]
        if refitted := sum(kind == PRIVATE_REFITTED for kind in self.parameters.values()):
            told_private.append(f"{refitted} of them solved for the merged model")
        if own := sum(kind == PRIVATE_SOLVED for kind in self.parameters.values()):
            told_private.append(f"{own} biases and norms solved for each")
        names = f" ({', '.join(told_private)})" if told_private else ""
        phrases = {"private": f"private to their tasks{names}", "buffer": "in buffers that stay as they are"}
        parts = ", ".join(f"{count:,} {phrases.get(kind, kind)}" for kind, count in self.sizes.items() if count)
        resumed = f"{self.resumed} layers from an interrupted merge, the rest in " if self.resumed else ""
        return (
            f"{self.method.get('class', 'merge')}: {data}; "
            f"{resumed}{self.seconds:.1f} s, peak memory {self.peak_memory / 2**30:.2f} GiB.\n"
            f"Values: {parts}."
        ) + "".join(f"\nSkipped: {batch}." for batch in self.skipped)

    def __str__(self) -> str:
        if not self.tasks:
            return "Nothing has been merged yet."
        shown = f"{self.metric}\n\n{self.task_table()}\n\n" if self.metrics else ""
        return f"{shown}{self.summary()}" + "".join(f"\nWarning: {warning}" for warning in self.warnings)

    def to_markdown(self) -> str:
        """The whole report as Markdown."""
        settings = ", ".join(f"{name}={value}" for name, value in self.method.items() if name != "class")
        unsolved = self.unsolved_rows()
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        parts = [
            f"# Merge of {len(self.tasks)} experts with {self.method.get('class')}",
            f"Settings: {settings}." if settings else "",
            f"## Metrics\n\n`{self.metric}`\n\n{self.task_table()}" if self.metrics else "",
            self.summary(),
            "\n".join(f"- **Warning**: {warning}" for warning in self.warnings),
            f"## Layers\n\n{self.layers_explained()}\n\n{self.layer_table()}" if self.layers else "",
            f"## Averaged parameters\n\n{table(unsolved)}" if unsolved else "",
            f"Calibration seed {self.seed}; {versions}." if self.seed is not None else f"{versions}.",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"


def _idle(layer: LayerRecord) -> str:
    kinds = {"embedding": "rows of the table", "grouped linear": "experts", "contraction": "stacked matrices"}
    kinds |= {"sum": "elements", "product": "elements", "per channel": "channels", "batch normalisation": "channels"}
    what = f"{layer.idle:,} of {layer.groups:,} {kinds.get(layer.kind, 'groups')} " if layer.groups > 1 else ""
    return f"{what}saw no data"
