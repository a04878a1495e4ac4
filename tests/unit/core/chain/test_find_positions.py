"""A mask belongs to the positions that it was made for, whatever other shapes are like."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.heads import refit
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.sweep.context import Context
from com_lightning.core.sweep.distributed import Peers
from com_lightning.core.sweep.task import LayerRecord, Task
from com_lightning.data.padding import padding_masks
from com_lightning.data.smaller_batches import smaller_batches
from com_lightning.data.steps import Batch
from tests.helpers import built, relative
from tests.helpers.chains import SMALL
from tests.helpers.zoo import averages

Call = Callable[[nn.Module, Batch, int], object]


def by_names(module: nn.Module, batch: Batch, index: int) -> object:
    return module(**batch.content)


def by_ids(module: nn.Module, batch: Batch, index: int) -> object:
    return module(batch.content["input_ids"], batch.content["attention_mask"])


def merge(
    make: Callable[[], nn.Module],
    contents: Sequence[Mapping[str, Any]],
    call: Call = by_names,
    looks: bool = True,
    context: Context | None = None,
) -> tuple[dict[str, Tensor], dict[str, LayerRecord], list[str]]:
    """Merge two experts on the same batches. If it does not look, shapes alone tell where masks belong."""
    experts, context = built(make), context or Context()
    batches = [Batch(content, 0, padding_masks(content, experts[0], "batch")) for content in contents]
    tasks = [Task(name, expert, batches, call, lambda batch: batch.masks) for name, expert in zip("ab", experts)]
    for task in tasks:
        task.cuts = smaller_batches if looks else task.cuts
    merged = averages(experts)
    records = merge_layers(tasks, merged, [0.5, 0.5], ChainOptions(), context)
    return merged, {record.name: record for record in records}, context.warnings


def texts(lengths: list[int], size: int, seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 30, (len(lengths), size), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(size) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def longer(batch: Mapping[str, Tensor], *names: str, count: int = 1) -> dict[str, Tensor]:
    """The same batch with more padding."""
    fill = {"labels": -100}
    return {
        name: nn.functional.pad(value, (0, count), value=fill.get(name, 0)) if name in names else value
        for name, value in batch.items()
    }


def distance(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    return max(relative(one[name], two[name]) for name in two)


SOURCES, TARGETS = [3, 4, 2, 5, 3, 4], [6, 5, 6, 4, 2, 6]
BERT = hf.BertConfig(**SMALL, vocab_size=30, max_position_embeddings=12)


class SequenceFirst(nn.Module):
    """PyTorch's own order, then rows without an order, then one row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.flat, self.head = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(self.embed(ids.T), src_key_padding_mask=mask == 0).transpose(0, 1)
        x = self.flat(x.reshape(-1, 16)).view(*ids.shape, 8)
        return self.head((x * mask[..., None]).sum(1))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "call", "heads"),
    [
        (lambda: hf.BertForSequenceClassification(BERT), by_names, ["bert.pooler.dense", "classifier"]),
        (SequenceFirst, by_ids, ["head"]),
    ],
    ids=["bert", "sequence first"],
)
def test_as_many_samples_as_positions(make: Callable[[], nn.Module], call: Call, heads: list[str]) -> None:
    batches = [texts(SOURCES, 6, seed) for seed in range(2)]
    merged, records, warnings = merge(make, batches, call)
    assert {name: record.rows["a"] for name, record in records.items() if not record.masked} == dict.fromkeys(heads, 12)
    assert {record.rows["a"] for record in records.values() if record.masked} <= {2 * sum(SOURCES)}
    assert not warnings
    names = "input_ids", "attention_mask"
    expected, others, _ = merge(make, [longer(batch, *names) for batch in batches], call, looks=False)
    assert distance(merged, expected) < 2e-4
    assert {n: r.rows for n, r in others.items()} == {n: r.rows for n, r in records.items()}


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    tokens: dict[str, Any] = {"pad_token_id": 0, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, **tokens, dropout_rate=0.0))


def translations(way: str) -> dict[str, Tensor]:
    batch, targets = texts(SOURCES, 6), texts(TARGETS, 6, seed=1)
    ids, mask = targets["input_ids"], targets["attention_mask"]
    if way in ("labels", "full labels"):
        return {**batch, "labels": ids.masked_fill(mask == 0, -100 if way == "labels" else 7)}
    return {**batch, "decoder_input_ids": ids, **({"decoder_attention_mask": mask} if way == "mask" else {})}


@pytest.mark.parametrize(
    ("way", "rows"), [("labels", sum(TARGETS)), ("mask", sum(TARGETS)), ("ids", 36), ("full labels", 36)]
)
def test_encoder_and_decoder_of_one_length(way: str, rows: int) -> None:
    merged, records, warnings = merge(t5, [translations(way)])
    attention = "decoder.block.0.layer.1.EncDecAttention"
    for name, expected in {
        "encoder.block.0.layer.1.DenseReluDense.wi": sum(SOURCES),
        f"{attention}.k": sum(SOURCES),
        f"{attention}.q": rows,
        "decoder.block.0.layer.2.DenseReluDense.wi": rows,
    }.items():
        assert records[name].rows == {"a": expected, "b": expected}, name
        assert records[name].masked == (["a", "b"] if expected < 36 else [])
    assert not warnings
    if rows < 36:  # more padding changes nothing
        batch = longer(translations(way), "labels", "decoder_input_ids", "decoder_attention_mask", count=3)
        assert distance(merge(t5, [batch])[0], merged) < 2e-4


