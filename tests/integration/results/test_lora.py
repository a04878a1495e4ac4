"""The difference of two models as an adapter of PEFT."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from com_lightning import ChainOfMerges, MergeDataModule, merge
from com_lightning.data.datamodule import TaskLoaders
from com_lightning.errors import MergeError
from com_lightning.results import corrections
from com_lightning.results.lora import Adapter, adapter_between, write_adapter
from tests.helpers import Classifier, make_data, make_experts


def bert() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    model: nn.Module = BertForSequenceClassification(BertConfig(vocab_size=50, intermediate_size=64, **sizes))
    return model


def gpt() -> nn.Module:
    model: nn.Module = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=2))
    return model


def images() -> nn.Module:
    filters = {"stem": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "depthwise": nn.Conv2d(16, 16, 3, 1, 1, 1, 16)}
    return nn.Sequential(OrderedDict({**filters, "flat": nn.Flatten(), "head": nn.Linear(16 * 36, 5)}))


def ids() -> Tensor:
    return torch.randint(0, 50, (4, 7))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Callable[[Any], Tensor]]] = {
    "bert": (bert, ids, lambda output: output.logits),
    "gpt": (gpt, ids, lambda output: output.logits),
    "images": (images, lambda: torch.randn(2, 3, 8, 8), lambda output: output),
}


def changed(base: nn.Module, rank: int) -> nn.Module:
    """A copy with other norms, biases and depthwise filters, and weights that differ by that rank."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point() and (tensor.dim() == 1 or "depthwise" in name):
                tensor.add_(0.1 * torch.rand_like(tensor))
            elif tensor.dim() > 1 and "embed" not in name and "wte" not in name and "wpe" not in name:
                matrix = tensor.view(len(tensor), -1)
                matrix.add_(0.1 * torch.randn(len(matrix), rank) @ torch.randn(rank, matrix.shape[1]))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_peft_loads_it_on_the_base_with_the_same_outputs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    build, batch, logits = MODELS[name]
    base = build().eval()
    model, inputs, before = changed(base, 2).eval(), batch(), copy.deepcopy(base.state_dict())
    if name == "bert":
        model.classifier = nn.Linear(32, 3)  # full rank: it is replaced as a whole
    adapter = adapter_between(base, model, 2)
    write_adapter(adapter, base, model, tmp_path)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    with torch.no_grad():
        theirs, ours, without = (logits(each(inputs)) for each in (loaded, model, base))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    assert (ours - without).abs().max() > 0.01
    assert adapter.kept > 1 - 1e-6
    stored = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert 4 * adapter.numel(base) <= stored <= 4 * adapter.numel(base) + 20_000


