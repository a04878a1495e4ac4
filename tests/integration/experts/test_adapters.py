"""PEFT adapters: folders, PeftModels, and modules that wrap one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.core.tensors.modules import named_tensors
from com_lightning.experts.load import ExpertSource, load_expert
from tests.helpers import FEATURES, quiet_trainer
from tests.helpers.adapters import LoraModule, adapted, trained
from tests.helpers.networks import Net, Wrapper
from tests.helpers.running import save_lightning
from tests.helpers.texts import TextModule, make_bert, make_texts


def logits(net: Any) -> Tensor:
    ids = torch.randint(5, 30, (4, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return net.eval()(ids).logits  # type: ignore[no-any-return]


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(logits(actual), logits(expected), rtol=1e-4, atol=1e-5)


def saved(folder: Path, *args: Any, **kwargs: Any) -> Path:
    adapted(*args, **kwargs).save_pretrained(str(folder))
    return folder


def merge(sources: dict[str, ExpertSource], model: LightningModule, **kwargs: Any) -> ChainOfMergesCallback:
    data = MergeDataModule({task: make_texts(number) for number, task in enumerate(sources)}, num_samples=16)
    callback = ChainOfMergesCallback(sources, **{"baselines": False, **kwargs})
    quiet_trainer(callbacks=[callback]).validate(model, datamodule=data, verbose=False)
    return callback


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "other layers": {"target_modules": ["dense"], "r": 3},
    "all layers": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ["word_embeddings", "query"]},
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"query": 4}},
    "biases": {"bias": "all"},
    "DoRA": {"use_dora": True},
}


# Folders and PeftModels


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kind", ["folder", "module"])
def test_an_adapter_is_folded_into_the_model(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    expected = adapted(1, **settings)
    source: ExpertSource = saved(tmp_path, 1, **settings) if kind == "folder" else expected
    before = copy.deepcopy(expected.state_dict())
    model = TextModule()
    own = copy.deepcopy(model.state_dict())
    expert = load_expert("a", source, model)
    close(expert.net, expected)
    assert set(expert.state_dict()) == set(own)
    torch.testing.assert_close(model.state_dict(), own, rtol=0, atol=0)
    torch.testing.assert_close(expected.state_dict(), before, rtol=0, atol=0)


def test_ranks_layers_and_heads_may_differ(tmp_path: Path) -> None:
    a = saved(tmp_path / "a", 1)
    b = saved(tmp_path / "b", 2, labels=5, r=4, target_modules=["query", "dense"])
    callback = merge({"a": a, "b": b}, TextModule())
    account = callback.report.parameters
    assert {n for n, what in account.items() if what.status.startswith("private")} == {
        "net.classifier.weight",
        "net.classifier.bias",
    }
    assert callback.modules["b"].net.num_labels == 5  # type: ignore[union-attr]
    expert = load_expert("b", b, TextModule())
    close(expert.net, adapted(2, labels=5, r=4, target_modules=["query", "dense"]))


def test_an_adapter_saved_as_bin_is_read_safely(tmp_path: Path) -> None:
    expected = adapted(1)
    expected.save_pretrained(str(tmp_path), safe_serialization=False)
    assert (tmp_path / "adapter_model.bin").is_file()
    close(load_expert("a", tmp_path, TextModule()).net, expected)


def test_adapters_of_plain_networks(tmp_path: Path) -> None:
    """Not only transformers' models; and into a compiled one."""
    torch.manual_seed(0)
    net = Net().eval()
    expected = adapted(1, net=copy.deepcopy(net), target_modules=["0", "3"])
    expected.save_pretrained(str(tmp_path))
    x = torch.randn(4, FEATURES)
    for compiled in (False, True):
        model = Wrapper()
        model.net = torch.compile(copy.deepcopy(net)) if compiled else copy.deepcopy(net)
        expert = load_expert("a", tmp_path, model)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            torch.testing.assert_close(expert(x), expected(x))


def test_the_same_adapter_twice_gives_it_back(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", 1)
    callback = merge({"a": folder, "b": folder}, TextModule(), private=[], output_dir=str(tmp_path / "out"))
    close(callback.modules["a"].net, adapted(1))
    close(AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "transformers"), adapted(1))


