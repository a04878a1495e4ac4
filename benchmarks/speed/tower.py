"""The model whose merges are timed: the vision tower of CLIP, with random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from benchmarks.lockstep import perturbed

SEED = 0


@dataclass
class Tower:
    """Sizes of the model and the data; by default those of ViT-B/32.

    Attributes:
        samples: per task.
    """

    tasks: int = 4
    samples: int = 256
    batch_size: int = 32
    blocks: int = 12
    width: int = 768
    image: int = 224
    patch: int = 32

    def made(self) -> tuple[nn.Module, list[nn.Module], list[tuple[Tensor, ...]]]:
        """Base, experts, and the batches of each task."""
        torch.manual_seed(SEED)
        config = CLIPVisionConfig(
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.blocks,
            num_attention_heads=max(self.width // 64, 1),
            image_size=self.image,
            patch_size=self.patch,
        )
        base: nn.Module = CLIPVisionModel(config)
        base.eval()
        experts = [perturbed(base) for _ in range(self.tasks)]
        shape = (self.samples, 3, self.image, self.image)
        return base, experts, [torch.split(torch.randn(shape), self.batch_size) for _ in experts]
