"""Adapters in folders: PEFT says what fits, whatever the layers are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from com_lightning import ChainOfMergesCallback, MergeDataModule, MergeError
from com_lightning.experts.load import load_expert
from tests.helpers.adapters import LanguageModule, make_llama, next_tokens, with_adapter
from tests.helpers.texts import make_texts

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*differ from your model")
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, **HEADS}


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(next_tokens(actual), next_tokens(expected), rtol=1e-4, atol=1e-5)


# Mixtures of experts, and weights that layers share


def make_mixture() -> Any:
    torch.manual_seed(0)
    mixture: dict[str, Any] = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    net: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **mixture))
    return net.eval()


@pytest.mark.parametrize("parameters", [["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_adapters_of_the_experts_of_a_mixture(parameters: list[str], tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{p}" for p in parameters])
    model = with_adapter(make_mixture(), config)
    model.save_pretrained(str(tmp_path))
    for source in (tmp_path, model):
        close(load_expert("a", source, LanguageModule(make_mixture())).net, model)


@pytest.mark.parametrize("targets", [["w1", "w2", "w3", "q_proj"], r".*\.(w1|w2|w3|q_proj)"])
def test_adapters_of_an_older_transformers(targets: Any, tmp_path: Path) -> None:
    """It had the experts of Mixtral as layers; PEFT puts their adapters together."""
    torch.manual_seed(0)
    net: Any = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1))
    state: dict[str, torch.Tensor] = {}
    expected = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for layer in range(2):
        deltas = {}
        shapes = {
            f"block_sparse_moe.experts.{e}.w{n}": (16, 24)[:: 1 if n == 2 else -1] for e in (0, 1) for n in (1, 2, 3)
        }
        for name, (outputs, inputs) in {**shapes, "self_attn.q_proj": (16, 16)}.items():
            a, b = 0.1 * torch.randn(3, inputs), 0.1 * torch.randn(outputs, 3)
            deltas[name] = 2 * b @ a
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            state |= {f"{prefix}.lora_A.weight": a, f"{prefix}.lora_B.weight": b}
        expected[f"model.layers.{layer}.self_attn.q_proj.weight"] += deltas["self_attn.q_proj"]
        for e in (0, 1):
            w1, w2, w3 = (deltas[f"block_sparse_moe.experts.{e}.w{n}"] for n in (1, 2, 3))
            expected[f"model.layers.{layer}.mlp.experts.gate_up_proj"][e] += torch.cat([w1, w3])
            expected[f"model.layers.{layer}.mlp.experts.down_proj"][e] += w2
    save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": targets}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found: Any = load_expert("a", tmp_path, LanguageModule(net)).net
    torch.testing.assert_close(dict(found.state_dict()), expected)


def test_vera_shares_its_projections(tmp_path: Path) -> None:
    model = with_adapter(make_llama(), VeraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    model.save_pretrained(str(tmp_path))
    close(load_expert("a", tmp_path, LanguageModule()).net, model)


def test_settings_with_patterns_are_those_of_peft(tmp_path: Path) -> None:
    patterns: list[dict[str, Any]] = [
        {
            "target_modules": r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)",
            "rank_pattern": {r"layers\.0\..*q_proj": 2, "up_proj": 6},
            "alpha_pattern": {r".*\.1\.self_attn\..*": 3},
        },
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers", "use_rslora": True},
    ]
    for number, settings in enumerate(patterns):
        model = with_adapter(make_llama(), LoraConfig(r=4, **settings))
        model.save_pretrained(str(tmp_path / str(number)))
        close(load_expert("a", tmp_path / str(number), LanguageModule()).net, model)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}  # not those of the file it replaces
    save_file({**state, "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.zeros(4, 16)}, path)
    with pytest.raises(MergeError, match=r"net comes closest and lacks model.layers.0.mlp.up_proj.lora_A"):
        load_expert("a", tmp_path, LanguageModule())
    two = LanguageModule()
    two.other = make_llama()
    with pytest.raises(MergeError, match="adapter fits net, other of LanguageModule equally well"):
        load_expert("a", tmp_path, two)
    with pytest.raises(MergeError, match="no part of LanguageModule has all its layers"):
        load_expert("a", tmp_path, LanguageModule(nn.Linear(2, 2)))


# Vocabularies


def resized(seed: int, length: int) -> Any:
    net = make_llama()
    net.resize_token_embeddings(length)
    return with_adapter(net, LoraConfig(r=4, target_modules=["q_proj"]), seed)


def test_adapters_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    models = {"a": resized(1, 44), "b": resized(2, 48)}
    for task, model in models.items():
        model.save_pretrained(str(tmp_path / task), save_embedding_layers=True)
        net: Any = load_expert(task, tmp_path / task, LanguageModule()).net
        close(net, model)
        assert net.config.vocab_size == len(net.lm_head.weight)
    folders: Any = {task: tmp_path / task for task in models}
    data = MergeDataModule({task: make_texts(seed) for seed, task in enumerate(models)})
    with pytest.raises(MergeError, match=r"embed_tokens.weight: model 40, a 44, b 48.*set resize_embeddings"):
        ChainOfMergesCallback(folders, private=[]).plan(LanguageModule(), data)
    plan = ChainOfMergesCallback(folders, private=[], resize_embeddings=True).plan(LanguageModule(), data)
    nets: list[Any] = [expert.net for expert in plan.experts.values()]
    assert {len(net.lm_head.weight) for net in nets} == {48}


def test_adapters_with_fewer_tokens_than_the_model(tmp_path: Path) -> None:
    resized(1, 36).save_pretrained(str(tmp_path), save_embedding_layers=True)
    with pytest.raises(MergeError, match=r"\(36, 16\), in the model \(40, 16\); call resize_token_embeddings\(36\)"):
        load_expert("a", tmp_path, LanguageModule())


# Bases


def test_quantised_models_are_refused(tmp_path: Path) -> None:
    """Packed weights are integers, as those of bitsandbytes are."""
    with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    ours = LanguageModule()
    layer = ours.net.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(torch.zeros(192, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(MergeError, match=r"layers.0.mlp.up_proj.weight of your model are uint8.*without quantisation"):
        load_expert("a", tmp_path, ours)
    data = MergeDataModule({task: make_texts(seed) for seed, task in enumerate("ab")})
    with pytest.raises(MergeError, match=r"the model: net.*up_proj.weight is uint8, which no rule merges"):
        ChainOfMergesCallback({"a": ours, "b": ours}, private=[]).plan(ours, data)


def test_an_adapter_of_a_base_that_was_changed_at_random_is_warned_of(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa_niter_4")  # type: ignore[arg-type]
    with_adapter(make_llama(), config).save_pretrained(str(tmp_path))
    with pytest.warns(UserWarning, match="'pissa_niter_4' has changed with random numbers"):
        load_expert("a", tmp_path, LanguageModule())


# In place of the adapter that the model has


def test_settings_that_act_on_the_weights_have_to_agree(tmp_path: Path) -> None:
    def make(seed: int = 1, **settings: Any) -> Any:
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1, **settings)
        return with_adapter(make_llama(), config, seed)

    cases: list[tuple[dict[str, Any], str]] = [
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa, in the model True"),
        ({"init_lora_weights": "olora"}, "init_lora_weights is olora, in the model True"),
        ({"use_rslora": True}, "use_rslora is True, in the model False"),
        ({"alpha_pattern": {"q_proj": 5}}, "alpha_pattern is {'q_proj': 5}, in the model {}"),
        ({"init_lora_weights": "gaussian"}, ""),
    ]
    for number, (settings, told) in enumerate(cases):
        folder = tmp_path / str(number)
        trained = make(**settings)
        trained.save_pretrained(str(folder))
        if told:
            with pytest.raises(MergeError, match=told):
                load_expert("a", folder, LanguageModule(make(2)))
        else:
            close(load_expert("a", folder, LanguageModule(make(2))).net, trained)
        close(load_expert("a", folder, LanguageModule()).net, trained)


def test_the_active_adapter_is_the_one_that_is_replaced(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    trained = with_adapter(make_llama(), config)
    trained.save_pretrained(str(tmp_path))
    ours: Any = with_adapter(make_llama(), LoraConfig(r=2, target_modules=["v_proj"]), 2)
    ours.add_adapter("mine", config)
    ours.set_adapter("mine")
    close(load_expert("a", tmp_path, LanguageModule(ours)).net, trained)
    ours.base_model.set_adapter(["default", "mine"])
    with pytest.raises(MergeError, match="2 adapters are active in the model: default, mine"):
        load_expert("a", tmp_path, LanguageModule(ours))