def without_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def of_other_layers(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    state = {n.replace("layer.1", "layer.7"): t for n, t in state.items()}
    save_file(state, folder / "adapter_model.safetensors")


def of_other_sizes(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    state = {n: torch.zeros(2, 8) if n.endswith("query.lora_A.weight") else t for n, t in state.items()}
    save_file(state, folder / "adapter_model.safetensors")


def lacking_some(folder: Path) -> None:
    state = load_file(folder / "adapter_model.safetensors")
    save_file({n: t for n, t in state.items() if "layer.1" not in n}, folder / "adapter_model.safetensors")


def broken(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without_weights, "has no adapter_model.safetensors or adapter_model.bin"),
        (of_other_layers, r"no part of TextModule has all its layers; net comes closest and lacks bert.*layer.7"),
        (
            of_other_sizes,
            "LORA cannot be merged into net .*lora_A.default.weight is .2, 8., in the model .2, 16. and 1 more",
        ),
        (lacking_some, "missing adapter keys.*layer.1"),
        (broken, "adapter_config.json cannot be read"),
    ],
)
def test_adapters_that_do_not_fit(change: Any, told: str, tmp_path: Path) -> None:
    change(saved(tmp_path, 1))
    with pytest.raises(MergeError, match=told) as caught:
        load_expert("a", tmp_path, TextModule())
    assert str(tmp_path) in str(caught.value)


def test_adapters_that_change_no_weights(tmp_path: Path) -> None:
    config = PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    get_peft_model(make_bert(), config).save_pretrained(str(tmp_path))
    with pytest.raises(MergeError, match=r"PREFIX_TUNING changes a model.s inputs, not its weights"):
        load_expert("a", tmp_path, TextModule())


def test_another_base_is_warned_of(tmp_path: Path) -> None:
    make_bert().save_pretrained(tmp_path / "bert-a")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert-a")
    get_peft_model(model, LoraConfig(r=2, task_type="SEQ_CLS")).save_pretrained(str(tmp_path / "adapter"))
    ours = TextModule()
    ours.net.config._name_or_path = "hub/bert-b"
    with pytest.warns(UserWarning, match=r"trained on '.*bert-a', and is merged into your model's 'hub/bert-b'"):
        load_expert("a", tmp_path / "adapter", ours)


# Modules that wrap a PeftModel


@pytest.mark.parametrize("kind", ["module", "ckpt", "state dict", "adapter"])
def test_a_module_with_adapters_is_folded_in_place(kind: str, tmp_path: Path) -> None:
    expected = trained(1)
    before = copy.deepcopy(expected.state_dict())
    source: Any = expected
    if kind == "ckpt":
        source = save_lightning(copy.deepcopy(expected), tmp_path / "a.ckpt")
    elif kind == "state dict":
        source = expected.state_dict()
    elif kind == "adapter":
        expected.net.save_pretrained(str(tmp_path))
        source = tmp_path
    expert = load_expert("a", source, LoraModule())
    close(expert.net, expected.net)
    again = LoraModule()
    again.load_state_dict(expert.state_dict())
    close(again.net, expected.net)
    torch.testing.assert_close(expected.state_dict(), before, rtol=0, atol=0)
    base = expert.get_parameter("net.base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight")
    assert not torch.equal(
        base, before["net.base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"]
    )


def test_merged_modules_with_adapters(tmp_path: Path) -> None:
    """Of different ranks; what is written is loaded by their class, and by transformers, without adapters."""
    experts: dict[str, Any] = {"a": trained(1), "b": save_lightning(trained(2, rank=3), tmp_path / "b.ckpt")}
    callback = merge(experts, LoraModule(), output_dir=str(tmp_path / "out"))
    account = callback.report.parameters
    assert all(what.status == "folded" for name, what in account.items() if "lora_" in name)
    assert callback.report.sizes["private"] == 0
    assert (tmp_path / "out" / "transformers" / "model.safetensors").is_file()  # one for all
    query = "net.base_model.model.bert.encoder.layer.0.attention.self.query.base_layer.weight"
    assert account[query].status == "solved"
    for task in "ab":
        module = callback.modules[task]
        close(LoraModule.load_from_checkpoint(tmp_path / "out" / f"{task}.ckpt", weights_only=True).net, module.net)
        folder = tmp_path / "out" / "transformers"
        close(AutoModelForSequenceClassification.from_pretrained(folder), module.net)
        assert not [name for name in load_file(folder / "model.safetensors") if "lora" in name]


