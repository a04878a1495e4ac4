"""Weights with merged adapters compute what the adapters did."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora import Linear
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.errors import MergeWarning
from com_lightning.experts.load import load_expert
from tests.helpers.adapters import LanguageModule, make_llama, next_tokens, with_adapter
from tests.helpers.texts import make_texts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*tie_word_embeddings")


def sources(model: PeftModel, folder: Path) -> list[Any]:
    """An adapter as a folder and as a module."""
    model.save_pretrained(str(folder))
    return [folder, model]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# All that PEFT merges

TYPES: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAMSS": {},
    "C3A": {"block_size": 8},
    "DEFT": {},
    "DELORA": {},
    "FOURIERFT": {"n_frequency": 20},
    "GLORA": {},
    "GRALORA": {"r": 4},
    "HIRA": {},
    "HRA": {},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": {},
    "LOKR": {},
    "LORA": {},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4},
    "OSF": {},
    "PEANUT": {},
    "PSOFT": {"r": 4},
    "PVERA": {},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 2},
    "TINYLORA": {},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [3, 4]},
    "UNILORA": {"theta_d_length": 64},
    "VBLORA": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "VERA": {},
    "WAVEFT": {"n_frequency": 20},
}


@pytest.mark.parametrize("kind", TYPES)
def test_types_of_adapters(kind: str, tmp_path: Path) -> None:
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        pytest.skip(f"PEFT {peft.__version__} does not have it")
    settings = {"target_modules": ["q_proj", "down_proj"], **TYPES[kind]}
    model = with_adapter(make_llama(), PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))  # type: ignore[index]
    expected = next_tokens(model)
    assert not torch.allclose(expected, next_tokens(make_llama()), atol=1e-4)
    for source in sources(model, tmp_path):
        close(next_tokens(load_expert("a", source, LanguageModule()).net), expected)


@pytest.mark.parametrize("settings", [{"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}])
def test_adapters_that_change_the_base(settings: dict[str, Any], tmp_path: Path) -> None:
    model = with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"], **settings))
    expected = next_tokens(model)
    for source in sources(model, tmp_path):
        close(next_tokens(load_expert("a", source, LanguageModule()).net), expected)


@pytest.mark.parametrize("dora", [False, True])
def test_half_precision_leaves_room_for_rounding(dora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=dora)
    model = with_adapter(make_llama(), config).to(torch.bfloat16)
    expected = next_tokens(model)
    for source in sources(model, tmp_path):
        expert = load_expert("a", source, LanguageModule(make_llama().to(torch.bfloat16)))
        torch.testing.assert_close(next_tokens(expert.net), expected, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("kind", ["folder", "module", "in place"])
def test_what_is_merged_wrongly_is_an_error(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    folder, module = sources(model, tmp_path)
    right = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda self, name: 0.9 * right(self, name))
    source = {"folder": folder, "module": module, "in place": LanguageModule(model)}[kind]
    with pytest.raises(MergeError, match=r"layers\.0\.self_attn\.q_proj .*off by 0\.1 of what it changes"):
        load_expert("a", source, LanguageModule(model) if kind == "in place" else LanguageModule())


# Weights that several layers use

TIED: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "trained as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens of the head": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [3, 5]}},
}
STILL_TIED: dict[str, dict[str, Any]] = {
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "other layers": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", [*TIED, *STILL_TIED])
def test_adapters_of_tied_layers(kind: str, tmp_path: Path) -> None:
    model = with_adapter(make_llama(tie=True), LoraConfig(r=4, **(TIED | STILL_TIED)[kind]))
    expected = next_tokens(model)
    for number, source in enumerate(sources(model, tmp_path / "adapter")):
        net: Any = load_expert("a", source, LanguageModule(make_llama(tie=True))).net
        close(next_tokens(net), expected)
        assert (net.lm_head.weight is net.model.embed_tokens.weight) == (kind in STILL_TIED)
        net.save_pretrained(tmp_path / str(number))
        close(next_tokens(AutoModelForCausalLM.from_pretrained(tmp_path / str(number))), expected)


def test_adapters_that_peft_ties_stay_tied(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens"], ensure_weight_tying=True)
    model = with_adapter(make_llama(tie=True), config)
    model.save_pretrained(str(tmp_path))
    net: Any = load_expert("a", tmp_path, LanguageModule(make_llama(tie=True))).net
    close(next_tokens(net), next_tokens(model))
    assert net.lm_head.weight is net.model.embed_tokens.weight
    assert net.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["head", "embedding"])
def test_adapters_of_tied_layers_in_place(kind: str) -> None:
    def make() -> LanguageModule:
        return LanguageModule(with_adapter(make_llama(tie=True), LoraConfig(r=4, **TIED[kind])))

    expected = next_tokens(make().net)
    close(next_tokens(load_expert("a", make(), make()).net), expected)


def test_ties_of_encoders_and_decoders(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(vocab_size=40, **sizes)).save_pretrained(tmp_path)
    ids = {"decoder_input_ids": torch.tensor([[0, 7, 8]] * 3)}
    for target in ("lm_head", "shared"):
        base = T5ForConditionalGeneration.from_pretrained(tmp_path)
        model = with_adapter(base, LoraConfig(r=4, target_modules=["q", target]))
        expected = next_tokens(model, **ids)
        for source in sources(model, tmp_path / target):
            net: Any = load_expert(
                "a", source, LanguageModule(T5ForConditionalGeneration.from_pretrained(tmp_path))
            ).net
            close(next_tokens(net, **ids), expected)
            net.save_pretrained(tmp_path / "saved")
            close(next_tokens(T5ForConditionalGeneration.from_pretrained(tmp_path / "saved"), **ids), expected)


def untied() -> LanguageModule:
    module = LanguageModule(make_llama(tie=True))
    module.net.lm_head.weight = nn.Parameter(module.net.lm_head.weight.detach().clone())
    module.net.config.tie_word_embeddings = False
    return module


def test_a_model_that_ties_what_adapters_untie(tmp_path: Path) -> None:
    """It could not hold the result; untied, it can."""
    config = LoraConfig(r=4, **TIED["head"])
    models = {task: with_adapter(make_llama(tie=True), config, seed) for seed, task in enumerate("ab")}
    folders = {task: sources(model, tmp_path / task)[0] for task, model in models.items()}
    data = MergeDataModule({task: make_texts(n) for n, task in enumerate("ab")})
    callback = ChainOfMergesCallback(folders, private=[])
    with pytest.raises(MergeError, match=r"lm_head.weight and .*embed_tokens.weight are one tensor in your model"):
        callback.plan(LanguageModule(make_llama(tie=True)), data)
    plan = ChainOfMergesCallback(folders, private=[]).plan(untied(), data)
    for task, model in models.items():
        close(next_tokens(plan.experts[task].net), next_tokens(model))


# States of adapters


def test_adapters_in_an_odd_state() -> None:
    def make() -> Any:
        model = with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
        model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        return with_noise(model)

    def with_noise(model: Any) -> Any:
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "other" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model.eval()

    def layer(model: Any) -> Any:
        return model.base_model.model.model.layers[0].self_attn.q_proj

    right: dict[str, Any] = {"other active": make(), "two active": make(), "partly merged": make(), "merged": make()}
    right["other active"].set_adapter("other")
    right["two active"].base_model.set_adapter(["default", "other"])
    layer(right["partly merged"]).merge()
    right["merged"].merge_adapter()
    for model in right.values():
        with warnings.catch_warnings():
            warnings.simplefilter("error", MergeWarning)
            close(next_tokens(load_expert("a", model, LanguageModule()).net), next_tokens(model))
            inside = load_expert("a", LanguageModule(model), LanguageModule(model))
            close(next_tokens(inside.net), next_tokens(model))
            again = LanguageModule(make())  # the class makes its own adapter the active one
            again.load_state_dict(inside.state_dict())
            close(next_tokens(again.net), next_tokens(model))
    disabled, one_of_two = make(), make()
    disabled.disable_adapter_layers()
    one_of_two.base_model.set_adapter(["default", "other"])
    layer(one_of_two).merge(adapter_names=["other"])
    for model, told in ((disabled, "adapters are disabled at"), (one_of_two, "other adapters are merged at")):
        for source, ours in ((model, LanguageModule()), (LanguageModule(model), LanguageModule(model))):
            with pytest.raises(MergeError, match=rf"expert 'a': {told} .*q_proj"):
                load_expert("a", source, ours)


def test_modules_that_are_not_in_memory() -> None:
    """As accelerate leaves them, when there is not enough memory."""
    with torch.device("meta"):
        net = make_llama()
    for source in (net, LanguageModule(net)):
        with pytest.raises(MergeError, match=r"expert 'a': .*embed_tokens.weight.* are not in memory.*device_map"):
            load_expert("a", source, LanguageModule())


def test_modules_with_prompts_in_memory() -> None:
    model = get_peft_model(make_llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(MergeError, match="PREFIX_TUNING changes what a model computes, not its weights"):
        load_expert("a", model, LanguageModule())


def test_modes_of_a_source_are_kept(tmp_path: Path) -> None:
    model = with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(str(tmp_path))
    ours = LanguageModule()
    ours.net.train()
    ours.net.model.layers[0].eval()
    net: Any = load_expert("a", tmp_path, ours, as_stored=True).net
    assert net.model.layers[1].mlp.training
    assert not net.model.layers[0].mlp.training


class Shifted(nn.Linear):
    """A layer of the user's, which wants more than rows."""

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) + shift


class WithShifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shifted = Shifted(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.shifted(x, x.mean())  # type: ignore[no-any-return]


def test_layers_that_cannot_be_run_alone_are_warned_of() -> None:
    model = with_adapter(WithShifted(), LoraConfig(r=2, target_modules=["shifted"]))
    x = torch.randn(5, 4)
    with pytest.warns(MergeWarning, match="adapted layer base_model.model.shifted cannot be run by itself .*'shift'"):
        expert: Any = load_expert("a", model, LanguageModule(WithShifted()))
    close(expert.net(x), model(x))