def test_a_merge_writes_one_base_and_an_adapter_for_each_task(tmp_path: Path) -> None:
    experts = {f"task{n}": expert for n, expert in enumerate(make_experts((3, 3)))}
    data = {task: TaskLoaders(make_data(n).val_dataloader()) for n, task in enumerate(experts)}
    method = ChainOfMerges(task_rank=2, refit_heads=True)
    result = merge(
        copy.deepcopy(experts["task0"]), experts, MergeDataModule(data, num_samples=20), method, private=["head"]
    )
    result.save(tmp_path / "out")
    folder, inputs = tmp_path / "out" / "adapters", torch.randn(4, 6)
    assert result.report.parameters["body.0.weight"].detail == "with a correction of rank 2 for each task"
    assert set(load_file(tmp_path / "out" / "merged.safetensors")) >= {"body.0.weight", "body.3.weight"}
    for task, module in result.modules.items():
        base = Classifier.load_from_checkpoint(folder / "base.ckpt", weights_only=True)
        loaded = PeftModel.from_pretrained(base, str(folder / task)).eval()
        with torch.no_grad():
            torch.testing.assert_close(loaded(inputs), module.eval()(inputs), rtol=1e-4, atol=1e-5)
    sizes = [(folder / task / "adapter_model.safetensors").stat().st_size for task in experts]
    assert max(sizes) < (folder / "base.ckpt").stat().st_size
    (check,) = [check for check in result.report.checks if "adapters/" in check]
    assert check.startswith("adapters/task0, adapters/task1: loaded by PeftModel.from_pretrained on base.ckpt, its 8")
    assert check.endswith("tensors (up to rounding), settings and outputs are those in memory")
    settings = json.loads((folder / "task1" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == f"{folder}/base.ckpt"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda adapter: adapter.factors["body.3"][0].zero_(), "body.3.weight has other values; the outputs of body"),
        (lambda adapter: adapter.whole.remove("body.1"), "body.1.weight, body.1.bias have other values"),
        (None, "cannot load it (ValueError"),
    ],
)
def test_adapters_that_give_another_module_are_a_warning(
    fault: Any, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(adapter: Adapter, base: Any, model: Any, folder: Path, name: str) -> None:
        if fault and folder.name == "task1":
            fault(adapter)
        write_adapter(adapter, base, model, folder, name)
        if not fault and folder.name == "task1":
            (folder / "adapter_config.json").unlink()

    monkeypatch.setattr(corrections, "write_adapter", damaged)
    experts = {f"task{n}": expert for n, expert in enumerate(make_experts((3, 3)))}
    data = MergeDataModule({task: make_data(n) for n, task in enumerate(experts)}, num_samples=20)
    result = merge(copy.deepcopy(experts["task0"]), experts, data, ChainOfMerges(task_rank=2), private=["head"])
    result.save(tmp_path / "out")
    (warning,) = [warning for warning in result.report.warnings if "adapters/" in warning]
    assert warning.startswith("adapters/task1: ")
    assert told in warning
    assert "Take the task's module from task1.ckpt" in warning
    assert any("adapters/task0: loaded by" in check for check in result.report.checks)


def test_layers_without_bias_beside_layers_with_one(tmp_path: Path) -> None:
    """PEFT's configuration has biases for all of them, or for none."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(first=nn.Linear(20, 30, bias=False), second=nn.Linear(30, 20)))
    model = changed(base, 2)
    write_adapter(adapter_between(base, model, 2), base, model, tmp_path)
    x = torch.randn(5, 20)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)
    merged = corrections.load_on_base(copy.deepcopy(base), tmp_path, model)
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-4)


def test_layers_have_the_rank_that_they_need(tmp_path: Path) -> None:
    """And no product is scaled where PEFT has another rank than that of the configuration."""
    torch.manual_seed(0)
    base = nn.Sequential(OrderedDict(first=nn.Linear(20, 30), second=nn.Linear(30, 20), third=nn.Linear(20, 2)))
    model = copy.deepcopy(base)
    with torch.no_grad():
        for layer, rank in zip(model, (1, 3, 2)):
            assert isinstance(layer, nn.Linear)
            layer.weight += torch.randn(len(layer.weight), rank) @ torch.randn(rank, layer.in_features)
    adapter = adapter_between(base, model, 4)
    assert {name: len(down) for name, (_, down) in adapter.factors.items()} == {"first": 1, "second": 3, "third": 2}
    write_adapter(adapter, base, model, tmp_path)
    x = torch.randn(5, 20)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def test_what_is_stored_in_16_bits_differs_by_rounding_and_still_has_a_low_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48))
    model = changed(base, 2)
    adapter = adapter_between(base.bfloat16(), model.bfloat16(), 2)
    write_adapter(adapter, base, model, tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    loaded: Any = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).merge_and_unload()
    weight, expected = loaded[0].weight.double(), model[0].weight.double()  # type: ignore[index]
    assert (weight - expected).norm() < torch.finfo(torch.bfloat16).eps * expected.norm()


def test_a_corrected_weight_that_peft_has_no_factors_for_is_told(tmp_path: Path) -> None:
    base = Classifier()
    module = copy.deepcopy(base)
    with torch.no_grad():
        module.body[0].weight += torch.ones(8, 1) @ torch.ones(1, 6)  # type: ignore[operator]
        module.body[3].weight += torch.randn(8, 8)  # type: ignore[operator]
    both = corrections.Corrections(base, ["body.0.weight", "body.3.weight"], 1)
    told, written = corrections.write_corrections(both, {"a": module}, tmp_path / "out", lambda *_: None)
    (warning,) = told
    assert warning.startswith("out: body.*.weight is in the adapters as a whole and not as factors")
    assert [*written] == [tmp_path / "out" / "a"]


def test_an_approximation_says_how_much_it_keeps() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(20, 30))
    model = changed(base, 8)
    near = adapter_between(base, model, 4, approximate=True)
    with pytest.raises(MergeError, match="no weight of a linear layer or convolution differs by rank 4"):
        adapter_between(base, model, 4)
    assert 0.5 < near.kept < 0.99
    up, down = near.factors["0"]
    values = torch.linalg.svdvals((model[0].weight - base[0].weight).detach().double())  # type: ignore[index]
    left = (model[0].weight - base[0].weight).detach().double() - up @ down  # type: ignore[index]
    torch.testing.assert_close(left.square().sum(), values[4:].square().sum(), rtol=1e-3, atol=0)


def test_what_no_adapter_can_hold_is_an_error() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.ones(3))

    base, model = Scaled(), Scaled()
    model.load_state_dict(base.state_dict())
    nn.init.zeros_(model.scale)
    with torch.no_grad():
        model.linear.weight[0] += 1
    with pytest.raises(MergeError, match="belongs to the model itself"):
        adapter_between(base, model, 1)
    with pytest.raises(MergeError, match=r"other parameters: bias, linear.bias"):
        adapter_between(base, nn.Linear(3, 3), 1)
    unnamed = nn.Sequential(nn.Linear(9, 9), nn.Sequential(nn.Linear(9, 9)))
    with pytest.raises(MergeError, match=r"0 also ends 1\.0"):
        adapter_between(unnamed, changed(unnamed, 1), 1)