def test_merging_adapters_in_modules_is_merging_what_they_fold_to() -> None:
    """The layers are called once, and nothing of the adapters is solved."""
    a, b = trained(1), trained(2)
    plain: dict[str, Any] = {}
    for task, module in (("a", a), ("b", b)):
        plain[task] = TextModule()
        plain[task].net = copy.deepcopy(module.net).merge_and_unload()
    expected = merge(plain, TextModule(), private=["net.classifier"])
    found = merge({"a": a, "b": b}, LoraModule(), private=["net.base_model.model.classifier"])
    for task in "ab":
        close(found.modules[task].net, expected.modules[task].net)
    assert not [layer.name for layer in found.report.layers if "lora" in layer.name]
    assert {what.status for name, what in found.report.parameters.items() if "lora_" in name} == {"folded"}
    assert len(found.report.layers) == len(expected.report.layers)


class AdapterOnly(LoraModule):
    """It writes what it trains, as many do."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: t for name, t in state.items() if "lora" in name or "classifier" in name}

    @property  # type: ignore[misc]
    def strict_loading(self) -> bool:
        return False


def test_modules_that_write_adapters_only(tmp_path: Path) -> None:
    """Are read, and it is said that the merged weights are not in what they write."""
    expected = trained(1)
    expected.__class__ = AdapterOnly
    path = save_lightning(copy.deepcopy(expected), tmp_path / "a.ckpt")
    assert "net.base_model.model.bert.pooler.dense.weight" not in torch.load(path, weights_only=True)["state_dict"]
    expert = load_expert("a", path, AdapterOnly())
    close(expert.net, expected.net)
    callback = merge({"a": path, "b": expert}, AdapterOnly())
    with pytest.warns(UserWarning, match=r"a.ckpt lacks merged weights, because AdapterOnly .*merged.safetensors has"):
        callback.save(tmp_path / "out")


def test_the_model_becomes_the_merged_one() -> None:
    model = LoraModule()
    callback = merge({"a": trained(1), "b": trained(2)}, model)
    close(model.net, callback.modules["a"].net)


@pytest.mark.parametrize("kind", ["DoRA", "IA3"])
def test_adapters_that_cannot_be_folded_in_place(kind: str) -> None:
    module = LoraModule(dora=kind == "DoRA")
    if kind == "IA3":
        module.net = get_peft_model(make_bert(), IA3Config(task_type="SEQ_CLS"))
    with pytest.raises(MergeError, match=f"expert 'a': adapters other than plain LoRA .*(?i:{kind}).*merge_and_unload"):
        load_expert("a", module, module)


def test_adapters_at_different_layers_of_modules() -> None:
    """Their layers would have different names, and quietly stay private."""
    experts = {"a": trained(1), "b": trained(2, layers=["query", "value", "dense"])}
    with pytest.raises(
        MergeError, match=r"expert 'b' has an adapter at .*dense.*, the model has none there. Call merge"
    ):
        merge(dict(experts), LoraModule())
    for module in (plain := LoraModule(), *experts.values()):
        module.net = module.net.merge_and_unload()
    solved = merge(dict(experts), plain, private=["net.classifier"]).report.parameters
    assert solved["net.bert.encoder.layer.0.output.dense.weight"].status == "solved"


def test_an_adapter_of_another_rank_than_the_models(tmp_path: Path) -> None:
    """The class of the model could not load the result."""
    adapted(1, r=4, lora_alpha=3).save_pretrained(str(tmp_path))
    with pytest.raises(MergeError, match=r"lora_A.weight is \(4, 16\), in the model \(2, 16\).*Give a model without"):
        load_expert("a", tmp_path, LoraModule())
    adapted(1, lora_alpha=3).save_pretrained(str(tmp_path))
    with pytest.raises(MergeError, match="lora_alpha is 3, in the model 8"):
        load_expert("a", tmp_path, LoraModule())


def test_adapters_that_transformers_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `add_adapter`, which makes no PeftModel."""
    # transformers 5.24 asks for PEFT 0.22, which was not out when it was.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
    net = make_bert()
    net.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    expert = load_expert("a", net, TextModule())
    close(expert.net, net)
    assert not [name for name, _, _ in named_tensors(expert) if "lora" in name]
