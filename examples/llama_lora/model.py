"""A causal language model and its perplexity: an ordinary LightningModule, with no thought of merging in it."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics.text import Perplexity
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.llama_lora.data import IGNORED


class CausalLM(LightningModule):
    """Any causal language model of transformers."""

    def __init__(self, base: str, learning_rate: float = 1e-3) -> None:
        """Load the model.

        Args:
            base: what adapters are trained on: a name on the Hub, or a folder.
            learning_rate: AdamW's.
        """
        super().__init__()
        self.save_hyperparameters()
        self.learning_rate = learning_rate
        self.net: Any = AutoModelForCausalLM.from_pretrained(base)
        self.tokenizer = AutoTokenizer.from_pretrained(base)  # so that it is written beside the merged model
        self.val_perplexity = Perplexity(ignore_index=IGNORED)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the tokens that follow all but the last, samples × (length - 1) × vocabulary."""
        logits: Tensor = self.net(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        return logits[:, :-1].float()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of one batch."""
        loss = cross_entropy(self(batch).flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Log `val_perplexity`, per token that is to be predicted."""
        self.val_perplexity(self(batch), batch["labels"][:, 1:])
        self.log("val_perplexity", self.val_perplexity, prog_bar=True, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trained: an adapter, or all."""
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.learning_rate)
