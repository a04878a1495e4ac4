"""A stand-in for a real base and real texts, so that all of this runs in minutes on a CPU and without a network.

Three tasks, a line each (`3 July 1998 = 1998-07-03`, `one wug, two wugs`, `7 + 5 = 12`), and a small Llama on bytes,
trained for a little while on all three. The nouns are made up, as in Berko's wug test, so that they are many.
"""

import argparse
import datetime
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning import Trainer, seed_everything
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.llama_lora.data import TextData
from examples.llama_lora.model import CausalLM

TASKS = ("dates", "plurals", "sums")
VAL = 64  # lines of a task that are not trained on


def lines(task: str) -> list[tuple[str, str]]:
    """All prompts and completions of a task."""
    if task == "dates":
        first = datetime.date(1950, 1, 1)
        days = [first + datetime.timedelta(number) for number in range(0, 100 * 365, 37)]
        return [(f"{day.day} {day:%B} {day.year} =", f" {day.isoformat()}") for day in days]
    if task == "plurals":
        ends = (*"bdgkmnptxy", "ch", "sh")
        nouns = [start + vowel + end for start in "bdfghklmnprtvwz" for vowel in "aeiou" for end in ends]
        return [(f"one {noun}, two", f" {plural(noun)}") for noun in nouns]
    return [(f"{a} + {b} =", f" {a + b}") for a in range(30) for b in range(30)]


def plural(noun: str) -> str:
    """Of a noun that is regular."""
    return f"{noun}es" if noun.endswith(("x", "ch", "sh")) else f"{noun}s"


def write_texts(folder: Path) -> None:
    """``<folder>/<task>/train.jsonl`` and ``val.jsonl``, which have no line in common."""
    for task in TASKS:
        rows = lines(task)
        random.Random(task).shuffle(rows)
        (folder / task).mkdir(parents=True, exist_ok=True)
        for split, part in {"val": rows[:VAL], "train": rows[VAL:]}.items():
            text = "".join(json.dumps({"prompt": prompt, "completion": rest}) + "\n" for prompt, rest in part)
            (folder / task / f"{split}.jsonl").write_text(text, encoding="utf-8")


def byte_tokenizer() -> Any:
    """A token for each byte, and a mark for the start and the end of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer: Any = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def main(args: Sequence[str] | None = None) -> None:
    """Write the texts, train the base on all of them, and write it as ``save_pretrained`` does."""
    parser = argparse.ArgumentParser(description="Make a small base and three small tasks.")
    parser.add_argument("--output", type=Path, default=Path("outputs/llama_lora"))
    parser.add_argument("--steps", type=int, default=400)
    given = parser.parse_args(args)

    seed_everything(0)
    write_texts(given.output / "texts")
    base, tokenizer = given.output / "base", byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    module = CausalLM(str(base), learning_rate=3e-3)
    texts = given.output / "texts"
    tasks = [TextData(str(base), str(texts / t / "train.jsonl"), str(texts / t / "val.jsonl")) for t in TASKS]
    for task in tasks:
        task.setup()
    mixture: Any = [row for task in tasks for row in task.splits["train"]]
    loader = DataLoader(mixture, batch_size=32, shuffle=True, collate_fn=tasks[0].collate)
    trainer = Trainer(max_steps=given.steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module.train(), loader)
    module.net.save_pretrained(base)


if __name__ == "__main__":
    main()
