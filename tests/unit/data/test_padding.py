"""Padding changes nothing: positions without data enter no statistic, wherever they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from com_lightning.core.chain.chain import merge_layers
from com_lightning.core.chain.options import ChainOptions
from com_lightning.core.layers import RowMask, rows_with_data
from com_lightning.core.sweep.task import LayerRecord, Padding, Task
from com_lightning.core.tensors.modules import average, named_tensors
from com_lightning.data.padding import count_padding, describe_padding, padding_masks
from com_lightning.errors import MergeError
from com_lightning.results.report import MergeReport
from tests.helpers import perturb, relative
from tests.helpers.chains import only

LENGTHS = [[5, 3, 6, 4], [2, 6, 6, 3]]
"""Of the sequences of each task."""

Batch = dict[str, Any]
Call = Callable[[nn.Module, Batch, int], object]


def experts_of(make: Callable[[], nn.Module]) -> list[nn.Module]:
    torch.manual_seed(0)
    base = make().eval()
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return [perturb(copy.deepcopy(base), 0.3, seed=n) for n in range(2)]


def merge(
    experts: list[nn.Module], batches: list[list[Batch]], call: Call
) -> tuple[dict[str, Tensor], list[LayerRecord]]:
    states = [{name: tensor for name, tensor, _ in named_tensors(expert)} for expert in experts]
    merged: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    for name, tensor in states[0].items():
        merged[name] = shared.setdefault(id(tensor), average([state[name] for state in states]))
    tasks = [
        Task(f"task{n}", e, b, call, masks=only(lambda batch: batch.get("attention_mask")))
        for n, (e, b) in enumerate(zip(experts, batches))
    ]
    return merged, merge_layers(tasks, merged, [0.5, 0.5], ChainOptions())


def sequences(low: int = 1, high: int = 30) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [[torch.randint(low, high, (n,), generator=generator) for n in lengths] for lengths in LENGTHS]


def each(tokens: list[list[Tensor]]) -> list[list[Batch]]:
    """Every sequence in a batch of its own."""
    return [[{"input_ids": t[None], "attention_mask": torch.ones(1, len(t)).bool()} for t in task] for task in tokens]


def padded(tokens: list[list[Tensor]], left: bool = False) -> list[list[Batch]]:
    """All sequences of a task in one batch, as long as the longest."""

    def turned(tensor: Tensor) -> Tensor:
        return tensor.flip(-1) if left else tensor

    batches = []
    for task in tokens:
        ids, mask = (
            turned(torch.nn.utils.rnn.pad_sequence([*map(turned, part)], batch_first=True, padding_value=value))
            for part, value in ((task, 7), ([torch.ones(len(t)) for t in task], 0))
        )
        batches.append([{"input_ids": ids, "attention_mask": mask.bool()}])
    return batches


def equal(one: dict[str, Tensor], two: dict[str, Tensor], unlike: dict[str, Tensor]) -> bool:
    """Whether ``one`` is ``two``, which ``unlike``, the merge with the padding counted, is not."""
    same = max(relative(one[name], two[name]) for name in two)
    return same < 2e-4 < max(relative(unlike[name], two[name]) for name in two)


SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def llama(module: nn.Module, batch: Batch, index: int) -> object:
    mask = batch["attention_mask"]
    return module(**batch, position_ids=(mask.cumsum(-1) - 1).clamp_min(0), use_cache=False)


def without_mask(batches: list[list[Batch]], call: Call) -> tuple[list[list[Batch]], Call]:
    """The same batches and forwards, of which nobody knows what is padding."""
    hidden = [[{"hidden": batch} for batch in task] for task in batches]
    return hidden, lambda module, batch, index: call(module, batch["hidden"], index)


@pytest.mark.parametrize("left", [False, True])
def test_causal_models_padded_on_either_side(left: bool) -> None:
    config = hf.LlamaConfig(**SMALL, vocab_size=30, num_key_value_heads=1, pad_token_id=0)
    experts, tokens = experts_of(lambda: hf.LlamaForCausalLM(config)), sequences()
    wrong = merge(experts, *without_mask(padded(tokens, left), llama))[0]
    assert equal(merge(experts, padded(tokens, left), llama)[0], merge(experts, each(tokens), llama)[0], wrong)


def test_learned_positions_and_a_tied_head() -> None:
    config = hf.BertConfig(**SMALL, vocab_size=30, max_position_embeddings=8)
    experts, tokens = experts_of(lambda: hf.BertForMaskedLM(config)), sequences()

    def call(module: nn.Module, batch: Batch, index: int) -> object:
        return module(**batch)

    wrong = merge(experts, *without_mask(padded(tokens), call))[0]
    assert equal(merge(experts, padded(tokens), call)[0], merge(experts, each(tokens), call)[0], wrong)


class Encoder(nn.Module):
    """PyTorch's own, in its own order: positions first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.encoder(self.embed(ids.T), src_key_padding_mask=~mask)
        return self.head(x)  # type: ignore[no-any-return]


def test_sequence_first_modules() -> None:
    experts, tokens = experts_of(Encoder), sequences()

    def call(module: nn.Module, batch: Batch, index: int) -> object:
        return module(batch["input_ids"], batch["attention_mask"])

    wrong = merge(experts, *without_mask(padded(tokens), call))[0]
    assert equal(merge(experts, padded(tokens), call)[0], merge(experts, each(tokens), call)[0], wrong)


