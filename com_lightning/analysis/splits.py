"""The data of a comparison in disjoint parts: to calibrate on, to choose settings on, to report."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch

from com_lightning.data.datamodule import MergeDataModule
from com_lightning.data.sampling import population, restricted
from com_lightning.errors import MergeError

Kept = Mapping[str, Sequence[set[int] | None]]
"""Task -> for each of its val loaders the dataset indices to validate on; ``None``: all."""


class PartOfData(MergeDataModule):
    """The tasks of a MergeDataModule with another calibration seed, and with a part of the val data.

    Args:
        data: the data, set up.
        seed: of the calibration sample.
        kept: the samples to validate on.
    """

    def __init__(self, data: MergeDataModule, seed: int, kept: Kept) -> None:
        super().__init__(data.tasks, data.num_samples, data.split, True, seed, data.batch_size, data.augmented_copies)
        self.trainer, self.kept = data.trainer, kept
        self._prepared, self._set_up, self._given = True, data._set_up, data._given

    def validation_loaders(self, name: str) -> Any:
        kept = self.kept.get(name, [])
        if all(part is None for part in kept):
            return self.given(name, "val")
        loaders = [
            loader if part is None else restricted(loader, part)
            for loader, part in zip(self.loaders(name, "val"), kept)
        ]
        return loaders[0] if len(loaders) == 1 else loaders


@dataclass
class Splits:
    """Which samples of the val loaders are used for what.

    Attributes:
        data: the data of all tasks.
        seeds: of the calibration samples.
        report: the samples to report on. No setting is chosen on them, and no seed calibrates on them.
        selection: the samples to choose settings on. No seed calibrates on them. ``None``: there is nothing to choose.
        counts: task -> ``"calibration"`` (of all seeds together, if they come from the val loaders), ``"selection"``
            and ``"report"`` -> number of samples. ``None`` if that is not known.
        alone: a sentence on what a single merge validates on, if that are other samples than the reported ones.
    """

    data: MergeDataModule
    seeds: Sequence[int]
    report: Kept = field(default_factory=dict)
    selection: Kept | None = None
    counts: dict[str, dict[str, int | None]] = field(default_factory=dict)
    alone: str = ""

    def part(self, split: str, seed: int | None = None) -> PartOfData:
        """The data of one split, ``"report"`` or ``"selection"``, with the calibration sample of one seed."""
        kept = self.report if split == "report" else self.selection
        assert kept is not None
        return PartOfData(self.data, self.seeds[0] if seed is None else seed, kept)

    def __str__(self) -> str:
        source, seeds = self.data.split, ", ".join(map(str, self.seeds))
        held = _range([count["calibration"] for count in self.counts.values()])
        lines = []
        if held != "0":
            lines.append(
                f"Calibration: up to {self.data.num_samples} samples of each task's {source} data, seeds {seeds}."
            )
        chosen, reported = [_range([c[split] for c in self.counts.values()]) for split in ("selection", "report")]
        if self.selection is not None:
            lines.append(f"Selection of settings: {chosen} samples of each task's val data.")
        used = ["calibrated"] * (held != "0") + ["chosen"] * (self.selection is not None)
        on = f" that nothing was {' or '.join(used)} on" if used else ""
        lines.append(f"Reported: {reported} samples of each task's val data{on}.")
        lines += [self.alone] * bool(self.alone)
        return "\n".join(lines)


def split(data: MergeDataModule, seeds: Sequence[int], calibrates: bool, selects: bool) -> Splits:
    """Split the val data of all tasks.

    The calibration samples of all seeds are taken out. The other samples are reported. If settings are to be chosen, a
    random half of each dataset's other samples is used for that instead.

    Args:
        data: the data, set up and checked.
        seeds: seeds of the calibration samples.
        calibrates: whether any method reads calibration data.
        selects: whether settings are to be chosen.

    Returns:
        The samples for each purpose.

    Raises:
        MergeError: with all tasks that have too few samples, or samples that cannot be told apart.
    """
    report: dict[str, list[set[int] | None]] = {}
    selection: dict[str, list[set[int] | None]] = {}
    result, problems = Splits(data, seeds), []
    hold = calibrates and data.split == "val"
    for name in data.tasks:
        loaders = data.loaders(name, "val")
        populations = [population(loader) for loader in loaders]
        if (hold or selects) and None in populations:
            problems.append(
                f"task '{name}': the samples of an iterable dataset cannot be split; set data.split to train, and "
                "give each method one setting"
            )
            continue
        # Loaders of one dataset have its samples in common.
        owners = [id(getattr(loader, "dataset", loader)) for loader in loaders]
        held: dict[int, set[int]] = {owner: set() for owner in owners}
        chosen: dict[int, set[int]] = {owner: set() for owner in owners}
        for seed in seeds if hold else ():
            for owner, drawn in zip(owners, PartOfData(data, seed, {}).calibration_indices(name)):
                held[owner].update(drawn or ())
        generator = torch.Generator().manual_seed(zlib.crc32(f"{data.seed}/{name}/selection".encode()))
        for owner in dict.fromkeys(owners) if selects else ():
            mine = [indices or () for other, indices in zip(owners, populations) if other == owner]
            rest = [index for index in dict.fromkeys(chain(*mine)) if index not in held[owner]]
            order = torch.randperm(len(rest), generator=generator)[: len(rest) // 2].tolist()
            chosen[owner].update(rest[place] for place in order)
        report[name], selection[name] = [], []
        for owner, indices in zip(owners, populations):
            samples = set(indices or ())
            selection[name].append(samples & chosen[owner])
            report[name].append(samples - chosen[owner] - held[owner] if hold or selects else None)
        total = sum(len(indices or ()) for indices in populations)
        sizes = [sum(len(part or ()) for part in parts[name]) for parts in (selection, report)]
        sizes[1] = sizes[1] if hold or selects else total
        is_known = None not in populations
        taken = sum(map(len, held.values())) if hold else data.num_samples if calibrates else 0
        reported = sizes[1] if is_known else None
        result.counts[name] = {"calibration": taken, "selection": sizes[0], "report": reported}
        gone = sum(map(len, held.values()))
        if is_known and (not sizes[1] or (selects and not sizes[0])):
            problems.append(
                f"task '{name}': {len(seeds)} seeds calibrate on {gone} of its {total} val samples, and too few are "
                f"left to {'choose settings on and ' if selects else ''}report; lower data.num_samples, give fewer "
                "seeds, or set data.split to train"
            )
    if problems:
        raise MergeError(problems)
    result.report, result.selection = report, selection if selects else None
    result.alone = _alone(data, report, calibrates)
    return result


def _alone(data: MergeDataModule, report: Kept, calibrates: bool) -> str:
    """What a single merge validates on, if its figures differ from those of a comparison."""
    whole: dict[str, list[set[int]]] = {}
    held: dict[str, list[set[int]]] = {}
    for name in [name for name, kept in report.items() if None not in kept]:
        whole[name] = held[name] = [set(population(loader) or ()) for loader in data.loaders(name, "val")]
        if data.holds_out(name):
            drawn = data.calibration_indices(name)
            held[name] = [samples - set(taken or ()) for samples, taken in zip(whole[name], drawn)]
    rules = {"reads data": held} if calibrates else {}
    others = [
        f"{_range([sum(map(len, loaders)) for loaders in kept.values()])} of each task with a rule that {reads}"
        for reads, kept in {**rules, "reads none": whole}.items()
        if any(loaders != list(report[name]) for name, loaders in kept.items())
    ]
    if not others:
        return ""
    return f"A single `merge` has other figures, because it validates on other samples: {', '.join(others)}."


def _range(counts: Sequence[int | None]) -> str:
    numbers = sorted({count for count in counts if count is not None})
    if not numbers or None in counts:
        return "all"
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
