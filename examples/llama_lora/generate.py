"""Let a model go on with texts, greedily. The merged model is a folder of transformers like any other.

python -m examples.llama_lora.generate outputs/llama_lora/merged/transformers "3 July 1998 =" "one fox, two"
"""

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(args: Sequence[str] | None = None) -> None:
    """Print each prompt with what the model makes of it."""
    parser = argparse.ArgumentParser(description="Let a model go on with texts, greedily.")
    parser.add_argument("model", help="a folder, or a name on the Hub")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=40, help="most tokens of an answer")
    given = parser.parse_args(args)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(given.model)
    model.to(device)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    for prompt in given.prompts:
        batch = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
        tokens = model.generate(**batch, max_new_tokens=given.tokens, do_sample=False)
        print(tokenizer.decode(tokens[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
