"""Train a LoRA adapter on the texts of one task.

python -m examples.llama_lora.train --base meta-llama/Llama-3.2-1B --data texts/dates --output adapters/dates
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning import Trainer, seed_everything
from peft import LoraConfig, get_peft_model

from examples.llama_lora.data import TextData
from examples.llama_lora.model import CausalLM


def main(args: Sequence[str] | None = None) -> None:
    """Train, and write the adapter as PEFT's ``save_pretrained`` does."""
    parser = argparse.ArgumentParser(description="Train a LoRA adapter on the texts of one task.")
    parser.add_argument("--base", required=True, help="any causal language model: a name on the Hub, or a folder")
    parser.add_argument("--data", required=True, type=Path, help="folder with train.jsonl and val.jsonl")
    parser.add_argument("--output", required=True, help="folder for the adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    given = parser.parse_args(args)

    seed_everything(0)
    module = CausalLM(given.base, given.learning_rate)
    settings = LoraConfig(r=given.rank, lora_alpha=2 * given.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    module.net = get_peft_model(module.net, settings)
    train, val = (str(given.data / f"{split}.jsonl") for split in ("train", "val"))
    data = TextData(given.base, train, val, batch_size=given.batch_size)
    trainer = Trainer(
        max_steps=given.steps,
        val_check_interval=given.steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module.train(), datamodule=data)
    module.net.save_pretrained(given.output)


if __name__ == "__main__":
    main()
