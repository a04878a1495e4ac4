"""Configurations of adapters by others: nothing but the folder is read, and all of it in little time."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from com_lightning.experts.load import load_expert
from tests.helpers.adapters import LanguageModule, make_llama, next_tokens, with_adapter
from tests.helpers.bad_files import refused

pytestmark = pytest.mark.filterwarnings("ignore")
HOSTILE = r"(a+)+$|(.|.)*(.|.)*(.|.)*(.|.)*(.|.)*z"
SECONDS = 30  # of the processor; today's PEFT takes hours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with_adapter(make_llama(), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(str(tmp_path))
    return tmp_path


def write(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target_modules": HOSTILE}, "regular expression in target_modules that takes too long: '(a+)+$"),
        ({"exclude_modules": HOSTILE}, "regular expression in exclude_modules that takes too long"),
        ({"rank_pattern": {HOSTILE: 2}}, "regular expression in rank_pattern that takes too long: '(a+)+$"),
        ({"alpha_pattern": {HOSTILE: 2}}, "regular expression in alpha_pattern that takes too long"),
        ({"layers_pattern": HOSTILE, "layers_to_transform": [0]}, "in layers_pattern, which is no name of a layer"),
        ({"modules_to_save": [HOSTILE]}, "in modules_to_save, which is no name of a layer"),
        ({"trainable_token_indices": {HOSTILE: [1]}}, "in trainable_token_indices, which is no name of a layer"),
        ({"target_modules": "(" * 5000}, "invalid regular expression in target_modules"),
        ({"target_modules": "(x" * 50000}, "regular expression of 100,000 characters as target_modules"),
        ({"target_modules": r".*\.nothing"}, "as target_modules, which matches no layer of the model"),
        ({"target_modules": ["a." * 50000]}, "a name of 100,000 characters in target_modules"),
        ({"rank_pattern": {f"k{n}": 4 for n in range(100000)}}, "has 100,000 names in rank_pattern"),
        ({"rank_pattern": "q_proj"}, "has 'q_proj' as rank_pattern, which is no mapping"),
        ({"r": 10**9}, "sets r to 1000000000, and the largest size"),
        ({"rank_pattern": {"q_proj": 10**9}}, "sets rank_pattern to 1000000000"),
        ({"init_lora_weights": "pissa_niter_1000000000"}, "as init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 10**9]]}, "sets layer_replication, which cannot be merged"),
        ({"something_new": "/etc/passwd"}, "sets something_new, which cannot be merged or is not known"),
        ({"arrow_config": {"top_k": 1}}, "sets arrow_config"),
        ({"peft_type": ["LORA"]}, "it has no peft_type"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], told: str, folder: Path) -> None:
    start = time.process_time()
    assert told in refused(write(folder, **settings), LanguageModule())
    assert time.process_time() - start < SECONDS


def test_long_lists_and_names_take_no_time(folder: Path) -> None:
    start = time.process_time()
    names = [f"layer{n}.x" for n in range(100000)]
    load_expert("a", write(folder, target_modules=["q_proj", *names], exclude_modules=names), LanguageModule())
    path = folder / "adapter_model.safetensors"
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file({**state, "base_model.model." + "a." * 50000 + "lora_A.weight": torch.zeros(1)}, path)
    assert "a tensor with a name of 100,030 characters" in refused(folder, LanguageModule())
    assert time.process_time() - start < SECONDS


def test_settings_of_training_do_not_matter(folder: Path) -> None:
    """They may name files, which are not looked for."""
    expected = next_tokens(load_expert("a", folder, LanguageModule()).net)
    settings = {
        "corda_config": {"cache_file": "/x", "covariance_file": "/y"},
        "lora_ga_config": {"cache_file": "/x"},
        "eva_config": {"rho": 2},
        "auto_mapping": {"base_model_class": "Evil", "parent_library": "evil_module"},
        "base_model_name_or_path": None,
        "lora_dropout": 0.5,
        "something_new": None,
    }
    for more in ({}, {"init_lora_weights": "eva"}):
        found = next_tokens(load_expert("a", write(folder, **settings, **more), LanguageModule()).net)
        torch.testing.assert_close(found, expected)


def test_types_are_a_list_of_what_is_allowed(folder: Path) -> None:
    """Each type that PEFT has is merged, changes a model's inputs, or is refused by name."""
    for kind in (*(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING), "NEW"):
        told = refused(write(folder, peft_type=kind, shadow_model="someone/model"), LanguageModule())
        assert kind in told or "shadow_model" in told
    for kind in ("SHADOW", "XLORA", "POLY", "LILY", "NEW"):
        assert f"adapters of type {kind} are not merged" in refused(write(folder, peft_type=kind), LanguageModule())
