"""Eight experts of a 1B-parameter language model on one machine without a GPU.

The experts have random weights of the sizes of Llama 3.2 1B in bfloat16, in transformers folders. Calibration samples
are few and short, so that models and statistics dominate. Each merge runs once, in its own process. Seconds count the
merge alone; memory is the peak from reading the experts to writing the result. Mapped files are pages that the system
can drop when it needs memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import com_lightning as com
from benchmarks.memory import Watch
from benchmarks.speed.files import DENSITY, Language, Models
from benchmarks.speed.timing import in_a_process
from com_lightning.experts.construction import without_memory

BUDGET = 1.0
"""GiB that the paused forwards of the two-sided merge may hold."""
METHODS: dict[str, Callable[[], com.MergingMethod]] = {
    "average": com.Average,
    "TIES": lambda: com.TIES(density=DENSITY, scale=1.0, trim="parameter"),
    "chain, one-sided": lambda: com.ChainOfMerges(target="merged"),
    "chain, two-sided": com.ChainOfMerges,
    "chain, two-sided, offload=layers": com.ChainOfMerges,
}
SIZES = Models(experts=8, width=2048, blocks=16, vocabulary=128256, tied=True)
TINY = Models(experts=2, width=64, blocks=1, vocabulary=100, tied=True)
Measured = dict[str, dict[str, float]]


class Calibrated(Language):
    """A language model with a validation step, for calibration."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.net(batch, labels=batch).loss, batch_size=len(batch))


def merge(name: str, folder: Path, experts: int, samples: int, length: int) -> dict[str, float]:
    """Merge in this process. Returns seconds without reading and writing, and bytes beyond what the process held."""
    method = METHODS[name]()
    base = str(folder / "base")
    sources = {str(number): str(folder / str(number)) for number in range(experts)}
    vocabulary = json.loads((folder / "base" / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    texts: Any = torch.randint(vocabulary, (samples, length))
    loader = DataLoader(texts, 2)
    tasks = com.MergeDataModule({task: com.TaskLoaders(val=loader) for task in sources}, num_samples=samples)
    trainer = com.MergeTrainer(accelerator="cpu", precision="bf16-true", logger=False, enable_progress_bar=False)
    is_lean = name.endswith("offload=layers")
    watch = Watch()
    model = without_memory(lambda: Calibrated(base), "the model") if is_lean else Calibrated(base)
    with tempfile.TemporaryDirectory(dir=folder) as output:
        report = trainer.merge(
            model,
            tasks if "data" in method.needs else None,
            sources,
            method,
            baselines=False,
            output_dir=f"{output}/merged",
            base=base if "base" in method.needs else None,
            memory_budget=BUDGET if "two-sided" in name else None,
            offload="layers" if is_lean else None,
        )
    return {"seconds": report.seconds, "anonymous": watch.anonymous, "file": watch.file}


def run(models: Models, threads: int, samples: int = 4, length: int = 128) -> Measured:
    """Method -> seconds and bytes. Ctrl-C ends the run and keeps the methods that are complete."""
    with tempfile.TemporaryDirectory() as name:
        models.write(Path(name))
        sizes = ("--folder", name, "--experts", models.experts, "--samples", samples, "--length", length)
        measured: Measured = {}
        for method in METHODS:
            try:
                measured[method] = in_a_process("benchmarks.speed.large", method, *sizes, "--threads", threads)
            except KeyboardInterrupt:
                if not measured:
                    raise
                break
            print(f"large, {method}: {measured[method]['seconds']:.0f} s", file=sys.stderr, flush=True)
    return measured


def rows(measured: Measured) -> list[list[str]]:
    """The rows of a table."""
    lines = [["rule", "seconds", "memory, GiB", "mapped files, GiB"]]
    for name, result in measured.items():
        budget = f", memory_budget={BUDGET:g}" if "two-sided" in name else ""
        sizes = [f"{result[kind] / 2**30:.1f}" for kind in ("anonymous", "file")]
        lines.append([name + budget, f"{result['seconds']:.0f}", *sizes])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("name", choices=METHODS)
    parser.add_argument("--folder", type=Path, required=True)
    for field in ("experts", "samples", "length", "threads"):
        parser.add_argument(f"--{field}", type=int, required=True)
    options: dict[str, Any] = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    print(json.dumps(merge(**options)))


if __name__ == "__main__":
    main()
