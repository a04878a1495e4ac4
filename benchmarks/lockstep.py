"""Seconds of a chain of merges in lockstep against the naive chain, which runs the merged model again for every layer.

Run from the root of the repository::

    python benchmarks/lockstep.py [--blocks 12 --width 192 --samples 64 --tasks 2 --repeats 5]

Both merge the same randomly perturbed vision transformers with the same statistics and solver, in turn in one process.
The floor is the work that no chain can avoid: one forward of the merged model and of the experts for each batch.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

# A script has its own folder on the path, a module (-m) and the tests have the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.naive import naive_chain
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, copy_module, named_tensors
from com_lightning.results.tables import table

SEED = 0
IMAGE, PATCH = 64, 16
NOISE = 0.1  # of an expert, relative to the standard deviation of each parameter
Run = Callable[[Sequence[Task], Mapping[str, Tensor], Sequence[float], ChainOptions], list[LayerRecord]]


@dataclass
class Timing:
    """One merge: seconds, seconds for gathering and solving, number of forwards, number of merged layers."""

    seconds: float
    solving: float
    forwards: int
    layers: int


class Setting:
    """Experts, calibration data, and a counter of forwards."""

    def __init__(
        self,
        blocks: int,
        width: int,
        samples: int,
        batch_size: int,
        tasks: int,
        image: int = IMAGE,
        patch: int = PATCH,
    ) -> None:
        torch.manual_seed(SEED)
        self.blocks, self.width, self.batch_size, self.image, self.patch = blocks, width, batch_size, image, patch
        config = ViTConfig(
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=max(width // 64, 1),
            intermediate_size=4 * width,
            image_size=image,
            patch_size=patch,
        )
        base: nn.Module = ViTModel(config)
        base.eval()
        self.forwards = 0
        self.tasks = []
        for number in range(tasks):
            images = torch.randn(samples, 3, image, image)
            self.tasks.append(Task(str(number), perturbed(base), torch.split(images, batch_size), self._call))
        self.importance = [1 / tasks] * tasks
        self.rule = ChainOptions()

    def start(self) -> dict[str, Tensor]:
        """The average of the experts."""
        tensors = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in self.tasks]
        return {name: average([each[name] for each in tensors]) for name in tensors[0]}

    def merge(self, run: Run) -> tuple[Timing, dict[str, Tensor]]:
        """Merge, starting from the average. Only the merge itself is timed."""
        merged = self.start()
        self.forwards = 0
        start = time.perf_counter()
        records = run(self.tasks, merged, self.importance, self.rule)
        seconds = time.perf_counter() - start
        return Timing(seconds, sum(record.seconds for record in records), self.forwards, len(records)), merged

    def floor(self, streams: Sequence[str] = ("merged", "expert")) -> float:
        """Seconds of one forward for each batch, through the merged model and through the expert."""
        merged = self.start()
        start = time.perf_counter()
        with torch.no_grad():
            for task in self.tasks:
                ours = {id(tensor): merged[name] for name, tensor, _ in named_tensors(task.expert)}
                for stream in streams:
                    module = copy_module(task.expert, ours if stream == "merged" else {})
                    for batch in task.batches:
                        module(batch)
        return time.perf_counter() - start

    def _call(self, module: nn.Module, batch: Any, index: int) -> None:
        self.forwards += 1
        module(batch)


def perturbed(base: nn.Module) -> nn.Module:
    expert = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in expert.parameters():
            # Biases and normalisations are constant at the start and have no spread of their own.
            spread = float(parameter.std()) or 1.0
            parameter.add_(torch.randn_like(parameter), alpha=NOISE * spread)
    return expert


def difference(merged: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Largest difference of any tensor, relative to the largest value in that tensor."""
    pairs = [(merged[name].double(), expected[name].double()) for name in expected]
    return max(float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)) for ours, theirs in pairs)


@dataclass
class Comparison:
    """Lockstep and naive chain, timed in turn on one setting."""

    blocks: int
    lockstep: list[Timing]
    naive: list[Timing]
    floor: list[float]
    difference: float

    def columns(self) -> dict[str, list[float]]:
        """Name of each row of the table -> one value per repeat."""
        pairs = list(zip(self.naive, self.lockstep))
        return {
            "naive chain, s": [naive.seconds for naive in self.naive],
            "lockstep, s": [ours.seconds for ours in self.lockstep],
            "naive / lockstep": [naive.seconds / ours.seconds for naive, ours in pairs],
            "naive chain outside gathering and solving, s": [naive.seconds - naive.solving for naive in self.naive],
            "lockstep outside gathering and solving, s": [ours.seconds - ours.solving for ours in self.lockstep],
            "forwards alone (floor), s": self.floor,
            "lockstep / floor": [ours.seconds / floor for ours, floor in zip(self.lockstep, self.floor)],
        }


def compare(setting: Setting, blocks: int, repeats: int) -> Comparison:
    """Time both in turn, in the opposite order every other time, so that a slower machine affects both alike."""
    result = Comparison(blocks, [], [], [], 0.0)
    for repeat in range(repeats):
        weights = []
        turns = [(merge_layers, result.lockstep), (naive_chain, result.naive)]
        for run, timings in turns if repeat % 2 == 0 else reversed(turns):
            timing, merged = setting.merge(run)
            timings.append(timing)
            weights.append(merged)
        result.floor.append(setting.floor())
        result.difference = max(result.difference, difference(*weights))
        print(
            f"{blocks} blocks, {repeat + 1} of {repeats}: lockstep {result.lockstep[-1].seconds:.2f} s, "
            f"naive chain {result.naive[-1].seconds:.2f} s, forwards alone {result.floor[-1]:.2f} s",
            flush=True,
        )
    return result