def test_labels_of_the_input_are_no_mask() -> None:
    batch = texts(SOURCES, 6)
    labelled = {**batch, "labels": batch["input_ids"].masked_fill(torch.rand(6, 6) < 0.5, -100)}
    _, records, warnings = merge(lambda: hf.BertForMaskedLM(BERT), [labelled])
    assert {record.rows["a"] for record in records.values() if record.rows} == {sum(SOURCES)}
    assert not warnings


def test_two_inputs_have_a_mask_each() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.text = hf.BertModel(BERT), hf.BertModel(BERT)

        def forward(self, query: Any, text: Any) -> Any:
            return self.query(**query).pooler_output * self.text(**text).pooler_output

    _, records, _ = merge(Towers, [{"query": texts(SOURCES, 6), "text": texts(TARGETS, 6, seed=1)}])
    for tower, lengths in {"query": SOURCES, "text": TARGETS}.items():
        assert records[f"{tower}.encoder.layer.0.output.dense"].rows["a"] == sum(lengths)
        assert records[f"{tower}.pooler.dense"].rows["a"] == 6


def test_where_shapes_are_clear_nothing_changes() -> None:
    batches = [texts(SOURCES, 7, seed) for seed in range(2)]
    looked, guessed = (merge(lambda: hf.BertForMaskedLM(BERT), batches, looks=looks)[0] for looks in (True, False))
    assert all(torch.equal(looked[name], guessed[name]) for name in guessed)


class Fixed(nn.Module):
    """Takes batches of one shape only."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if len(ids) != 6 or ids.shape[1] < 6:
            raise ValueError("six of six, please")
        return self.head((self.body(self.embed(ids)) * mask[..., None]).sum(1))  # type: ignore[no-any-return]


def test_what_cannot_be_told_is_a_warning() -> None:
    _, _, [warning] = merge(Fixed, [texts(SOURCES, 6)], by_ids)
    assert warning.startswith(
        "padding of a, b: a mask fits the inputs of embed, body, head, but these may be other rows"
    )
    assert "a forward of a smaller batch failed: ValueError: six of six, please" in warning
    _, records, warnings = merge(Fixed, [texts(SOURCES, 7)], by_ids)
    assert {name: record.rows["a"] for name, record in records.items()} == {"embed": 21, "body": 21, "head": 6}
    assert not warnings


class Heads(nn.Module):
    """Has as many heads, after its positions are gone, as there were positions."""

    def __init__(self, pads: bool = False) -> None:
        super().__init__()
        self.embed, self.body, self.pads = nn.Embedding(30, 8 if pads else 28), nn.Linear(8 if pads else 4, 4), pads

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.pads:  # to a multiple of 7, as Longformer does
            ids = nn.functional.pad(ids, (0, -ids.shape[1] % 7))
            return self.body(self.embed(ids))  # type: ignore[no-any-return]
        return self.body(self.embed(ids).mean(1).view(len(ids), 7, 4))  # type: ignore[no-any-return]


def test_a_size_of_the_model_that_is_the_number_of_positions_is_a_warning() -> None:
    _, _, [warning] = merge(Heads, [texts(SOURCES, 7)], by_ids)
    assert "fits the inputs of body, but" in warning
    _, records, warnings = merge(lambda: Heads(pads=True), [texts(SOURCES, 14)], by_ids)
    assert {record.rows["a"] for record in records.values()} == {sum(SOURCES)}
    assert not warnings


class Other(Peers):
    """Another process, which has seen where the masks belong."""

    def __init__(self, seen: Any) -> None:
        self.seen = seen

    def exchange(self, value: Any) -> list[Any]:
        is_place = isinstance(value, tuple) and len(value) == 2 and all(type(entry) is dict for entry in value)
        if is_place and self.seen is None:
            self.seen = value
        return [value, self.seen] if is_place else [value]


def test_processes_tell_each_other() -> None:
    peers = Other(None)
    merge(lambda: hf.BertForSequenceClassification(BERT), [texts(SOURCES, 6)], context=Context(peers=peers))
    assert set(peers.seen[0]) == {"a", "b"}

    def fails_if_small(module: nn.Module, batch: Batch, index: int) -> object:
        if len(batch.content["input_ids"]) < 6:
            raise ValueError("too small")
        return by_names(module, batch, index)

    make, context = lambda: hf.BertForSequenceClassification(BERT), Context(peers=Other(peers.seen))
    _, records, warnings = merge(make, [texts(SOURCES, 6)], fails_if_small, context=context)
    assert records["classifier"].rows["a"] == 6
    assert not warnings


def test_experts_and_batches_stay_as_they_are() -> None:
    batch = texts(SOURCES, 6)
    before = copy.deepcopy(batch)
    merge(lambda: hf.BertForSequenceClassification(BERT), [batch])
    assert all(torch.equal(batch[name], before[name]) for name in before)


def test_private_heads_are_told_apart_too() -> None:
    experts = built(lambda: hf.BertForSequenceClassification(BERT))
    shared = {name: value for name, value in averages(experts).items() if not name.startswith("classifier")}
    batches = [Batch(texts(SOURCES, 6), 0, padding_masks(texts(SOURCES, 6), experts[0], "batch"))]
    tasks = [Task(name, expert, batches, by_names, lambda b: b.masks) for name, expert in zip("ab", experts)]
    for task in tasks:
        task.cuts = smaller_batches
    records, _ = refit(tasks, shared, {}, ChainOptions(refit_heads=True), Context())
    assert {record.name: record.rows for record in records} == {f"classifier of {name}": {name: 6} for name in "ab"}
