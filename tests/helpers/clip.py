"""A tiny random CLIP, tiny images, and a cache of the Hub that holds experts of it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
)

from examples.clip_8_tasks.prompts import CLASSES, TASKS
from tests.helpers import perturb
from tests.helpers.hub import put
from tests.helpers.running import ROOT

FOLDER = ROOT / "examples" / "clip_8_tasks"
SIZE = 32
QUIET = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]


def tiny_tokenizer() -> Any:
    """Words for tokens, and CLIP's marks around a text."""
    tokenizer: Any = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start, end, unknown = marks = ["<start>", "<end>", "<unk>"]
    texts = [t.format(name) for prompts in CLASSES.values() for t in prompts.templates for name in prompts.names]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=marks))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(mark, tokenizer.token_to_id(mark)) for mark in (start, end)]
    )
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=tokenizer, bos_token=start, eos_token=end, pad_token=end, unk_token=unknown)


def tiny_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {**size, **marks, "pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    vision = {**size, "image_size": SIZE, "patch_size": 16}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    model: Any = CLIPModel(config)
    perturb(model.vision_model, 1.0)  # fresh ones tell no image from another
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_images(root: Path) -> Path:
    """One image of each class in each split; the names of the folders sort in another order than the labels."""
    for number, task in enumerate(TASKS):
        for label, name in enumerate(CLASSES[task].names):
            for split in ("train", "test"):
                path = root / task / split / re.sub(r"[^\w.-]+", "_", name) / "0.png"
                path.parent.mkdir(parents=True)
                color = (40 * number % 256, label * 50 % 256, label // 5 * 60 % 256)
                Image.new("RGB", (4, 5), color).save(path)
    return root


def data_options(images: Path) -> list[str]:
    own = {"folder": images, "image_size": SIZE, "num_workers": 0}
    return [f"--data.tasks.{task}.{name}={value}" for task in TASKS for name, value in own.items()]


def config(name: str) -> str:
    return f"--config={FOLDER / name}"


def make_hub(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The base and the experts under their names on the Hub, as downloads leave them."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    put(cache, "openai/clip-vit-base-patch32", base)
    for number, source in enumerate(yaml.safe_load((FOLDER / "vit-b-32.yaml").read_text())["experts"].values()):
        clip: Any = CLIPModel.from_pretrained(base)
        perturb(clip.vision_model, 0.2, seed=number).save_pretrained(tmp_path / "tower")  # type: ignore[operator]
        put(cache, source.removeprefix("hf://"), tmp_path / "tower")
        shutil.rmtree(tmp_path / "tower")
    return cache
