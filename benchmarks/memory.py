"""Peak memory of a merge, as a multiple of one model's size: without data, one-sided, two-sided.

Run from the root of the repository::

    python -m benchmarks.memory [--blocks 12 --width 768 --experts 4]

Every mode merges the same transformer and experts on the CPU, each in its own process. Experts are Lightning
checkpoints, which are mapped into memory rather than read. Pages of mapped files are counted separately, because the
system can drop them when it needs memory. Calibration data are few and short, so that models and statistics dominate.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import com_lightning as com
from com_lightning.results.tables import table

MODES: dict[str, Any] = {
    "average": lambda: com.Average(),
    "task arithmetic": lambda: com.TaskArithmetic(),
    "RegMean": lambda: com.RegMean(),
    "chain, one-sided": lambda: com.ChainOfMerges(target="merged"),
    "chain, two-sided": lambda: com.ChainOfMerges(),
    "chain, two-sided, offload=layers": lambda: com.ChainOfMerges(),
}


class Encoder(LightningModule):
    """A pre-norm transformer over random vectors."""

    def __init__(self, blocks: int = 12, width: int = 768) -> None:
        super().__init__()
        self.save_hyperparameters()
        block = nn.TransformerEncoderLayer(width, max(width // 64, 1), 4 * width, batch_first=True, norm_first=True)
        self.net = nn.TransformerEncoder(block, blocks, enable_nested_tensor=False)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.net(batch[0]).square().mean())


def write_experts(folder: Path, blocks: int, width: int, experts: int) -> None:
    """Write checkpoints of a base and of experts, which are random perturbations of it."""
    torch.manual_seed(0)
    base = Encoder(blocks, width)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for name in ["base", *map(str, range(experts))]:
        expert = Encoder(blocks, width)
        expert.load_state_dict(base.state_dict())
        for parameter in expert.parameters() if name != "base" else ():
            parameter.data.add_(0.1 * parameter.std() * torch.randn_like(parameter))
        trainer.strategy.connect(expert)
        trainer.save_checkpoint(folder / f"{name}.ckpt", weights_only=True)


class Watch(threading.Thread):
    """Peak memory of this process, sampled every two milliseconds until ``over`` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_anonymous, self.start_file = self._now()
        self.anonymous = self.file = 0
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        while not self.over.wait(0.002):
            anonymous, file = self._now()
            self.anonymous = max(self.anonymous, anonymous - self.start_anonymous)
            self.file = max(self.file, file - self.start_file)

    @staticmethod
    def _now() -> tuple[int, int]:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile"))  # type: ignore[return-value]


def measure(mode: str, folder: Path, blocks: int, width: int, experts: int) -> dict[str, float]:
    """Merge in this process. Returns seconds and peak memory in bytes."""
    torch.set_num_threads(1)
    watch, is_offloaded = Watch(), "offload" in mode
    with torch.device("meta") if is_offloaded else nullcontext():
        model = Encoder(blocks, width)
    method = MODES[mode]()
    sources = {str(number): str(folder / f"{number}.ckpt") for number in range(experts)}
    loader = DataLoader(TensorDataset(torch.randn(4, 16, width)), 2)
    tasks = com.MergeDataModule({task: com.TaskLoaders(val=loader) for task in sources}, num_samples=4)
    trainer = com.MergeTrainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    start = time.perf_counter()
    data = tasks if "data" in method.needs else None
    base = str(folder / "base.ckpt") if "base" in method.needs else None
    with tempfile.TemporaryDirectory(dir=folder) as output:
        options: dict[str, Any] = {"offload": "layers"} if is_offloaded else {}
        folder_of_result = f"{output}/merged"
        trainer.merge(model, data, sources, method, baselines=False, output_dir=folder_of_result, base=base, **options)
    return {"anonymous": watch.anonymous, "file": watch.file, "seconds": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = sum(p.numel() * p.element_size() for p in Encoder(options.blocks, options.width).parameters())
    if options.mode:
        peaks = measure(options.mode, options.folder, options.blocks, options.width, options.experts)
        (options.folder / "found.json").write_text(json.dumps(peaks))
        return
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_experts(folder, options.blocks, options.width, options.experts)
        for mode in MODES:
            print(f"measuring {mode}", flush=True)
            command = [sys.executable, "-m", "benchmarks.memory", *sys.argv[1:], "--mode", mode, "--folder", name]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results[mode] = json.loads((folder / "found.json").read_text())
    rows = [["mode", "memory / one model", "mapped files / one model", "seconds"]]
    for mode, peaks in results.items():
        sizes = [f"{peaks[kind] / size:.1f}" for kind in ("anonymous", "file")]
        rows.append([mode, *sizes, f"{peaks['seconds']:.0f}"])
    note = (
        f"{options.experts} experts of {size / 2**20:,.0f} MiB ({options.blocks} blocks of width {options.width}), on "
        f"one core; peak above what the process had once everything was imported. "
        f"`python -m benchmarks.memory {shlex.join(sys.argv[1:])}`, torch {torch.__version__}, {platform.machine()}.\n"
    )
    print(f"\n{table(rows)}\n\n{note}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "memory.md").write_text(f"# Peak memory of a merge\n\n{table(rows)}\n\n{note}", encoding="utf-8")
    (options.output / "memory.json").write_text(
        json.dumps({"size": size, "modes": results}, indent=1), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
