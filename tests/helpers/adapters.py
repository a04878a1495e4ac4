"""Text models with adapters of PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests.helpers.texts import TextModule, make_bert


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
