"""Data-free merges of safetensors folders against mergekit (git head): seconds and memory, from files to a file.

The models are Llama language models in bfloat16, written by transformers. This library reads and merges them with the
callback's ``merge`` and writes them with ``save_pretrained``; mergekit uses its ``run_merge``, without tokenizer and
model card. Both trim by parameter. Each merge runs in its own process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import com_lightning as com
from benchmarks.speed.contenders import watched
from benchmarks.speed.timing import Timed, in_a_process, in_turn, ratios, spread

SCALE, DENSITY = 0.3, 0.2
RULES: dict[str, tuple[Callable[[], com.MergingMethod], dict[str, Any]]] = {
    "average": (com.Average, {"merge_method": "linear", "parameters": {"normalize": True}}),
    "task arithmetic": (
        lambda: com.TaskArithmetic(scale=SCALE),
        {"merge_method": "task_arithmetic", "parameters": {"normalize": False, "lambda": SCALE}},
    ),
    "TIES": (
        lambda: com.TIES(density=DENSITY, scale=1.0, trim="parameter"),
        {"merge_method": "ties", "parameters": {"normalize": True, "lambda": 1.0}},
    ),
}
"""Rule of this library, and mergekit's configuration for the same rule."""
Measured = dict[str, dict[str, dict[str, list[float]]]]


@dataclass
class Models:
    """Sizes of language models with random weights; by default 310 million parameters."""

    experts: int = 3
    width: int = 1024
    blocks: int = 16
    vocabulary: int = 32000
    tied: bool = False

    def write(self, folder: Path) -> None:
        """Write the models ``base``, ``0``, ``1``, ... to a folder."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(self.width // 64, 1),
            num_key_value_heads=max(self.width // 256, 1),
            tie_word_embeddings=self.tied,
        )
        base: Any = LlamaForCausalLM(config)
        base.to(torch.bfloat16)
        state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        base.save_pretrained(folder / "base")
        for number in range(self.experts):
            for name, tensor in base.state_dict().items():
                tensor.copy_(state[name] + 0.1 * state[name].std() * torch.randn_like(tensor))
            base.save_pretrained(folder / str(number))


class Language(LightningModule):
    """A LightningModule with a language model, as users have it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net: nn.Module = AutoModelForCausalLM.from_pretrained(folder)


def ours(rule: str, folder: Path, experts: int, measured: dict[str, float]) -> None:
    """Merge with this library's callback."""
    method = RULES[rule][0]()
    with watched(measured):
        base = str(folder / "base")
        sources: dict[str, Any] = {str(number): str(folder / str(number)) for number in range(experts)}
        merger = com.ChainOfMergesCallback(sources, method, base=base if "base" in method.needs else None)
        merger.merge(Language(base))
        net: Any = merger.modules["0"].net
        net.save_pretrained(folder / "merged")


def mergekit(rule: str, folder: Path, experts: int, measured: dict[str, float]) -> None:
    """Merge with mergekit."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    parameters = {"weight": 1.0, **({"density": DENSITY} if rule == "TIES" else {})}
    config = {
        **RULES[rule][1],
        "models": [{"model": str(folder / str(number)), "parameters": parameters} for number in range(experts)],
        **({} if rule == "average" else {"base_model": str(folder / "base")}),
        "dtype": "bfloat16",
    }
    with watched(measured):
        options = MergeOptions(copy_tokenizer=False, write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(config), str(folder / "merged"), options)


WHO: dict[str, Callable[[str, Path, int, dict[str, float]], None]] = {"com_lightning": ours, "mergekit": mergekit}


def run(models: Models, repeats: int, threads: int) -> Measured | str:
    """Rule -> library -> seconds and bytes of each repeat; or a message why nothing was measured."""
    if importlib.util.find_spec("mergekit") is None:
        return "mergekit is not installed: pip install a clone of its repository, and run this part again"
    measured: Measured = {}
    with tempfile.TemporaryDirectory() as name:
        models.write(Path(name))
        for rule in RULES:
            peaks: dict[str, list[float]] = {who: [] for who in WHO}
            things = {who: _timed(who, rule, name, models.experts, threads, peaks[who]) for who in WHO}
            seconds = in_turn(things, repeats, rule)
            measured[rule] = {who: {"seconds": seconds[who], "peak": peaks[who]} for who in WHO}
    return measured


def _timed(who: str, rule: str, folder: str, experts: int, threads: int, peaks: list[float]) -> Timed:
    def seconds() -> float:
        sizes = ("--folder", folder, "--experts", experts, "--threads", threads)
        result = in_a_process("benchmarks.speed.files", who, rule, *sizes)
        peaks.append(result["peak"])
        return result["seconds"]

    return seconds


def rows(measured: Measured) -> list[list[str]]:
    """The rows of a table."""
    lines = [["rule", "com_lightning, s", "mergekit, s", "times as fast", "GiB", "mergekit, GiB", "times its memory"]]
    for rule, result in measured.items():
        us, them = result["com_lightning"], result["mergekit"]
        sizes = [spread([size / 2**30 for size in each["peak"]]) for each in (us, them)]
        fast, more = ratios(them["seconds"], us["seconds"]), ratios(us["peak"], them["peak"])
        lines.append([rule, spread(us["seconds"]), spread(them["seconds"]), spread(fast), *sizes, spread(more)])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("who", choices=WHO)
    parser.add_argument("rule", choices=RULES)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--experts", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured: dict[str, float] = {}
    WHO[options.who](options.rule, options.folder, options.experts, measured)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