def test_several_texts_in_one_row() -> None:
    config = hf.LlamaConfig(**SMALL, vocab_size=30, num_key_value_heads=1, pad_token_id=0)
    experts, tokens = experts_of(lambda: hf.LlamaForCausalLM(config)), sequences()

    def call(module: nn.Module, batch: Batch, index: int) -> object:
        return module(**{name: value for name, value in batch.items() if name != "attention_mask"}, use_cache=False)

    packed = []
    for task in tokens:
        owner = torch.cat([torch.full((len(t),), number) for number, t in enumerate(task)])
        allowed = (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner)).tril().bool()
        positions = torch.cat([torch.arange(len(t)) for t in task])
        batch = {"input_ids": torch.cat(task)[None], "position_ids": positions[None]}
        packed.append([{**batch, "mask": allowed[None, None]}])

    def packed_call(module: nn.Module, batch: Batch, index: int) -> object:
        return module(
            input_ids=batch["input_ids"],
            position_ids=batch["position_ids"],
            attention_mask=torch.zeros(batch["mask"].shape).masked_fill(~batch["mask"], torch.finfo().min),
            use_cache=False,
        )

    merged, expected = merge(experts, packed, packed_call)[0], merge(experts, each(tokens), call)[0]
    assert max(relative(merged[name], expected[name]) for name in expected) < 2e-4


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.before = nn.Embedding(30, 8), nn.Linear(8, 8)
        self.lstm, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x: Any = self.before(self.embed(ids))
        packed = pack_padded_sequence(x, mask.sum(-1), batch_first=True, enforce_sorted=False)
        output = self.lstm(packed)[0]
        assert isinstance(output, PackedSequence)
        return self.head(output.data)  # type: ignore[no-any-return]


def test_packed_sequences() -> None:
    experts, tokens = experts_of(Recurrent), sequences()

    def call(module: nn.Module, batch: Batch, index: int) -> object:
        return module(batch["input_ids"], batch["attention_mask"])

    merged, records = merge(experts, padded(tokens), call)
    expected, _ = merge(experts, each(tokens), call)
    assert max(relative(merged[name], expected[name]) for name in expected) < 2e-4
    notes = {record.name: str(record.note) for record in records if record.note}
    assert set(notes) == {f"lstm.{kind}_{of}_l0" for kind in ("weight", "bias") for of in ("ih", "hh")}
    assert all("lstm" in note for note in notes.values())


def test_a_mask_fits_positions_in_any_order() -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    flat = [True, True, False, True, False, False]
    for lead, expected in {
        (2, 3): flat,
        (6,): flat,
        (3, 2): [True, True, True, False, False, False],
        (1, 3): [0, 0, 1],
        (3,): [0, 0, 1],
    }.items():
        index = rows_with_data(RowMask([(mask, None)]), torch.Size(lead))
        assert index is not None
        assert index.tolist() == expected
    assert rows_with_data(RowMask([(mask, None)]), torch.Size([2])) is None


def names_and_rows(batch: Any) -> dict[str, tuple[int, bool]]:
    masks = padding_masks(batch, nn.Module(), "task 'a', calibration batch 0")
    return {name: (int(padding.mask.sum()), padding.is_certain) for name, padding in masks.items()}


def test_masks_are_found_wherever_a_batch_has_them() -> None:
    mask, labels = torch.tensor([[1, 1, 0], [1, 0, 0]]), torch.tensor([[5, -100], [5, 6]])
    assert names_and_rows(({"attention_mask": mask}, labels)) == {"0.attention_mask": (3, True)}
    both = {"query": {"attention_mask": mask}, "text": {"attention_mask": 1 - mask}}
    assert names_and_rows(both) == {"query.attention_mask": (3, True), "text.attention_mask": (3, True)}
    seq2seq = {"attention_mask": mask, "labels": labels}
    assert names_and_rows(seq2seq) == {"attention_mask": (3, True), "labels": (3, False)}
    with_own = {**seq2seq, "decoder_attention_mask": labels > 0}
    assert names_and_rows(with_own) == {"attention_mask": (3, True), "decoder_attention_mask": (3, True)}
    assert names_and_rows({"attention_mask": mask[:, None, None], "labels": labels.float()}) == {}
    assert names_and_rows({"labels": labels.clamp_min(0)}) == {}  # nothing is left out
    with pytest.raises(MergeError, match=r"calibration batch 0: its text\.attention_mask.*leaves out every position"):
        names_and_rows({"text": {"attention_mask": 0 * mask}})


def test_the_report_says_where_padding_was_left_out() -> None:
    masks: dict[str, dict[str, Padding]] = {
        "a": {"attention_mask": Padding(torch.tensor([[True, False], [True, True]]))},
        "b": {"attention_mask": Padding(torch.ones(2, 2).bool())},
        "c": {"labels": Padding(torch.tensor([[True, False], [True, True]]), is_certain=False)},
    }
    tasks = [Task(name, nn.Module(), [own], masks=lambda batch: batch) for name, own in masks.items()]
    rows = {"first": (3, "ad"), "second": (3, "ad"), "conv": (9, ""), "head": (4, ""), "not reached": (0, "")}
    records = [LayerRecord(n, "", rows=dict.fromkeys("abcd", k), masked=list(m)) for n, (k, m) in rows.items()]
    twice = [count_padding(tasks)] * 2  # two processes
    lines, warnings = describe_padding(twice, records, {})
    first = "2 layers (first to second); not in 1 layer (conv) with more rows than samples; 1 layer (head)"
    assert lines == [f"a: left out in {first} with as many rows as samples"]  # c's labels belong to no layer
    assert not warnings
    [line] = describe_padding(twice, records, {"a": "ValueError: no"})[0]
    assert line.endswith("; told by shapes alone, as a forward of a smaller batch failed (ValueError: no)")
    [nowhere] = describe_padding(twice, [LayerRecord("conv", "", rows={"a": 9})], {})[1]
    assert nowhere.startswith("task 'a': its padding mask, (2, 2), fits the inputs of no layer")
    assert "Padding of a: left out in 2" in MergeReport(padding=lines).summary()
