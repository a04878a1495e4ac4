"""Checks that need a GPU: the tests for it, the demo, every precision, and large models.

    python -m benchmarks.gpu [--parts tests demo precision lockstep] [--device cuda]

The results are written to benchmarks/results/gpu.{json,md}. If a part fails, it is reported, the others go on, and
the exit status is 1. ``--device cpu --tiny`` only shows that everything runs; its figures measure nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from lightning.pytorch import LightningModule, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.lockstep import environment
from com_lightning import ChainOfMergesCallback, MergeDataModule, TaskLoaders
from com_lightning.cli import main as com_lightning
from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.core.tensors.modules import average, named_tensors, tied_names
from com_lightning.results.tables import table
from com_lightning.trainer import MergeTrainer

ROOT = Path(__file__).resolve().parents[1]
NOISE = 0.1  # of an expert, relative to the standard deviation of each parameter
CPU_TESTS = "less or state or trained or (ViT and 64)"


@dataclass
class Setting:
    """Settings of all parts."""

    device: str
    tiny: bool
    work: Path

    @property
    def accelerator(self) -> str:
        return "gpu" if self.device.startswith("cuda") else self.device


def run_tests(setting: Setting) -> dict[str, Any]:
    """tests/integration/core/test_cuda.py, in its own process."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "tests/integration/core/test_cuda.py"]
    command += ["-k", CPU_TESTS] if setting.tiny else []
    environment_variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment_variables, "COM_LIGHTNING_TEST_DEVICE": setting.device},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode:
        raise RuntimeError("\n".join(lines[-40:]))
    return {"rows": [["result"], [lines[-1]]]}


def run_demo(setting: Setting) -> dict[str, Any]:
    """Training and merge of the demo, on the command line."""
    folder, configs = setting.work / "demo", Path("configs/digits")
    callback = "--trainer.callbacks.init_args"
    common = [f"--trainer.accelerator={setting.accelerator}"]
    small = ["--model.num_layers=2", "--model.hidden_size=16"] if setting.tiny else []
    fit = [*common, f"{callback}.dirpath={folder}", *small]
    fit += ["--trainer.max_steps=2", "--trainer.limit_val_batches=1"] if setting.tiny else []
    fit += ["--trainer.val_check_interval=2"] if setting.tiny else []
    tasks = list(yaml.safe_load((ROOT / configs / "merge.yaml").read_text())["experts"])
    start = time.perf_counter()
    com_lightning(["fit", f"--config={configs / 'base.yaml'}", *fit])
    for task in tasks:
        base = f"--model.base={folder / 'base.ckpt'}"
        which = [f"--data.task={task}", base, f"{callback}.filename={task}"]
        com_lightning(["fit", f"--config={configs / 'expert.yaml'}", *fit, *which])
    trained = time.perf_counter() - start
    experts = [f"--experts.{task}={folder / task}.ckpt" for task in tasks]
    files = [f"--config={configs / 'tasks.yaml'}", f"--config={configs / 'merge.yaml'}"]
    merge = [*files, *common, *small, *experts, f"--output_dir={folder / 'merged'}", "--overwrite"]
    com_lightning(["merge", *merge, *(["--data.num_samples=8"] if setting.tiny else [])])
    report = json.loads((folder / "merged" / "report.json").read_text())
    values = {kind: [each["val_acc"] for each in report["metrics"][kind].values()] for kind in report["metrics"]}
    means = {kind: sum(each) / len(each) for kind, each in values.items()}
    head = ["training, s", "merge, s", "peak memory, GiB", *(f"mean accuracy, {kind}" for kind in means)]
    row = [f"{trained:.1f}", f"{report['seconds']:.1f}", f"{report['peak_memory'] / 2**30:.2f}"]
    return {"rows": [head, [*row, *(f"{mean:.4f}" for mean in means.values())]]}


