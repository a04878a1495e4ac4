"""Six text tasks on a pretrained MiniLM: BBC topics, spam, film, product and newspaper sentiment, quotations by topic.

``texts6`` fine-tunes all weights, ``lora6`` LoRA adapters of rank 16 at every linear layer.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel, AutoTokenizer

from benchmarks.suites import texts
from benchmarks.suites.modules import Classifier
from benchmarks.suites.splits import SplitData, first_of_each, split
from benchmarks.suites.suite import Recipe, Suite

CLASSES = {"topics": 5, "spam": 2, "film": 2, "product": 2, "newspaper": 2, "quotations": len(texts.TOPICS)}
TOKENS = {"topics": 48, "spam": 48}  # from the beginning of a text
MOST_TOKENS = 32  # for other tasks: most of their sentences are shorter
VAL, TEST = 400, 500
Row = dict[str, Any]


class TextClassifier(Classifier):
    """A pretrained encoder, mean-pooled over the tokens.

    Args:
        classes: number of classes.
        rank: rank of LoRA adapters; with 0, the encoder itself is trained.
    """

    def __init__(self, classes: int, rank: int = 0, **optimizer: float) -> None:
        net: Any = AutoModel.from_pretrained(texts.minilm_folder(), add_pooling_layer=False)
        super().__init__(net.config.hidden_size, classes, **optimizer)
        self.save_hyperparameters()
        # A few epochs of fine-tuning need no dropout, and without it training is faster.
        net.config.hidden_dropout_prob = net.config.attention_probs_dropout_prob = 0.0
        adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        self.net = get_peft_model(net, adapters) if rank else net

    def features(self, batch: Any) -> Tensor:
        mask = batch["attention_mask"]
        tokens: Tensor = self.net(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
        pooled: Tensor = (tokens * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        return pooled

    def labels(self, batch: Any) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels


@cache
def task_splits(task: str) -> dict[str, list[Row]]:
    """Tokens and label of each text, by split.

    Duplicates are removed: texts that differ only in case, punctuation and spaces, and texts that look the same to the
    model, which only sees their beginning.
    """
    samples = [sample for sample in texts.CLASSIFICATION[task]() if sample[0]]
    samples = [samples[index] for index in first_of_each([texts.normalized(text) for text, _ in samples])]
    most = TOKENS.get(task, MOST_TOKENS)
    beginnings = [text[: 40 * most] for text, _ in samples]  # tokenizing the rest of a long text would only take time
    tokens = _tokenizer()(beginnings, truncation=True, max_length=most)["input_ids"]
    unique = first_of_each([tuple(row) for row in tokens])
    rows = [{"input_ids": tokens[index], "labels": samples[index][1]} for index in unique]
    parts = split(task, len(rows), min(VAL, len(rows) // 4), min(TEST, len(rows) // 4))
    return {name: [rows[number] for number in part] for name, part in parts.items()}


class TextData(SplitData):
    """The texts of a task as batches of tokens, padded to the longest."""

    def __init__(self, task: str, batch_size: int = 16, eval_batch_size: int = 50) -> None:
        super().__init__(batch_size, eval_batch_size)
        self.task = task

    def make_split(self, name: str) -> Dataset[Any]:
        rows: Any = task_splits(self.task)[name]
        if name != "train":  # batches of texts with similar length need little padding
            rows = sorted(rows, key=lambda row: len(row["input_ids"]))
        return cast("Dataset[Any]", rows)  # a loader accepts a list

    def collate(self, rows: list[Any]) -> Any:
        return {**_tokenizer().pad(rows, return_tensors="pt")}


@cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(texts.minilm_folder())


class Texts6(Suite):
    """The tasks with all weights fine-tuned."""

    name = "texts6"
    title = "Six text tasks, MiniLM"
    tasks = tuple(CLASSES)
    recipe = Recipe(steps=200, batch_size=16, learning_rate=1e-4, warmup=0.1)
    rank = 0

    def base_module(self) -> LightningModule:
        return TextClassifier(2, self.rank)

    def expert_module(self, task: str, base: LightningModule) -> LightningModule:
        return TextClassifier(CLASSES[task], self.rank, **self.expert_recipe(task).optimizer())

    def data(self, task: str) -> TextData:
        return TextData(task, self.expert_recipe(task).batch_size)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "rank": self.rank, "tokens": [MOST_TOKENS, TOKENS], "sizes": [VAL, TEST]}


class Lora6(Texts6):
    """The tasks with LoRA adapters; the heads are trained beside them."""

    name = "lora6"
    title = "Six text tasks, LoRA adapters of MiniLM"
    version = 2
    recipe = Recipe(steps=200, batch_size=16, learning_rate=1e-3, warmup=0.1)
    rank = 16

    def expert_module(self, task: str, base: LightningModule) -> LightningModule:
        expert: Any = super().expert_module(task, base)
        expert.net.load_state_dict(base.net.state_dict())  # type: ignore[union-attr]  # adapters begin at random
        return expert  # type: ignore[no-any-return]
