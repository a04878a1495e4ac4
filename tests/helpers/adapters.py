"""Text models with adapters of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.texts import TextModule, make_bert


def make_llama(tie: bool = False, vocabulary: int = 40) -> Any:
    """A tiny causal language model."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    net: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tie, **sizes, **heads))
    return net.eval()


class LanguageModule(LightningModule):
    """A user's module around a causal language model, or whatever transformers model it gets."""

    def __init__(self, net: Any = None) -> None:
        super().__init__()
        self.net: Any = make_llama() if net is None else net

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.net(input_ids=batch["ids"], labels=batch["ids"]).loss)


def with_adapter(net: Any, config: Any, seed: int = 1) -> Any:
    """A PeftModel of any type whose adapters have been trained, as it were."""
    torch.manual_seed(seed)
    model: Any = get_peft_model(net, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def next_tokens(net: Any, **kwargs: Any) -> Tensor:
    """What a language model computes."""
    ids = torch.randint(3, 40, (3, 6), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return net.eval()(input_ids=ids, **kwargs).logits  # type: ignore[no-any-return]


def adapted(seed: int, labels: int = 3, net: Any = None, **settings: Any) -> PeftModel:
    """A PeftModel whose adapters have been trained, as it were."""
    task = None if net is not None else "SEQ_CLS"
    config = LoraConfig(**{"r": 2, "target_modules": ["query", "value"], "task_type": task, **settings})
    torch.manual_seed(seed)
    model: Any = get_peft_model(net or make_bert(labels), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.03 * torch.randn_like(parameter)
    assert isinstance(model, PeftModel)
    return model.eval()


class LoraModule(TextModule):
    """A user's module that fine-tunes adapters."""

    def __init__(self, labels: int = 3, rank: int = 2, dora: bool = False, layers: Any = ("query", "value")) -> None:
        super().__init__(labels)
        self.save_hyperparameters()
        config = LoraConfig(r=rank, target_modules=list(layers), task_type="SEQ_CLS", use_dora=dora)
        self.net = get_peft_model(self.net, config)


def trained(seed: int, **kwargs: Any) -> LoraModule:
    module = LoraModule(**kwargs)
    torch.manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad or "lora" in name:
            parameter.data += 0.03 * torch.randn_like(parameter)
    return module.eval()