class _Vision(LightningModule):
    """A vision transformer in a LightningModule."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        size: dict[str, Any] = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
        config = transformers.ViTConfig(**size, num_attention_heads=4, image_size=64, patch_size=16)
        self.net = transformers.ViTModel(config, add_pooling_layer=False)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_norm", self.net(batch).last_hidden_state.float().norm(), batch_size=len(batch))


def run_precision(setting: Setting) -> dict[str, Any]:
    """Largest relative difference of merged weights from a merge in float64, for each precision of the trainer."""
    width, blocks, samples = (32, 2, 16) if setting.tiny else (256, 6, 256)
    cases = [("64-true", "highest"), ("32-true", "highest"), ("32-true", "high"), ("32-true", "medium")]
    cases += [(p, "highest") for p in ("bf16-mixed", "bf16-true", "16-mixed", "16-true")]
    if setting.device == "cpu":  # which has no float16 autocast
        cases = [case for case in cases if not case[0].startswith("16")]
    torch.manual_seed(0)
    base = _Vision(width, blocks)
    experts = [_perturbed(base) for _ in range(2)]
    data = [torch.randn(samples, 3, 64, 64) + task for task in range(2)]
    rows = [["precision", "matmul", "worst relative difference from 64-true", "tensor", "merge, s"]]
    exact: dict[str, Tensor] = {}
    for precision, products in cases:
        try:
            seconds, values = _merged_in(precision, products, setting, base, experts, data)
        except Exception as error:  # reported in the table; the other precisions still run
            rows.append([precision, products, f"FAILED: {type(error).__name__}: {error}", "", ""])
            continue
        exact = exact or values
        differences = {
            n: float((values[n] - v).abs().amax() / v.abs().amax().clamp_min(1e-30)) for n, v in exact.items()
        }
        worst = max(differences, key=lambda name: differences[name])
        rows.append([precision, products, f"{differences[worst]:.1e}", worst, f"{seconds:.1f}"])
        _say(f"  {precision}, matmul {products}: {differences[worst]:.1e}")
    return {"rows": rows}


def _merged_in(
    precision: Any,
    products: str,
    setting: Setting,
    base: nn.Module,
    experts: Sequence[nn.Module],
    data: Sequence[Tensor],
) -> tuple[float, dict[str, Tensor]]:
    tasks = {str(n): TaskLoaders(val=DataLoader(x, 32)) for n, x in enumerate(data)}  # type: ignore[arg-type]
    named: dict[str, Any] = {str(n): copy.deepcopy(expert) for n, expert in enumerate(experts)}
    merger = ChainOfMergesCallback(named, baselines=False, private=[])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(products)
    try:
        quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = MergeTrainer(
            accelerator=setting.accelerator, devices=1, precision=precision, callbacks=[merger], **quiet
        )
        model: Any = copy.deepcopy(base)
        trainer.validate(model, datamodule=MergeDataModule(tasks, num_samples=len(data[0])), verbose=False)
    finally:
        torch.set_float32_matmul_precision(before)
    values = {n: p.detach().double().cpu() for n, p in merger.modules["0"].named_parameters()}
    return merger.report.seconds, values


@torch.no_grad()
def _perturbed(base: nn.Module) -> nn.Module:
    expert = copy.deepcopy(base)
    for parameter in expert.parameters():
        spread = float(parameter.float().std()) if parameter.numel() > 1 else 0.0
        parameter.add_(torch.randn_like(parameter), alpha=NOISE * (spread or 1.0))  # biases are all zero
    return expert


def _clip(tiny: bool) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]], int]:
    config = transformers.CLIPVisionConfig()  # ViT-B/32
    if tiny:
        config = transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=64
        )
    size: Any = config.image_size
    return transformers.CLIPVisionModel(config), lambda n: {"pixel_values": torch.randn(n, 3, size, size)}, 64


def _llama(tiny: bool) -> tuple[nn.Module, Callable[[int], dict[str, Tensor]], int]:
    size: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    }
    size |= {"num_key_value_heads": 8, "vocab_size": 128256}  # of Llama 3.2 1B
    if tiny:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        size |= {"num_key_value_heads": 2, "vocab_size": 100}
    config = transformers.LlamaConfig(**size, tie_word_embeddings=True, use_cache=False)
    length, vocabulary = (16 if tiny else 256), size["vocab_size"]
    return transformers.LlamaForCausalLM(config), lambda n: {"input_ids": torch.randint(vocabulary, (n, length))}, 8


def run_lockstep(setting: Setting) -> dict[str, Any]:
    """Merges of two experts of large random models in bfloat16: time of each part, and memory."""
    models = {"CLIP ViT-B/32": (_clip, 256), "Llama 1B": (_llama, 32)}
    rows = [["model", "parameters", "layers", "samples a task", "merge, s", "seconds a layer", "slowest layer"]]
    rows[0] += ["forwards", "statistics", "closed form", "peak memory, GiB"]
    layers = {}
    for name, (make, samples) in models.items():
        try:
            row, layers[name] = _timed(name, make, 4 if setting.tiny else samples, setting)
        except Exception as error:  # for example out of memory; the other model still runs
            row = [name, f"FAILED: {type(error).__name__}: {error}", *[""] * (len(rows[0]) - 2)]
            traceback.print_exc()
        rows.append(row)
    return {"rows": rows, "layers": layers}


def _timed(
    name: str, make: Callable[[bool], Any], samples: int, setting: Setting
) -> tuple[list[str], list[dict[str, Any]]]:
    device, (base, draw, size) = torch.device(setting.device), make(setting.tiny)
    cuda = device.type == "cuda"
    base = base.to(device, torch.bfloat16).eval()
    tasks = []
    for number in range(2):
        batches = [
            {n: x.to(device) for n, x in draw(min(size, samples - at)).items()} for at in range(0, samples, size)
        ]
        batches = [{n: x.bfloat16() if x.is_floating_point() else x for n, x in b.items()} for b in batches]
        tasks.append(Task(str(number), _perturbed(base).requires_grad_(False), batches, _call))
    parameters = sum(parameter.numel() for parameter in base.parameters())
    del base
    merged = _average(tasks)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    done: list[LayerRecord] = []

    def on_layer(record: LayerRecord) -> None:
        if cuda:  # called once all forwards have left the layer: what they launched is not the next layer's time
            torch.cuda.synchronize(device)
        done.append(record)
        if len(done) % 10 == 0:
            _say(f"  {name}: {len(done)} layers, {time.perf_counter() - start:.1f} s")

    start = time.perf_counter()
    records = merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(), Context(on_layer))
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    if bad := [own for own, value in merged.items() if not bool(value.isfinite().all())]:
        raise RuntimeError(f"{bad[0]} is not finite")
    solved = [record for record in records if not record.note]
    both, closed = sum(r.seconds for r in solved), sum(r.solving for r in solved)
    slowest = max(solved, key=lambda record: record.seconds)
    shares = [f"{100 * part / seconds:.0f} %" for part in (seconds - both, both - closed, closed)]
    peak = f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f}" if cuda else "not measured"
    row = [name, f"{parameters / 1e6:,.1f} M", str(len(solved)), str(samples), f"{seconds:.1f}"]
    row += [f"{seconds / len(solved):.3f}", f"{slowest.name} ({slowest.seconds:.2f} s)", *shares, peak]
    each = [{"layer": r.name, "kind": r.layer_type, "seconds": r.seconds, "solving": r.solving} for r in solved]
    return row, each


def _call(module: nn.Module, batch: dict[str, Tensor], index: int) -> object:
    return module(**batch)


def _average(tasks: Sequence[Task]) -> dict[str, Tensor]:
    """The average as ``merge_layers`` expects it: tied names share one tensor."""
    states = [{name: tensor for name, tensor, _ in named_tensors(task.expert)} for task in tasks]
    ties = tied_names(tasks[0].expert)
    first = {n: average([s[n] for s in states]) for n, t in states[0].items() if ties[n] == n and t.is_floating_point()}
    return {name: first[tie] for name, tie in ties.items() if tie in first}


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "tests": run_tests,
    "demo": run_demo,
    "precision": run_precision,
    "lockstep": run_lockstep,
}


def _say(text: str) -> None:
    print(text, flush=True)


def _machine(device: str) -> str:
    about = environment()
    what = f"{about['cpu']}, {about['cores']} cores"
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        what = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}; {what}"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{what}; Python {platform.python_version()}, {versions}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts. Returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tiny", action="store_true", help="only check that everything runs")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark-gpu"), help="folder for checkpoints")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu"), help="path without a suffix")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --device cpu --tiny checks that the benchmark runs")
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join(["python", "-m", "benchmarks.gpu", *given])
    setting, machine = Setting(options.device, options.tiny, options.work), _machine(options.device)
    results: dict[str, Any] = {}
    for part in options.parts:
        _say(f"== {part}: {(PARTS[part].__doc__ or '').strip()}")
        seed_everything(0, verbose=False)
        start = time.perf_counter()
        try:
            results[part] = PARTS[part](setting)
        except (Exception, SystemExit) as error:  # the command line exits with its message
            traceback.print_exc()
            results[part] = {"failed": f"{type(error).__name__}: {error}"}
        results[part]["seconds"] = time.perf_counter() - start
        _say(_shown(results[part]))
    failed = [part for part, result in results.items() if "FAILED" in _shown(result)]
    failures = f"Failed: {', '.join(failed)}.\n\n" if failed else ""
    tiny = "Small sizes, only to check that everything runs: these figures measure nothing.\n\n" if options.tiny else ""
    text = f"# On a GPU\n\n`{command}`\n\n{machine}.\n\n{tiny}{failures}"
    for part, result in results.items():
        text += f"## {part}\n\n{PARTS[part].__doc__}\n\n{_shown(result)}\n\n"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".md").write_text(text.rstrip() + "\n", encoding="utf-8")
    content = {"command": command, "machine": machine, "tiny": options.tiny, "failed": failed, "parts": results}
    options.output.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    _say(f"Written to {options.output.with_suffix('.md')}." + (f" Failed: {', '.join(failed)}." if failed else ""))
    return len(failed)


def _shown(result: dict[str, Any]) -> str:
    return table(result["rows"]) if "rows" in result else f"FAILED: {result['failed']}"


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