def summary(comparison: Comparison) -> str:
    """Median, minimum and maximum of everything measured, as a Markdown table."""
    rows = [["", "median", "min", "max"]]
    for name, values in comparison.columns().items():
        numbers = (statistics.median(values), min(values), max(values))
        rows.append([name, *(f"{number:.2f}" for number in numbers)])
    return table(rows)


def picture(comparisons: Sequence[Comparison], path: Path) -> None:
    """Seconds against depth, both axes logarithmic."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    depths = [comparison.blocks for comparison in comparisons]
    naive = [statistics.median(timing.seconds for timing in comparison.naive) for comparison in comparisons]
    lockstep = [statistics.median(timing.seconds for timing in comparison.lockstep) for comparison in comparisons]
    floor = [statistics.median(comparison.floor) for comparison in comparisons]
    for values, power, label in ((naive, 2, "$\\propto$ depth²"), (lockstep, 1, "$\\propto$ depth")):
        guide = [values[0] * (depth / depths[0]) ** power for depth in depths]
        axes.plot(depths, guide, color="#9aa5b1", linestyle=":" if power == 2 else "--", linewidth=1, label=label)
    axes.plot(depths, naive, marker="s", color="#e0a458", label="naive chain")
    axes.plot(depths, lockstep, marker="o", color="#2a6f97", label="lockstep")
    axes.plot(depths, floor, marker=".", color="#6b7a88", linewidth=1, label="forwards alone (floor)")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_yticks(_ticks(min(floor), max(naive)))
    axes.grid(alpha=0.3)
    axes.set_xlabel("blocks of the transformer")
    axes.set_ylabel("seconds for the merge")
    axes.set_title("chain of merges: seconds against depth")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=130)


def _ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... that lie between the two, so that an axis of less than a decade has numbers as well."""
    steps = [digit * 10.0**power for power in range(-4, 6) for digit in (1, 2, 5)]
    return [step for step in steps if low / 2 <= step <= high * 2]


def environment() -> dict[str, Any]:
    """Machine and versions, on which seconds depend."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def markdown(main: Comparison, others: Sequence[Comparison], settings: Mapping[str, Any], machine: str) -> str:
    """All results as Markdown."""
    rows = [["blocks", "layers", "naive chain, s", "lockstep, s", "floor, s", "ratio", "naive forwards", "forwards"]]
    for comparison in others:
        columns = comparison.columns()
        shown = ("naive chain, s", "lockstep, s", "forwards alone (floor), s", "naive / lockstep")
        naive, ours = comparison.naive[0], comparison.lockstep[0]
        seconds = [f"{statistics.median(columns[name]):.2f}" for name in shown]
        rows.append([str(comparison.blocks), str(ours.layers), *seconds, str(naive.forwards), str(ours.forwards)])
    naive, ours = main.naive[0], main.lockstep[0]
    worst = max(comparison.difference for comparison in (main, *others))
    parts = [
        "# Lockstep against the naive chain",
        f"`{settings['command']}`",
        f"{machine}; seed {SEED}.",
        f"## {main.blocks} blocks, {len(main.naive)} repeats in turn\n\n{summary(main)}",
        f"{ours.layers} layers are merged with {ours.forwards} forwards in lockstep; the naive chain starts "
        f"{naive.forwards}: those of the merged model anew for every layer, and stopped there; experts pause in both. "
        "It also gathers and factorises the inputs of query, key and value once each, which the lockstep sees are one "
        "tensor. The floor is each forward once, without a merge.",
        f"Largest difference between the merged weights, relative to the largest value of each tensor: {worst:.1e}.",
        f"## Against depth\n\n{table(rows)}",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--blocks", type=int, default=12, help="depth of the transformer that is timed several times")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--samples", type=int, default=64, help="calibration images per task")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    # With several threads, another program on one core makes all of them wait.
    parser.add_argument("--threads", type=int, default=1, help="use more only if no other program runs")
    parser.add_argument(
        "--depths", type=int, nargs="*", default=[4, 8, 12, 16], help="depths in the picture, timed once each"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("benchmarks/results/lockstep"), help="path without a suffix"
    )
    options = parser.parse_args()
    setting = (options.width, options.samples, options.batch_size, options.tasks)
    command = shlex.join(["python", "benchmarks/lockstep.py", *sys.argv[1:]])
    torch.set_num_threads(options.threads)
    about = environment()

    Setting(1, *setting).merge(merge_layers)  # the first use of each operation is slower
    main = compare(Setting(options.blocks, *setting), options.blocks, options.repeats)
    # The depth that was timed repeatedly enters the picture with its medians.
    others = [
        main if blocks == options.blocks else compare(Setting(blocks, *setting), blocks, 1)
        for blocks in sorted(options.depths)
    ]

    settings = {"command": command, "seed": SEED, **{k: v for k, v in vars(options).items() if k != "output"}}
    settings |= {"image": IMAGE, "patch": PATCH, "noise": NOISE, "rule": asdict(ChainOptions())}
    machine = (
        f"{about['cpu']}, {about['cores']} cores, {about['threads']} in use, load {about['load']} at the start; "
        f"Python {about['python']}, torch {about['torch']}, transformers {about['transformers']}"
    )
    text = markdown(main, others, settings, machine)
    print(f"\n{text}")
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "settings": settings,
        "environment": about,
        "repeated": {**asdict(main), "columns": main.columns()},
        "depths": [asdict(comparison) for comparison in others],
    }
    output.with_name(output.name + ".json").write_text(json.dumps(written, indent=2) + "\n")
    output.with_name(output.name + ".md").write_text(text)
    if others:
        picture(others, output.with_name(output.name + ".png"))


if __name__ == "__main__":
    main()
